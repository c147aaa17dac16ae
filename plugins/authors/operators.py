"""The author ``operators``: general offline edits of a harness that reads its parameters. It knows no task.

Every edit is a named operator on the parameters and the system prompt of the reference harness, tried once on the same
harness. Which comes next follows from the promoted harness, its landscape on train, and what became of earlier edits.
Few-shot examples are train items with their answers: no operator draws any where those must not enter a harness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from bascule.plugins.authors.shots import choose_shots
from bascule.plugins.policy import NO_EDIT, AuthorInput, CallResult, Generation, HarnessEdit, NoEdit
from bascule.plugins.tasks.harness_files import manifest_text
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import Harness, HarnessManifest

LOW_SUCCESS = 0.5
MANY_FORMAT_FAILURES = 0.2
BRIEF = "Reply with the answer only, without any other words."

Params = dict[str, Any]
Family = Literal["completion", "chat-shots", "reshuffle", "extract", "brief", "retry", "vote", "instruction"]


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """One edit.

    Attributes:
        name: as recorded; it is tried once on the same harness.
        family: edits of one kind; one that failed puts the others of its family behind.
        change: the parameters after the edit; None where it does not apply or would change nothing.
        shots: how many few-shot examples are drawn anew.
        brief: whether the system prompt is told to ask for the answer only.
    """

    name: str
    family: Family
    change: Callable[[Params], Params | None]
    shots: int | Literal["same"] | None = None
    brief: bool = False


def _form(form: str, k: int) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        if params["form"] == form and len(params.get("shots", ())) >= k:
            return None
        # Lines of examples say what is asked; an instruction above them is no such line, and a newline ends the answer.
        line = {"stop": ["\n"], "instruction": "none"} if form == "completion" else {}
        return {**params, "form": form, **line}

    return change


def _extract(order: Literal["first", "last"]) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        old = params.get("extract", "whole")
        new: Any
        if isinstance(old, dict):
            new = {"choice" if order == "first" else "last_choice": next(iter(old.values()))}
        else:
            new = f"{order}_{'integer' if old.endswith('_integer') else 'line'}"
        return None if new == old else {**params, "extract": new}

    return change


def _more(name: str, count: int) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        return {**params, name: count} if params.get(name, 0) < count else None

    return change


def _instruction(place: str) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        return None if params.get("instruction", "first") == place else {**params, "instruction": place}

    return change


def _with_shots(params: Params) -> Params | None:
    return dict(params) if params.get("shots") else None


def _chat_with_instruction(params: Params) -> Params | None:
    return dict(params) if params["form"] == "chat" and params.get("instruction", "first") != "none" else None


OPERATORS = {
    o.name: o
    for o in (
        *(
            Operator(name=f"completion-{k}", family="completion", change=_form("completion", k), shots=k)
            for k in (8, 16)
        ),
        *(Operator(name=f"chat-shots-{k}", family="chat-shots", change=_form("chat", k), shots=k) for k in (4, 8)),
        *(Operator(name=f"reshuffle-{i}", family="reshuffle", change=_with_shots, shots="same") for i in (1, 2, 3)),
        Operator(name="extract-first", family="extract", change=_extract("first")),
        Operator(name="extract-last", family="extract", change=_extract("last")),
        Operator(name="brief", family="brief", change=_chat_with_instruction, brief=True),
        Operator(name="retry-2", family="retry", change=_more("retries", 2)),
        Operator(name="vote-5", family="vote", change=_more("votes", 5)),
        *(
            Operator(name=f"instruction-{place}", family="instruction", change=_instruction(place))
            for place in ("question", "first", "none")
        ),
    )
}

#: Which families come first, by what the promoted harness shows.
ORDERS: dict[str, tuple[Family, ...]] = {
    "low-chat": ("completion", "chat-shots", "extract", "brief", "retry", "vote", "reshuffle", "instruction"),
    "ill-formed": ("extract", "brief", "retry", "completion", "chat-shots", "vote", "reshuffle", "instruction"),
    "completion": ("completion", "reshuffle", "vote", "retry", "extract", "chat-shots", "instruction", "brief"),
    "good-chat": ("chat-shots", "vote", "brief", "completion", "retry", "reshuffle", "extract", "instruction"),
}


def edit_of(harness: Harness, operator: Operator) -> Params | None:
    """The parameters after ``operator``, shots aside; None where it does not apply to ``harness``."""
    params = harness.manifest.params
    if params.get("form") not in ("chat", "completion"):
        return None
    if operator.brief and BRIEF in harness.files["system_prompt.md"]:
        return None
    return operator.change(params)


def untried(harness: Harness, tried: Sequence[str]) -> list[Operator]:
    """The operators that apply to ``harness`` and are not among ``tried``."""
    return [o for o in OPERATORS.values() if o.name not in tried and edit_of(harness, o) is not None]


def situation(params: Params, history: Sequence[Generation]) -> str:
    """The key into ``ORDERS``. Without a landscape a harness counts as low."""
    train = next((g.train for g in reversed(history) if g.outcome == "promoted"), None)
    if params["form"] == "chat" and (train is None or train.success_rate < LOW_SUCCESS):
        return "low-chat"
    if train is not None and train.format_failures > MANY_FORMAT_FAILURES:
        return "ill-formed"
    return "completion" if params["form"] == "completion" else "good-chat"


def ranked(given: AuthorInput) -> list[Operator]:
    """The operators that are left, best first."""
    failed = Counter(
        OPERATORS[g.edit].family for g in given.history if g.edit in OPERATORS and g.outcome in ("rejected", "failed")
    )
    left = [o for o in untried(given.harness, given.tried) if o.shots is None or _may_quote(given)]
    if not left:
        return []
    order = ORDERS[situation(given.harness.manifest.params, given.history)]
    return sorted(left, key=lambda o: (failed[o.family], order.index(o.family)))


def _may_quote(given: AuthorInput) -> bool:
    """Whether train items and their answers may stand in a harness."""
    return given.allows.data and not given.restricted


def apply(given: AuthorInput, operator: Operator) -> dict[str, str]:
    """The files after ``operator``."""
    old = given.harness.manifest
    params = edit_of(given.harness, operator)
    if params is None:
        raise ValueError(f"The operator {operator.name} does not apply to the harness {given.harness.digest}.")
    if operator.shots is not None:
        k = len(params["shots"]) if operator.shots == "same" else operator.shots
        params["shots"] = choose_shots(given.train, given.answers, k, salt=f"{given.seed} {operator.name}")
    if params["form"] == "completion":
        params["max_tokens"] = given.max_answer_tokens
    files = dict(given.harness.files)
    if operator.brief:
        files["system_prompt.md"] = f"{files['system_prompt.md'].rstrip()}\n{BRIEF}\n"
    calls = params.get("votes", 1) * (params.get("retries", 0) + 1)
    manifest: HarnessManifest = msgspec.structs.replace(
        old, params=params, max_model_calls=max(old.max_model_calls, calls)
    )
    files["manifest.json"] = manifest_text(manifest)
    return files


class Operators:
    """The author ``operators``. It has no parameters and makes no calls."""

    name = "operators"
    version = "1"

    def __init__(self, params: Mapping[str, Any]) -> None:
        if params:
            raise ConfigError(f"The author operators has no parameter {min(params)!r}.", next_step="Leave it out.")

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> HarnessEdit | NoEdit:
        for operator in ranked(given):
            files = apply(given, operator)
            # With hardly a train item, other shots may turn out to be the same ones.
            if files != given.harness.files:
                return HarnessEdit(files=files, edit=operator.name)
        without = "" if _may_quote(given) else ", and the task lets no train items into a harness"
        return NoEdit(reason=f"Every operator that applies to the promoted harness was tried{without}.")

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int:
        # After a generation without an edit none is left but those with examples, which the task does not let in.
        return len([o for o in untried(harness, tried) if o.shots is None or NO_EDIT not in tried])
