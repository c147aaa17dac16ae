"""A harness of the reference kind with two more parameters. Its former ``harness.py`` is beside it as ``answering.py``.

- ``nearest``: so many train items that are most like the question are worked examples too, behind ``shots``, the most
  similar one last. What is like is found by ``prepare``, which gets the train items without those that are asked.
- ``after``: of a reply counts only what follows this word, where it occurs last, in upper or lower case; a reply
  without it counts as it stands.

Similar texts share rare runs of characters: the cosine of their TF-IDF weights over runs of 1 to 3 characters.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import answering  # type: ignore[import-not-found]

LONGEST = 3
#: Characters of a question that are compared.
COMPARED = 2000


class Reply(NamedTuple):
    """What of a model's reply counts."""

    text: str


class Index:
    """Train items by the runs of characters in their questions."""

    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.shots = [
            {"question": item["input"]["question"], "answer": item["answer"]}
            for item in data
            if isinstance(item["input"].get("question"), str)
        ]
        counted = [Counter(runs(shot["question"])) for shot in self.shots]
        found: Counter[str] = Counter()
        for counts in counted:
            found.update(counts.keys())
        self.rarity = {run: math.log((1 + len(counted)) / (1 + n)) + 1 for run, n in found.items()}
        # Numbers in arrays, since there may be millions.
        self.places: dict[str, array[int]] = {run: array("i") for run in found}
        self.weights: dict[str, array[float]] = {run: array("f") for run in found}
        for place, counts in enumerate(counted):
            for run, weight in self.weighted(counts).items():
                self.places[run].append(place)
                self.weights[run].append(weight)

    def weighted(self, counts: Counter[str]) -> dict[str, float]:
        """The weights of a text's runs, of length 1 together; runs that no train item has weigh nothing."""
        weights = {run: (1 + math.log(n)) * self.rarity.get(run, 0.0) for run, n in counts.items()}
        length = math.sqrt(math.fsum(w * w for w in weights.values())) or 1.0
        return {run: w / length for run, w in weights.items() if w}

    def nearest(self, question: str, k: int) -> list[dict[str, str]]:
        """The ``k`` items that are most like a question, the most similar one last; of equal ones the first."""
        scores: dict[int, float] = {}
        for run, weight in self.weighted(Counter(runs(question))).items():
            for place, other in zip(self.places[run], self.weights[run], strict=True):
                scores[place] = scores.get(place, 0.0) + weight * other
        best = sorted(scores, key=lambda place: (-scores[place], place))[:k]
        return [self.shots[place] for place in reversed(best)]


def runs(text: str) -> Iterator[str]:
    """Every run of 1 to ``LONGEST`` characters, with a space at either end of the text."""
    text = f" {text[:COMPARED].lower()} "
    return (text[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


class Heard:
    """A model of whose replies only what follows a word is heard."""

    def __init__(self, model: Any, after: str) -> None:
        self.model = model
        self.after = after

    def chat(self, *args: Any, **options: Any) -> list[Reply]:
        return [Reply(tail(output.text, self.after)) for output in self.model.chat(*args, **options)]

    def complete(self, *args: Any, **options: Any) -> list[Reply]:
        return [Reply(tail(output.text, self.after)) for output in self.model.complete(*args, **options)]


def tail(text: str, word: str) -> str:
    """What follows a word where it occurs last, in upper or lower case; all of the text if it does not occur."""
    return re.split(re.escape(word), text, flags=re.IGNORECASE)[-1]


class Situation:
    """The context with other parameters."""

    def __init__(self, context: Any, params: dict[str, Any]) -> None:
        self.context = context
        self.params = params

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


def prepare(data: list[dict[str, Any]] | None, context: Any) -> Index | None:
    """The index of the train items, if any are to be found in it."""
    return Index(data or []) if context.params.get("nearest") else None


def solve(example: dict[str, Any], model: Any, tools: Any, context: Any) -> str:
    """Answer one example."""
    params = context.params
    k, after = params.get("nearest", 0), params.get("after")
    if k and context.prepared is not None:
        shots = [*params.get("shots", []), *context.prepared.nearest(example["question"], k)]
        params = {**params, "shots": shots}
    return str(answering.solve(example, Heard(model, after) if after else model, tools, Situation(context, params)))
