"""What an edit of the author ``operators`` is, and making one; ``edit_table.py`` has them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from bascule.plugins.authors.shots import Shot, choose_shots
from bascule.plugins.policy import AuthorInput
from bascule.plugins.task import Example
from bascule.plugins.tasks.harness_files import can_widen, manifest_text, widened
from bascule.schemas.harness import Harness, HarnessManifest

Params = dict[str, Any]
Family = Literal[
    "completion", "chat-shots", "reshuffle", "extract", "brief", "retry", "vote", "instruction",
    "nearest", "own", "told", "steps",
]  # fmt: skip
Version = Literal["1", "2"]


class Material(msgspec.Struct, frozen=True, kw_only=True):
    """What edits are made of.

    Attributes:
        train: the items that may be quoted.
        answers: the right ones, by item.
        own: answers of the promoted harness that were right, by item, in the landscape over train.
        quotable: whether any of these may stand in a harness.
        max_answer_tokens: of the longest answer.
        seed: of choices among them.
    """

    train: tuple[Example, ...]
    answers: Mapping[str, str]
    own: Mapping[str, str]
    quotable: bool
    description: str
    max_answer_tokens: int
    seed: int


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """One edit.

    Attributes:
        name: as recorded; it is tried once on the same harness.
        family: edits of one kind; one that failed puts the others of its family behind.
        change: the parameters after the edit; None where it does not apply or would change nothing.
        fill: what of the parameters follows from the material; None where it does not apply.
        prompt: the system prompt after the edit, made of the former one; None where it does not apply.
        marker: a system prompt that has this text had the edit already.
        shots: how many few-shot examples are drawn anew, from train or, with ``own``, from the harness's own successes.
        quotes: whether train items or their answers get into the harness, or before it.
        widens: whether the harness has to read what ``widened_harness.py`` reads besides.
        since: the first version of the author that has it.
    """

    name: str
    family: Family
    change: Callable[[Params], Params | None]
    fill: Callable[[Params, Material], Params | None] | None = None
    prompt: Callable[[str, Material], str | None] | None = None
    marker: str = ""
    shots: int | Literal["same"] | None = None
    own: bool = False
    quotes: bool = False
    widens: bool = False
    since: Version = "1"


def material_of(given: AuthorInput, *, without: Iterable[str] = ()) -> Material:
    """What an edit may be made of.

    Args:
        without: groups of train items that are not to be quoted.
    """
    out = set(without)
    return Material(
        train=tuple(e for e in given.train if e.group not in out),
        answers=given.answers,
        own={e.example.id: e.answer for e in given.evidence if e.answer and e.succeeded},
        quotable=given.allows.data and not given.restricted,
        description=given.description,
        max_answer_tokens=given.max_answer_tokens,
        seed=given.seed,
    )


def known_form(params: Params) -> bool:
    """Whether these are parameters as edits know them; those of another author's harness may be anything."""
    shots = params.get("shots", ())
    quotable = isinstance(shots, list | tuple) and all(isinstance(s, dict) and "question" in s for s in shots)
    return quotable and params.get("form") in ("chat", "completion")


def edit_of(harness: Harness, operator: Operator) -> Params | None:
    """The parameters after ``operator``, material aside; None where it does not apply to ``harness``."""
    params = harness.manifest.params
    if not known_form(params):
        return None
    if operator.marker and operator.marker in harness.files["system_prompt.md"]:
        return None
    return None if operator.widens and not can_widen(harness.files) else operator.change(params)


def untried(harness: Harness, tried: Sequence[str], operators: Iterable[Operator]) -> list[Operator]:
    """The operators that apply to ``harness`` and are not among ``tried``."""
    return [o for o in operators if o.name not in tried and edit_of(harness, o) is not None]


def edited(harness: Harness, operator: Operator, material: Material) -> dict[str, str] | None:
    """The files after ``operator``; None where it does not apply to the harness, or the material has nothing for it."""
    params = edit_of(harness, operator)
    if params is None or (operator.quotes and not material.quotable):
        return None
    if operator.fill is not None and (params := operator.fill(params, material)) is None:
        return None
    if operator.shots is not None:
        params["shots"] = _shots(operator, params, material)
        if operator.own and not params["shots"]:
            return None
    if params["form"] == "completion":
        params["max_tokens"] = material.max_answer_tokens
    files = dict(harness.files)
    if operator.prompt is not None:
        prompt = operator.prompt(files["system_prompt.md"], material)
        if prompt is None:
            return None
        files["system_prompt.md"] = prompt
    old = harness.manifest
    calls = params.get("votes", 1) * (params.get("retries", 0) + 1)
    manifest: HarnessManifest = msgspec.structs.replace(
        old, params=params, max_model_calls=max(old.max_model_calls, calls)
    )
    if operator.widens:
        files = widened(files)
        if params.get("nearest"):
            manifest = msgspec.structs.replace(manifest, isolation="batch", data="train")
    files["manifest.json"] = manifest_text(manifest)
    # With hardly a train item, other shots may turn out to be the same ones.
    return None if files == harness.files else files


def _shots(operator: Operator, params: Params, material: Material) -> list[Shot]:
    k = len(params["shots"]) if operator.shots == "same" else operator.shots
    assert k is not None
    answers = material.own if operator.own else material.answers
    return choose_shots(material.train, answers, k, salt=f"{material.seed} {operator.name}")
