"""Asking an item otherwise: other formatting and other wording, the same right answer.

A gain that is gone when the same questions come in another form was a gain on their form. The general rules below keep
to what no task's answer can depend on: blanks at the ends, a lead-in, a closing remark. A task that knows more of its
questions (:class:`~bascule.plugins.task.Perturbs`) brings its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from bascule.plugins.task import Example, Perturbs, Task

#: By rule; which one an item gets is drawn by its seed.
RULES: tuple[Callable[[str], str], ...] = (
    lambda q: f"Question: {q}",
    lambda q: f"Here is the next question.\n\n{q}",
    lambda q: f"{q}\n\nThank you.",
    lambda q: f"  {q}  ",
    lambda q: f"> {q}",
    lambda q: f"Please answer this.\n{q}\n",
)


def can_perturb(task: Task, example: Example) -> bool:
    """Whether an item of this task can be asked otherwise: by its own rules, or since it has a ``question``."""
    return isinstance(task, Perturbs) or isinstance(example.input.get("question"), str)


def perturbed(task: Task, example: Example, seed: int) -> Example:
    """The item in another form, the same for the same seed.

    Raises:
        ValueError: it cannot be asked otherwise.
    """
    if isinstance(task, Perturbs):
        return task.perturbed(example, seed)
    if not can_perturb(task, example):
        raise ValueError(f"The item {example.id} has no question, and its task no rules of its own.")
    rule = random.Random(seed).choice(RULES)  # noqa: S311 - a recorded seed, not a secret
    return msgspec.structs.replace(example, input={**example.input, "question": rule(example.input["question"])})
