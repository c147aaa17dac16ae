"""Train episodes as an author that reads is shown them: failures first, those that failed alike together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bascule.plugins.models.messages import as_data
from bascule.plugins.policy import AuthorInput, TrainEvidence

_ROOM = 200
"""Characters that a cluster takes besides its examples."""
_CUT = 1500
"""Characters of a question or an answer; a longer one is cut."""


def evidence_text(given: AuthorInput, room: int) -> str:
    """The episodes of the promoted harness on train in at most about ``room`` characters.

    Every kind of failure has its count and in turn its examples, as long as there is room; then come successes.
    """
    failed = [e for e in given.evidence if not e.succeeded]
    passed = [e for e in given.evidence if e.succeeded]
    clusters = sorted(_clusters(failed).items(), key=lambda pair: (-len(pair[1]), pair[0]))
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind, _ in clusters}
    room -= _ROOM * len(clusters)
    for turn in range(max((len(members) for _, members in clusters), default=0)):
        for kind, members in clusters:
            if turn < len(members) and (size := _size(told := _shown(given, members[turn]))) <= room:
                shown[kind].append(told)
                room -= size
    successes: list[dict[str, Any]] = []
    for member in passed:
        if (size := _size(told := _shown(given, member))) <= room:
            successes.append(told)
            room -= size
    lines = [f"Of {len(given.evidence)} episodes of the present harness on train, {len(failed)} failed. By kind:"]
    lines += [
        as_data("failures", {"kind": kind, "count": len(members), "examples": shown[kind]})
        for kind, members in clusters
    ]
    if successes:
        lines += [f"Some of the {len(passed)} that did not:", as_data("successes", successes)]
    return "\n".join(lines)


def kind_of(evidence: TrainEvidence) -> str:
    """What episodes that failed alike have in common: the error, or the form of the answer."""
    if evidence.error is not None:
        return f"error: {evidence.error}"
    if evidence.reward is None:
        return "no verdict"
    partly = "" if evidence.reward <= 0 else ", partly right"
    return f"answer {_form(evidence.answer)}{partly}"


def _form(answer: str | None) -> str:
    text = (answer or "").strip()
    if not text:
        return "is empty"
    if re.fullmatch(r"[-+]?\d+", text):
        return "is an integer"
    if re.fullmatch(r"[-+]?[\d.,]+", text):
        return "is a number"
    if "\n" in text:
        return "has several lines"
    return "is one word" if len(text.split()) == 1 else "is a sentence"


def _clusters(failed: Sequence[TrainEvidence]) -> dict[str, list[TrainEvidence]]:
    """Failures by kind; of one item the first episode comes before the second of any other."""
    found: dict[str, list[TrainEvidence]] = {}
    rounds: dict[str, int] = {}
    ranked = []
    for evidence in failed:
        rounds[evidence.example.id] = rounds.get(evidence.example.id, 0) + 1
        ranked.append((rounds[evidence.example.id], evidence))
    for _, evidence in sorted(ranked, key=lambda pair: pair[0]):
        found.setdefault(kind_of(evidence), []).append(evidence)
    return found


def _shown(given: AuthorInput, evidence: TrainEvidence) -> dict[str, Any]:
    """One episode: in full, without the right answer where none may go into a harness, by ids where no text may."""
    told: dict[str, Any] = {
        "item": evidence.example.id,
        "trajectory": evidence.trajectory,
        "reward": evidence.reward,
    }
    if given.restricted:
        return told
    told["asked"] = {name: _cut(value) for name, value in evidence.example.input.items()}
    if given.allows.data:
        told["right"] = _cut(evidence.truth)
    if given.allows.data or not evidence.succeeded:
        told["answered"] = _cut(evidence.answer)
    return told


def _cut(value: Any) -> Any:
    return f"{value[:_CUT]}…" if isinstance(value, str) and len(value) > _CUT else value


def _size(told: dict[str, Any]) -> int:
    return len(as_data("", told))
