"""Kaggle's Spaceship Titanic as text: was a passenger transported to another dimension?

The 870 held-out rows of the MLE-bench split are ``sealed``. They share travel groups with the training file; training
rows of such groups are in no split, so that no group straddles. ``dev`` is 400 rows of whole groups of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bascule.plugins.task import Allows, Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.sia_data import WHEEL, Row
from bascule.plugins.tasks.spaceship_classical import boosted
from bascule.plugins.tasks.spaceship_data import ANSWER, LICENCE, NAME, SOURCE, group_of, private_truths, public_rows
from bascule.plugins.tasks.splits import best_constant, constant_baseline, rule_baseline, split_seed
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Verdict

SPENDING = ("RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck")
ANSWERS = ("True", "False")
ASK = f"{ANSWER} (True or False)?"


def question(row: Row) -> str:
    """One passenger as a short line of text.

    Unknown fields are left out, and so is what is usual and says little: not VIP, TRAPPIST-1e, nothing spent.
    """
    deck, _, side = (row["Cabin"] or "//").split("/")
    whole = {name: row[name].partition(".")[0] for name in ("Age", *SPENDING)}
    fields = [
        ("CryoSleep", row["CryoSleep"]),
        ("Deck", deck),
        ("Side", side),
        ("HomePlanet", row["HomePlanet"]),
        ("Age", whole["Age"]),
        ("VIP", "" if row["VIP"] == "False" else row["VIP"]),
        ("Destination", "" if row["Destination"] == "TRAPPIST-1e" else row["Destination"]),
        *((name, "" if whole[name] == "0" else whole[name]) for name in SPENDING),
    ]
    known = ", ".join(f"{name} {value}" for name, value in fields if value)
    return f"{known}. {ASK}" if known else ASK


def cryosleep_rule(example: Example) -> str:
    """Transported if asleep; where that is unknown, who spent nothing counts as asleep."""
    row = example.input["row"]
    if row["CryoSleep"]:
        return str(row["CryoSleep"])
    return str(all(float(row[name] or 0) == 0 for name in SPENDING))


class SpaceshipPrivate:
    """Holds the truths of all splits; opened in the scoring process only."""

    def __init__(self, truths: dict[str, dict[str, str]]) -> None:
        self._truths = truths

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the stripped answer is exactly ``True`` or ``False`` and right.

        Raises:
            KeyError: the split has no such passenger.
        """
        truth = self._truths[split][example]
        text = "" if answer is None else answer.strip()
        return Scored(reward=float(text == truth), passed=text == truth, well_formed=text in ANSWERS)


class Spaceship:
    """The task ``spaceship-titanic``. Parameter: ``split_seed`` (0) of dev."""

    name = NAME
    summary = "Kaggle's Spaceship Titanic as text: was the passenger transported? True or False"
    wheels = (WHEEL,)

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params)

    def public(self) -> PublicFace:
        rows = public_rows(self.seed)
        examples = {
            split: tuple(
                Example(
                    id=row["PassengerId"],
                    group=group_of(row),
                    input={"question": question(row), "row": {k: v for k, v in row.items() if k != ANSWER}},
                )
                for row in found
            )
            for split, found in rows.items()
        }
        return PublicFace(
            name=self.name,
            version="2",
            description=(
                "Passengers of a spaceship that met an anomaly; about half were transported to another dimension. "
                "Given one passenger's record, answer True if that passenger was transported, otherwise False. "
                "Amounts are what was billed at the ship's amenities; passengers in CryoSleep stay in their cabins."
            ),
            train=examples["train"],
            answers={row["PassengerId"]: row[ANSWER] for row in rows["train"]},
            dev=examples["dev"],
            sealed=examples["sealed"],
            max_answer_tokens=2,
            source=SOURCE,
            licence=LICENCE,
            allows=Allows(packages=("numpy", "scipy", "scikit-learn"), memory_mb=4096, disk_mb=64),
        )

    def private(self) -> SpaceshipPrivate:
        return SpaceshipPrivate(private_truths(self.seed))

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat",
            system_prompt=(
                "You are given the record of one passenger of the Spaceship Titanic. "
                "Was this passenger transported? Answer True or False only."
            ),
            params={"form": "chat", "extract": {"choice": list(ANSWERS)}, "max_tokens": 4},
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The majority of train, both constants, the CryoSleep rule, and gradient boosting fitted on train."""
        boosting = boosted(public)
        return (
            constant_baseline("train-majority", public, best_constant(public)),
            constant_baseline("all-False", public, "False"),
            constant_baseline("all-True", public, "True"),
            rule_baseline("cryosleep-rule", public, cryosleep_rule),
            rule_baseline("gradient-boosting", public, lambda e: boosting[e.id]),
        )

    def defaults(self) -> dict[str, Any]:
        return {
            "evaluation": {"dev_examples": 300, "train_groups": 32, "train_samples": 8},
            "max_generations": 2,
            # One word an answer: the policy is nearly deterministic after ten updates and learns little from then on.
            "algorithms": {"grpo": {"steps": 10, "groups": 48, "num_generations": 8, "learning_rate": 3e-4}},
        }
