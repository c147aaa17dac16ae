"""Few-shot examples by seeded choice, balanced over whatever the train items show: answers and shapes of question."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from bascule.plugins.task import Example

Shot = dict[str, str]
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def shape(question: str) -> str:
    """A question with its numbers masked: ``3 + 4 =`` and ``9 + 1 =`` have one shape, ``3 - 1 =`` another."""
    return _NUMBER.sub("#", question)


def choose_shots(train: Sequence[Example], answers: Mapping[str, str], k: int, *, salt: str) -> list[Shot]:
    """Choose ``k`` train items, or all if there are fewer.

    Answers and shapes are balanced over where there are at most ``k`` of them. Groups and answers repeat only when
    there is no other choice. The result depends on the set of train items, not on their order.
    """

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{salt}\0{text}".encode()).digest()

    usable = sorted((e for e in train if e.id in answers and "question" in e.input), key=lambda e: rank(e.id))
    by_answer = len({answers[e.id] for e in usable}) <= k
    by_shape = len({shape(e.input["question"]) for e in usable}) <= k

    def stratum(e: Example) -> tuple[str, str]:
        return answers[e.id] if by_answer else "", shape(e.input["question"]) if by_shape else ""

    strata: dict[tuple[str, str], list[Example]] = {}
    for e in usable:
        strata.setdefault(stratum(e), []).append(e)
    chosen: list[Example] = []
    while len(chosen) < min(k, len(usable)):
        for name in sorted(strata, key=lambda s: rank("|".join(s))):
            if len(chosen) < k and strata[name]:
                chosen.append(_freshest(strata[name], chosen, answers))
                strata[name].remove(chosen[-1])
    # Rounds over the strata would alternate the answers; a model could learn the alternation.
    chosen.sort(key=lambda e: rank(f"place {e.id}"))
    return [{"question": e.input["question"], "answer": answers[e.id]} for e in chosen]


def _freshest(candidates: Sequence[Example], chosen: Sequence[Example], answers: Mapping[str, str]) -> Example:
    """The first candidate whose group, and if possible whose answer, was chosen least."""
    groups = [e.group for e in chosen]
    given = [answers[e.id] for e in chosen]
    return min(candidates, key=lambda e: (groups.count(e.group), given.count(answers[e.id])))
