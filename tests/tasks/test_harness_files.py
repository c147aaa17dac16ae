"""Literals in code files: read without running anything, and set without moving anything else."""

from __future__ import annotations

from typing import Any

import pytest

from bascule.plugins.tasks.harness_files import literal, with_literal
from bascule.schemas.errors import HarnessError
from bascule.schemas.harness import make_harness

ODD = '''# PARAMS = {"C": 99}
"""PARAMS = {"C": 98} is where the numbers stand: größer is not better."""
import math  # TUNABLE

NOTE = "PARAMS = {'C': 97}"
if math:
    pass

größe = "µ"; PARAMS: dict = {   # all of them
    # how much is allowed
    "C" : 1e-0,        # cost
    'ngrams':
        (1,
         2),
    "weights": {"a": -1, "b": [1, 2]},  "text": "x" "y",
}


def fit(PARAMS):
    PARAMS = {"C": 96}
    return PARAMS
'''


def test_a_literal_is_read_where_it_is_assigned_and_nowhere_else() -> None:
    assert literal(ODD, "PARAMS") == {"C": 1.0, "ngrams": (1, 2), "weights": {"a": -1, "b": [1, 2]}, "text": "xy"}


def test_only_the_values_that_are_other_move() -> None:
    new = {**literal(ODD, "PARAMS"), "C": 0.3, "ngrams": (1, 3), "weights": {"a": 2, "b": [1, 2]}, "text": "Straße"}
    changed = with_literal(ODD, "PARAMS", new)
    assert literal(changed, "PARAMS") == new
    expected = ODD.replace("1e-0,", "0.3,").replace("(1,\n         2)", "(1, 3)")
    assert changed == expected.replace('"a": -1', '"a": 2').replace('"x" "y"', "'Straße'")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_characters_that_only_look_like_them_stay(end: str) -> None:
    text = end.join(['A = "\u2028\u0085"', "PARAMS = {", '    "ä": "ö", "n": 1,', "}", "B = 2", ""])
    changed = with_literal(text, "PARAMS", {"ä": "ö", "n": 2})
    assert changed == text.replace('"n": 1', '"n": 2')


@pytest.mark.parametrize("value", [[1, 2], {"b": 1, "a": 2}, {"a": 1}, None, "text", -0.5, True])
def test_a_value_of_another_shape_replaces_the_whole(value: Any) -> None:
    changed = with_literal('PARAMS = ({"a": 1, "b": 2})  # why\n', "PARAMS", value)
    assert changed == f"PARAMS = ({value!r})  # why\n"


def test_one_is_not_true_and_not_a_float() -> None:
    assert with_literal("P = {'a': 1}", "P", {"a": True}) == "P = {'a': True}"
    assert with_literal("P = {'a': 1}", "P", {"a": 1.0}) == "P = {'a': 1.0}"


def test_the_same_value_changes_nothing() -> None:
    assert with_literal(ODD, "PARAMS", literal(ODD, "PARAMS")) == ODD


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("X = 1", "0 times"),
        ("def f():\n    PARAMS = 1", "0 times"),
        ("PARAMS = 1\nPARAMS = 2", "2 times"),
        ("PARAMS: int", "0 times"),
        ("PARAMS = {'a': 1 + f()}", "no literal"),
        ("PARAMS = {**{}, 'a': 1}", "no literal"),
        ("PARAMS = (", "does not parse"),
    ],
)
def test_what_is_no_single_literal_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(HarnessError, match=says):
        literal(text, "PARAMS")
    with pytest.raises(HarnessError, match=says):
        with_literal(text, "PARAMS", 1)


@pytest.mark.parametrize("value", [float("nan"), object(), {"a": range(3)}])
def test_what_no_literal_can_say_is_refused(value: Any) -> None:
    with pytest.raises(HarnessError):
        with_literal("PARAMS = 1", "PARAMS", value)


@pytest.mark.parametrize("text", ["x = a" + ".b" * 20_000, "x = " + "-" * 60_000 + "1", "x = " + "(" * 5_000])
def test_code_that_is_nested_too_deeply_does_not_parse(text: str) -> None:
    files = {"harness.py": text, "manifest.json": '{"name": "deep"}', "system_prompt.md": ""}
    with pytest.raises(HarnessError, match=r"harness\.py.* does not parse"):
        make_harness(files)
