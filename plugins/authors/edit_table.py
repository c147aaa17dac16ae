"""The edits of the author ``operators``: named changes of a harness that reads its parameters. They know no task."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from bascule.plugins.authors.edits import Material, Operator, Params, Version
from bascule.plugins.authors.shots import choose_shots

BRIEF = "Reply with the answer only, without any other words."
STEPS = 'Think step by step. Then write the answer alone on a last line that begins with "Answer:".'
AFTER = "answer:"
#: So many different answers, and no more, are said one by one.
MOST_LABELS = 12
#: A description that is longer is no system prompt.
MOST_DESCRIPTION = 2000
#: Tokens without which nobody thinks step by step; an episode may ask for four times the longest answer's.
LEAST_STEPS, TIMES_ANSWER = 64, 4
_INTEGER = re.compile(r"-?\d+")


def _form(form: str, k: int) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        if params["form"] == form and len(params.get("shots", ())) >= k:
            return None
        return {**params, "form": form, **_line(form)}

    return change


def _line(form: str) -> Params:
    # Lines of examples say what is asked; an instruction above them is no such line, and a newline ends the answer.
    return {"stop": ["\n"], "instruction": "none"} if form == "completion" else {}


def _nearest(k: int, form: str | None = None) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        new = form or params["form"]
        if params["form"] == new and (form is not None or params.get("nearest", 0) >= k):
            return None
        # They stand in for the examples that are the same for every question.
        return {**params, "form": new, **_line(new), "nearest": k, "shots": []}

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


def _integers(params: Params) -> Params | None:
    old = params.get("extract", "whole")
    return None if isinstance(old, dict) or old.endswith("_integer") else {**params, "extract": "last_integer"}


def _only_integers(params: Params, material: Material) -> Params | None:
    return params if _all_integers(material) else None


def _words(params: Params) -> Params | None:
    return None if isinstance(params.get("extract"), dict) else dict(params)


def _choice(params: Params, material: Material) -> Params | None:
    labels = _labels(material)
    return {**params, "extract": {"choice": labels}} if labels else None


def _behind(params: Params) -> Params | None:
    return None if params.get("after") or params["form"] != "chat" else {**params, "after": AFTER}


def _steps(params: Params) -> Params | None:
    if params["form"] != "chat" or params.get("instruction", "first") == "none":
        return None
    extract = params.get("extract", "whole")
    return {**params, "after": AFTER, "extract": "first_line" if extract == "whole" else extract}


def _room(params: Params, material: Material) -> Params | None:
    most = TIMES_ANSWER * material.max_answer_tokens
    return {**params, "max_tokens": most} if most >= LEAST_STEPS else None


def _more(name: str, count: int) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        return {**params, name: count} if params.get(name, 0) < count else None

    return change


def _cool_votes(params: Params) -> Params | None:
    new = {**params, "votes": max(params.get("votes", 1), 5), "temperature": 0.5}
    return None if new == params else new


def _instruction(place: str) -> Callable[[Params], Params | None]:
    def change(params: Params) -> Params | None:
        return None if params.get("instruction", "first") == place else {**params, "instruction": place}

    return change


def _same(params: Params) -> Params | None:
    return dict(params)


def _with_shots(params: Params) -> Params | None:
    return dict(params) if params.get("shots") else None


def _chat_with_instruction(params: Params) -> Params | None:
    return dict(params) if params["form"] == "chat" and params.get("instruction", "first") != "none" else None


def _saying(line: str) -> Callable[[str, Material], str]:
    """A line below the system prompt, in place of one that says the opposite."""

    def prompt(old: str, _: Material) -> str:
        kept = [text for text in old.split("\n") if text not in (BRIEF, STEPS)]
        return "\n".join(kept).rstrip() + f"\n{line}\n"

    return prompt


def _described(_: str, material: Material) -> str | None:
    text = material.description.strip()
    return f"{text}\n" if 0 < len(text) <= MOST_DESCRIPTION else None


def _form_told(old: str, material: Material) -> str | None:
    if _all_integers(material):
        return f"{old.rstrip()}\nThe answer is an integer in digits, and nothing else.\n"
    labels = _labels(material)
    if not labels or not material.quotable:
        return None
    return f"{old.rstrip()}\nThe answer is exactly one of these, and nothing else: {', '.join(labels)}.\n"


def _looks(old: str, material: Material) -> str | None:
    shots = choose_shots(material.train, material.answers, 4, salt=f"{material.seed} looks")
    answers = list(dict.fromkeys(shot["answer"] for shot in shots))
    return f"{old.rstrip()}\nAnswers look like these: {'; '.join(answers)}.\n" if len(answers) > 1 else None


def _known(material: Material) -> set[str]:
    return {material.answers[e.id] for e in material.train if e.id in material.answers}


def _all_integers(material: Material) -> bool:
    known = _known(material)
    return bool(known) and all(_INTEGER.fullmatch(answer) for answer in known)


def _labels(material: Material) -> list[str]:
    """The answers, where there are few and each may come again."""
    known = _known(material)
    few = 2 <= len(known) <= min(MOST_LABELS, len(material.train) // 2) and all(known)
    return sorted(known) if few else []


_FIRST = (
    *(
        Operator(name=f"completion-{k}", family="completion", change=_form("completion", k), shots=k, quotes=True)
        for k in (8, 16)
    ),
    *(
        Operator(name=f"chat-shots-{k}", family="chat-shots", change=_form("chat", k), shots=k, quotes=True)
        for k in (4, 8)
    ),
    *(
        Operator(name=f"reshuffle-{i}", family="reshuffle", change=_with_shots, shots="same", quotes=True)
        for i in (1, 2, 3)
    ),
    Operator(name="extract-first", family="extract", change=_extract("first")),
    Operator(name="extract-last", family="extract", change=_extract("last")),
    Operator(name="brief", family="brief", change=_chat_with_instruction, prompt=_saying(BRIEF), marker=BRIEF),
    Operator(name="retry-2", family="retry", change=_more("retries", 2)),
    Operator(name="vote-5", family="vote", change=_more("votes", 5)),
    *(
        Operator(name=f"instruction-{place}", family="instruction", change=_instruction(place))
        for place in ("question", "first", "none")
    ),
)
_SECOND = (
    *(
        Operator(name=f"nearest-{k}", family="nearest", change=_nearest(k), quotes=True, widens=True, since="2")
        for k in (4, 8)
    ),
    Operator(
        name="completion-nearest-8",
        family="nearest",
        change=_nearest(8, "completion"),
        quotes=True,
        widens=True,
        since="2",
    ),
    *(Operator(name=f"own-{k}", family="own", change=_same, shots=k, own=True, quotes=True, since="2") for k in (4, 8)),
    Operator(name="extract-integer", family="extract", change=_integers, fill=_only_integers, since="2"),
    Operator(name="extract-choice", family="extract", change=_words, fill=_choice, quotes=True, since="2"),
    Operator(name="extract-after", family="extract", change=_behind, widens=True, since="2"),
    Operator(name="described", family="told", change=_chat_with_instruction, prompt=_described, since="2"),
    Operator(name="form-told", family="told", change=_chat_with_instruction, prompt=_form_told, since="2"),
    Operator(name="looks", family="told", change=_chat_with_instruction, prompt=_looks, quotes=True, since="2"),
    Operator(
        name="steps",
        family="steps",
        change=_steps,
        fill=_room,
        prompt=_saying(STEPS),
        marker=STEPS,
        widens=True,
        since="2",
    ),
    Operator(name="vote-5-cool", family="vote", change=_cool_votes, since="2"),
)
OPERATORS = {o.name: o for o in (*_FIRST, *_SECOND)}


def of_version(version: Version) -> tuple[Operator, ...]:
    """The operators that a version of the author has."""
    return _FIRST if version == "1" else tuple(OPERATORS.values())
