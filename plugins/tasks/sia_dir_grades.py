"""Grades of SIA submissions: ours, over everything that is asked, and what a directory's own evaluator printed.

Ours divides by the number of items that are asked. Each is right or wrong; one that is missing, ill-formed, or answered
twice in different ways is wrong. Letters are one of A to D and nothing else; moves are in order; labels are equal as
text. All functions are pure.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from bascule.plugins.tasks.sia_dir_files import Shape, table
from bascule.plugins.tasks.sia_dir_submission import PATTERNS

LETTERS = "ABCD"
_THEIRS = "SIA's evaluator for this form"
Key = dict[str, tuple[str, ...]]
"""What is right, by id: a text, or several in order."""

_FOR: dict[str, tuple[str, ...]] = {
    "letters": ("results/*.json", "submission*.json", "output*.json"),
    "moves": ("results/*.json", "responses.json", "submission*.json", "output*.json"),
    "table": ("submission.csv", "predictions.csv", "submission*.csv"),
    "": PATTERNS,
}


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What a submission holds, as far as can be said without the answers.

    Attributes:
        file: which one was read; empty if there was none to read.
        asked: items of the task.
        rows: of the submission.
        answered: items with at least one well-formed answer.
        missing: items without any answer.
        ill_formed: items that were answered in no form that counts.
        repeated: rows too many for their items.
        foreign: rows for items that there are not.
    """

    file: str = ""
    asked: int
    rows: int = 0
    answered: int = 0
    missing: int = 0
    ill_formed: int = 0
    repeated: int = 0
    foreign: int = 0


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """A submission as it was read: of each item the well-formed answer, where it has one and no other."""

    answers: dict[str, tuple[str, ...]]
    counted: Counted


def key_of(shape: Shape, private: Mapping[str, bytes]) -> Key | None:
    """What is right, from the private files; None where they have no form that is known.

    A key that does not cover what is asked is none: half of it would be guessed.
    """
    found: Key | None = None
    match shape.form:
        case "letters":
            found = _letters(private.get("diamond_questions.json", b""))
        case "moves":
            found = _moves(private.get("answers.json", b""))
        case "table":
            name, label = shape.columns
            for file in sorted(private):
                rows = table(private[file]) if file.endswith(".csv") else []
                if rows and {name, label} <= set(rows[0]):
                    found = {row[name]: (row[label].strip(),) for row in rows}
                    break
    return found if found is not None and set(found) == set(shape.ids) else None


def _letters(data: bytes) -> Key | None:
    try:
        items = json.loads(data)
        return {str(item["id"]): (str(item["correct_answer_letter"]),) for item in items}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _moves(data: bytes) -> Key | None:
    try:
        items = json.loads(data)
        return {name: _solution(value) or () for name, value in items.items()}
    except (ValueError, AttributeError, RecursionError):
        return None


def read(shape: Shape, files: Mapping[str, str]) -> Given:
    """Read a submission: of several files the one that evaluators take first."""
    names = [name for pattern in _FOR[shape.form] for name in sorted(files) if fnmatchcase(name, pattern)]
    asked = dict.fromkeys(shape.ids)
    if not names or not shape.form:
        return Given(answers={}, counted=Counted(asked=len(asked), missing=len(asked), file=names[0] if names else ""))
    rows = _rows(shape, files[names[0]])
    by_id: dict[str, list[tuple[str, ...] | None]] = {}
    for identity, answer in rows:
        by_id.setdefault(identity, []).append(answer)
    answers: dict[str, tuple[str, ...]] = {}
    for identity, found in by_id.items():
        given = set(found)
        if identity in asked and len(given) == 1 and (only := found[0]) is not None:
            answers[identity] = only
    known = [identity for identity in by_id if identity in asked]
    return Given(
        answers=answers,
        counted=Counted(
            file=names[0],
            asked=len(asked),
            rows=len(rows),
            answered=sum(any(a is not None for a in by_id[i]) for i in known),
            missing=len(asked) - len(known),
            ill_formed=sum(all(a is None for a in by_id[i]) for i in known),
            repeated=sum(len(by_id[i]) - 1 for i in known),
            foreign=sum(len(found) for i, found in by_id.items() if i not in asked),
        ),
    )


def _rows(shape: Shape, text: str) -> list[tuple[str, tuple[str, ...] | None]]:
    if shape.form == "table":
        return _cells(shape.columns, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if shape.form == "moves":
        records = value if isinstance(value, list) else []
        return [(str(r.get("question_id")), _solution(r.get("solution"))) for r in records if isinstance(r, dict)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("details"), list):
        pairs = [(r.get("question_id"), r.get("model_answer")) for r in value["details"] if isinstance(r, dict)]
    else:
        inner = value.get("answers")
        pairs = list(inner.items() if isinstance(inner, dict) else value.items())
        pairs = [(k, v) for k, v in pairs if str(k) in shape.ids]
    return [(str(identity), _letter(answer)) for identity, answer in pairs if answer is not None]


def _cells(columns: tuple[str, str], text: str) -> list[tuple[str, tuple[str, ...] | None]]:
    name, label = columns
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error:
        return []
    if not rows or not {name, label} <= set(rows[0]):
        return []
    return [(row[name] or "", (row[label].strip(),) if row[label] else None) for row in rows]


def _letter(answer: Any) -> tuple[str, ...] | None:
    text = answer.strip().upper() if isinstance(answer, str) else ""
    return (text,) if len(text) == 1 and text in LETTERS else None


def _solution(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str | int):
        text = str(value).strip()
        return (text,) if text else None
    if isinstance(value, list) and value and all(isinstance(move, str) for move in value):
        return tuple(move.strip() for move in value)
    return None


def correct(key: Key, given: Given) -> int:
    """How many items are right."""
    return sum(given.answers.get(identity) == right for identity, right in key.items())


class NoFigure(ValueError):
    """What an evaluator left holds no usable figure; the message says why, and quotes nothing of it."""


def figure_of(results: bytes, metric: str = "") -> float:
    """The accuracy in an evaluator's ``results.json``, 0 to 1.

    Args:
        metric: where the figure stands, parts with dots, as it stands there; by default the accuracy, which some
            directories give as a fraction and some in percent.

    Raises:
        NoFigure: it is no JSON, has no such figure, or one that is not finite or out of range.
    """
    try:
        value = json.loads(results)
    except (ValueError, RecursionError) as e:
        raise NoFigure("results.json is no JSON") from e
    if not isinstance(value, dict):
        raise NoFigure("results.json is no object")
    if metric:
        found: Any = value
        for part in metric.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return _finite(found, metric)
    summary = value["summary"] if isinstance(value.get("summary"), dict) else value
    if summary.get("accuracy_percent") is not None:
        percent = _finite(summary["accuracy_percent"], "accuracy_percent")
        return _fraction(percent / 100, "accuracy_percent")
    if summary is not value and _count(summary.get("correct")) and _count(summary.get("total_questions")):
        if summary["total_questions"] == 0:
            raise NoFigure("summary.total_questions in results.json is 0")
        return _fraction(summary["correct"] / summary["total_questions"], "summary")
    accuracy = _finite(summary.get("accuracy"), "accuracy")
    return _fraction(accuracy if accuracy <= 1 else accuracy / 100, "accuracy")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoFigure(f"results.json has no number {name}")
    try:
        number = float(value)
    except OverflowError as e:
        raise NoFigure(f"{name} in results.json is out of range") from e
    if not math.isfinite(number):
        raise NoFigure(f"{name} in results.json is {number}")
    return number


def _fraction(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise NoFigure(f"{name} in results.json is out of range")
    return value


def differences(shape: Shape, counted: Counted, *, evaluator: bool, equal: bool) -> list[str]:
    """Where a directory's evaluator counts otherwise than we do, for this submission; a sentence each.

    Args:
        evaluator: whether the directory has one.
        equal: whether both came to the same figure.
    """
    if not evaluator:
        return ["The directory has no evaluate.py; only our figure there is."]
    said = []
    if shape.form == "letters":
        unread = counted.missing + counted.ill_formed
        if unread:
            said.append(
                f"{unread} of {counted.asked} questions have no letter as answer. {_THEIRS} divides by the questions "
                "that it read a letter for, and takes the first A, B, C or D in any text; ours divides by "
                f"{counted.asked} and takes single letters only."
            )
    if shape.form == "moves":
        if counted.rows != counted.asked or counted.repeated or counted.foreign:
            said.append(
                f"{counted.rows} rows were handed in for {counted.asked} questions, {counted.repeated} of them "
                f"repeated and {counted.foreign} for none of them. {_THEIRS} divides by the rows and counts a "
                f"repeated one each time; ours divides by {counted.asked}."
            )
        if not equal:
            said.append(f"{_THEIRS} takes moves in any order; ours in order only.")
    if shape.form == "table" and counted.repeated:
        said.append(
            f"{counted.repeated} rows repeat an id. {_THEIRS} counts each of them, in the numerator and below; "
            "ours counts an id once, and as wrong where its rows differ."
        )
    return said
