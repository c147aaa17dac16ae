"""The first harness of lawbench in the regime ``classical_allowed``: a linear classifier of characters. Asks no model.

It is fitted once, on the train items, and then answers each case by itself. ``params``:

- ``ngram_max``: the features are runs of 1 to so many characters; ``min_texts``: those that so many texts have.
- ``weighting``: ``counts``; ``tfidf``; or ``sublinear``, which takes 1 + log of the counts.
- ``classifier``: ``centroid`` (the charge with the nearest mean), ``bayes`` (complement naive Bayes; Rennie et al.,
  ICML 2003) or ``svm`` (one-against-rest with squared hinge loss); ``c`` is how closely the last follows its data.
- ``max_chars``: characters of a text that are looked at.
"""

import os

# One thread is as quick as many for what is done here, and leaves the other cores to others.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from collections.abc import Sequence  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402


class Linear(NamedTuple):
    """A fitted classifier: features × charges weights, and a bias for each charge."""

    vectorizer: Any
    weights: Any
    bias: Any
    charges: Any
    max_chars: int

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The charge of each text."""
        vectors = self.vectorizer.transform([text[: self.max_chars] for text in texts])
        return [str(charge) for charge in self.charges[np.argmax(vectors @ self.weights + self.bias, axis=1)]]


def fit(texts: Sequence[str], charges: Sequence[str], params: dict[str, Any]) -> Linear:
    """Fit a classifier under ``params``, which are those of the manifest."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer="char",
        ngram_range=(1, params["ngram_max"]),
        min_df=params["min_texts"],
        use_idf=params["weighting"] != "counts",
        sublinear_tf=params["weighting"] == "sublinear",
        dtype=np.float32,
    )
    vectors = vectorizer.fit_transform([text[: params["max_chars"]] for text in texts])
    names, labels = np.unique(np.asarray(charges), return_inverse=True)
    weights, bias = SOLVERS[params["classifier"]](vectors, labels, len(names), params["c"])
    # By rows, so that one text reads the rows of its own features only.
    rows = np.ascontiguousarray(weights.T, dtype=np.float32)
    return Linear(vectorizer, rows, np.asarray(bias, dtype=np.float32), names, params["max_chars"])


def centroid(vectors: Any, labels: Any, n: int, c: float) -> tuple[Any, Any]:
    """Nearest mean: ``-|x - m|²`` is ``2 x·m - |m|²`` but for what all charges share."""
    means = sums(vectors, labels, n) / np.bincount(labels, minlength=n)[:, None]
    return means, -(means**2).sum(axis=1) / 2


def bayes(vectors: Any, labels: Any, n: int, c: float) -> tuple[Any, Any]:
    """Complement naive Bayes: minus the log-probability of each feature in the texts of the other charges."""
    per_charge = sums(vectors, labels, n)
    others = per_charge.sum(axis=0)[None, :] - per_charge + 0.1
    return -np.log(others / others.sum(axis=1, keepdims=True)), np.zeros(n)


def svm(vectors: Any, labels: Any, n: int, c: float) -> tuple[Any, Any]:
    """A linear support vector machine for each charge against the rest."""
    from sklearn.svm import LinearSVC

    machine = LinearSVC(C=c, tol=0.05, random_state=0).fit(vectors, labels)
    if n > 2:
        return machine.coef_, machine.intercept_
    return np.vstack([-machine.coef_, machine.coef_])[-n:], np.array([-1, 1])[-n:] * machine.intercept_


def sums(vectors: Any, labels: Any, n: int) -> Any:
    """Sum of the vectors of each charge."""
    from scipy.sparse import csr_matrix

    rows = csr_matrix((np.ones(len(labels), dtype=np.float32), (labels, np.arange(len(labels)))), (n, len(labels)))
    return (rows @ vectors).toarray()


SOLVERS = {"centroid": centroid, "bayes": bayes, "svm": svm}


def prepare(data: list[dict[str, Any]], context: Any) -> Linear:
    """Fit on the train items."""
    return fit([item["input"]["text"] for item in data], [item["answer"] for item in data], context.params)


def solve(example: dict[str, Any], model: Any, tools: Any, context: Any) -> str:
    """Answer one case."""
    return str(context.prepared.predict([example["text"]])[0])
