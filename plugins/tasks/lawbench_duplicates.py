"""Texts that are nearly the same, found exactly and without comparing every pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bascule.plugins.extras import install_command
from bascule.schemas.errors import ConfigError

THRESHOLD = 0.95


def need_sklearn(what: str) -> None:
    """Raise a ConfigError that says what needs scikit-learn and how to get it, where it is not installed."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise ConfigError(f"{what} needs scikit-learn.", next_step=f"Install it: {install_command('tasks')}")


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """Pairs of positions whose texts are equal, or have a cosine over ``threshold``.

    The vectors are TF-IDF of characters and character pairs, with 1 + log of the counts. Two unit vectors with a cosine
    over t share a feature within any set of features that holds more than 1 - t² of one vector's squared length, so
    only texts that share one of a text's rarest features are compared (prefix filtering: Bayardo, Ma and Srikant,
    Scaling up all pairs similarity search, WWW 2007).

    Returns:
        Pairs (i, j) with i < j, sorted.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    need_sklearn("Finding near-duplicates")
    import numpy as np
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors: Any = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    # Columns by rising number of texts that have them: a row's sorted entries then begin with its rarest feature.
    vectors = vectors[:, np.argsort(np.bincount(vectors.indices, minlength=vectors.shape[1]), kind="stable")].tocsr()
    vectors.sort_indices()
    rare = vectors.copy()
    for start, end in zip(vectors.indptr[:-1], vectors.indptr[1:], strict=True):
        before = np.cumsum(vectors.data[start:end] ** 2) - vectors.data[start:end] ** 2
        # A margin for rounding: a feature too many costs nothing.
        rare.data[start:end][before > 1 - threshold**2 + 1e-6] = 0
    rare.eliminate_zeros()
    # Overlaps are positive, so none cancels; what counts is where there is one.
    shared: Any = sparse.triu((rare @ vectors.T) + (vectors @ rare.T), k=1).tocoo()
    first, second = shared.row, shared.col
    cosine = np.asarray(vectors[first].multiply(vectors[second]).sum(axis=1)).ravel() if len(first) else np.zeros(0)
    near = cosine > threshold
    pairs = set(zip(first[near].tolist(), second[near].tolist(), strict=True))
    # Texts too short to have a feature are compared as they are.
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text in seen:
            pairs.add((seen[text], i))
        seen.setdefault(text, i)
    return sorted(pairs)


def components(n: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of ``n`` positions the smallest position that it is linked with, directly or through others."""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in pairs:
        a, b = sorted((find(i), find(j)))
        root[b] = a
    return [find(i) for i in range(n)]
