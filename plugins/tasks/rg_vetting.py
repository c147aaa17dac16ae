"""Which answers reasoning-gym's scorers may see: nine of its data sets evaluate an answer as code.

``binary_matrix``, ``n_queens``, ``spiral_matrix`` and ``string_insertion`` call ``eval``; ``countdown``,
``puzzle24``, ``polynomial_multiplication``, ``simple_integration`` and ``intermediate_integration`` call sympy's
``parse_expr``, which does the same (read in the source of 0.1.25). For the last of them no form of an answer is both
safe and wide enough, so it is refused as a task. An answer to another one that has signs which no right answer has
never gets to the scorer, and neither does one whose evaluation could be long.
"""

from __future__ import annotations

import re

#: Not to be had as tasks, and why.
REFUSED = {
    "intermediate_integration": "its scorer evaluates answers as code of too many forms",
    "composite": "it is made of other data sets, which are tasks of their own",
}

_MATRIX = re.compile(r"[0-9\s,\[\]-]*")
_SUM = re.compile(r"(?:\d{1,9}(?!\d)|[-+/()\s]|\*(?!\s*\*))*")
_POLYNOMIAL = re.compile(
    r"(?:\b[A-Za-z]\b|\d{1,12}(?![\d.])|(?<=[A-Za-z])\*\*\d{1,2}(?!\d)(?!\s*\*\*)|[-+/()\s]|\*(?!\s*\*))*"
)
FORMS = {
    "binary_matrix": _MATRIX,
    "spiral_matrix": _MATRIX,
    "n_queens": re.compile(r"[Q_\s,\[\]'\"]*"),
    "string_insertion": re.compile(r"[A-E\s,\[\]'\"]*"),
    "countdown": _SUM,
    "puzzle24": _SUM,
    "polynomial_multiplication": _POLYNOMIAL,
    "simple_integration": _POLYNOMIAL,
}
_DEPTH = 40
_OPERATIONS = 80
_PRODUCTS = 3


def harmless(name: str, answer: str) -> bool:
    """Whether the scorer of the data set ``name`` may see ``answer``.

    Where it evaluates answers, one may have the signs of the data set's own ones, be nested at most 40 deep, and as a
    formula have at most 80 operations. Powers are those of a single letter, to at most two digits, and only three
    brackets may be multiplied out.
    """
    form = FORMS.get(name)
    if form is None:
        return True
    if not answer.isascii() or form.fullmatch(answer) is None or _depth(answer) > _DEPTH:
        return False
    operations = sum(answer.count(sign) for sign in "+-*/")
    if form is _POLYNOMIAL:
        return operations <= _OPERATIONS and answer.count("(") <= _PRODUCTS
    return form is not _SUM or operations <= _OPERATIONS


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    deepest = now = 0
    for character in text:
        now += (character in "([") - (character in ")]")
        deepest = max(deepest, now)
    return deepest
