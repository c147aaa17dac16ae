"""Small sums: a + b, and a - b with a >= b, operands 0 to 20.

A + b and b + a are one group, each a - b is its own: 231 groups of either kind. Dev and sealed take 75 groups of each
kind with one item per group, so that their items are independent; train has all items of the rest.

The regression set, where one is asked for, is products of operands 1 to 9: other sums, asked in the same form.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bascule.plugins.task import Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.splits import best_constant, constant_baseline, seeded_order, split_seed
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Verdict

LARGEST = 20
GROUPS_PER_KIND = 75
#: The largest operand of the regression set's products.
LARGEST_FACTOR = 9
NAMES = {"+": "add", "-": "sub", "*": "mul"}
WORDS = {"+": "plus", "-": "minus", "*": "times"}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_INTEGER = re.compile(r"-?[0-9]+")


class Sum(msgspec.Struct, frozen=True):
    """One item: ``left sign right =``."""

    left: int
    sign: str
    right: int

    @property
    def id(self) -> str:
        return f"{NAMES[self.sign]}-{self.left}-{self.right}"

    @property
    def group(self) -> str:
        low, high = sorted((self.left, self.right))
        return f"{NAMES[self.sign]}-{low}-{high}" if self.sign in "+*" else self.id

    @property
    def question(self) -> str:
        return f"{self.left} {self.sign} {self.right} ="

    @property
    def truth(self) -> str:
        return str(OPERATIONS[self.sign](self.left, self.right))


def splits(seed: int) -> dict[Split, list[Sum]]:
    """All items by split, in an order in which every prefix holds about as many sums as differences."""
    operands = range(LARGEST + 1)
    items = {
        "+": [Sum(a, "+", b) for a in operands for b in operands],
        "-": [Sum(a, "-", b) for a in operands for b in operands if a >= b],
    }
    found: dict[Split, list[Sum]] = {"dev": [], "sealed": [], "train": []}
    for sign, every in items.items():
        groups: dict[str, list[Sum]] = {}
        # The order within a group is seeded too, since dev and sealed take the first.
        for item in seeded_order(every, lambda i: i.id, f"arith item {seed}"):
            groups.setdefault(item.group, []).append(item)
        names = seeded_order(groups, str, f"arith group {sign} {seed}")
        found["dev"] += [groups[g][0] for g in names[:GROUPS_PER_KIND]]
        found["sealed"] += [groups[g][0] for g in names[GROUPS_PER_KIND : 2 * GROUPS_PER_KIND]]
        found["train"] += [item for g in names[2 * GROUPS_PER_KIND :] for item in groups[g]]
    return {split: seeded_order(chosen, lambda i: i.id, f"arith order {seed}") for split, chosen in found.items()}


def products(count: int, seed: int) -> list[Sum]:
    """The first ``count`` products of the regression set."""
    factors = range(1, LARGEST_FACTOR + 1)
    every = [Sum(a, "*", b) for a in factors for b in factors]
    return seeded_order(every, lambda i: i.id, f"arith regression {seed}")[:count]


class ArithPrivate:
    """Derives the truths; opened in the scoring process only."""

    def __init__(self, seed: int, regression: int = 0) -> None:
        items = {**splits(seed), "regression": products(regression, seed)}
        self._truths = {(split, item.id): item.truth for split, found in items.items() for item in found}

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the stripped answer is exactly the integer's decimal form.

        Raises:
            KeyError: the split has no such example.
        """
        truth = self._truths[split, example]
        text = "" if answer is None else answer.strip()
        correct = text == truth
        return Scored(reward=float(correct), passed=correct, well_formed=_INTEGER.fullmatch(text) is not None)


class Arith:
    """The task ``arith``. Parameters: ``split_seed`` (0); ``regression`` (0): how many products to watch."""

    name = "arith"
    summary = "a + b and a - b with operands 0 to 20; answer with the integer"

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params, ("regression",))
        most = LARGEST_FACTOR**2
        self.regression = params.get("regression", 0)
        if isinstance(self.regression, bool) or not isinstance(self.regression, int):
            self.regression = -1
        if not 0 <= self.regression <= most:
            raise ConfigError(
                f"regression of the task arith is {params['regression']!r}.",
                next_step=f"Give a number of products from 0 to {most}.",
            )

    def public(self) -> PublicFace:
        found = splits(self.seed)
        examples = {
            split: tuple(Example(id=i.id, group=i.group, input={"question": i.question}) for i in items)
            for split, items in found.items()
        }
        return PublicFace(
            name=self.name,
            version="1",
            description=(
                f"Add or subtract two integers from 0 to {LARGEST}; no result is negative. "
                "The answer is the result in plain decimal digits and nothing else."
            ),
            train=examples["train"],
            answers={i.id: i.truth for i in found["train"]},
            dev=examples["dev"],
            sealed=examples["sealed"],
            max_answer_tokens=4,
            source="made by this task's code",
            licence="MIT",
            regression=tuple(
                Example(id=i.id, group=i.group, input={"question": i.question})
                for i in products(self.regression, self.seed)
            ),
        )

    def private(self) -> ArithPrivate:
        return ArithPrivate(self.seed, self.regression)

    def perturbed(self, example: Example, seed: int) -> Example:
        """``3 + 4 =`` as ``3+4=``, ``What is 3 + 4?``, ``3 plus 4 =`` or ``3 + 4 = ?``, by the seed."""
        left, sign, right = example.input["question"].split()[:3]
        forms = (
            f"{left}{sign}{right}=",
            f"What is {left} {sign} {right}?",
            f"{left} {WORDS[sign]} {right} =",
            f"{left} {sign} {right} = ?",
        )
        return msgspec.structs.replace(example, input={"question": forms[seed % len(forms)]})

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat",
            system_prompt="Answer the question.",
            params={"form": "chat", "extract": "last_integer", "max_tokens": 12},
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The best constant of train, and always 0."""
        return (
            constant_baseline("best-constant", public, best_constant(public)),
            constant_baseline("always-0", public, "0"),
        )

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 32, "train_samples": 8}, "max_generations": 4}
