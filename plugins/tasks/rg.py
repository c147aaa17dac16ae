"""The tasks ``rg:<name>``: data sets of reasoning-gym (Apache-2.0), an optional extra.

Splits are made from disjoint seeds, and an item that is asked in two of them stays in one (sealed before dev before
train). Only an answer that the data set's own scorer gives exactly 1 is right: some scorers give points for
garbage. The scorer is part of the scoring process, and sees no answer that could be code; see ``rg_vetting.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from bascule.plugins.params import read_params
from bascule.plugins.task import Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.rg_data import Wanted, dataset, entries
from bascule.plugins.tasks.rg_vetting import REFUSED, harmless
from bascule.plugins.tasks.splits import best_constant, constant_baseline
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Verdict

#: Between the first seeds of two splits; more than a split can have items, since item i has the seed ``first + i``.
STRIDE = 1_000_000
ORDER: tuple[Split, ...] = ("sealed", "dev", "train")
#: Characters that an answer may have beyond four times the longest true one.
SPARE = 256
SYSTEM = "Answer the question. The last line of your reply is the answer and nothing else."

Size = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Entries = dict[Split, dict[str, dict[str, Any]]]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration may set.

    Attributes:
        split_seed: other items.
        train, dev, sealed: items of a split, those that are asked twice included.
        options: of the data set, as reasoning-gym names them.
    """

    split_seed: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    train: Size = 300
    dev: Size = 100
    sealed: Size = 100
    options: dict[str, Any] = {}


def distinct(name: str, params: Params, *, texts: bool) -> Entries:
    """The entries by split and id; a question is in one of them, once.

    Raises:
        ConfigError: they cannot be made, one has no answer, or a split is left empty.
    """
    sizes = {"sealed": params.sealed, "dev": params.dev, "train": params.train}
    slices = tuple((STRIDE * (3 * params.split_seed + i), sizes[split]) for i, split in enumerate(ORDER))
    made = entries(Wanted(name=name, options=params.options, slices=slices, texts=texts))
    seen: set[str] = set()
    found: Entries = {}
    for split, every in zip(ORDER, made, strict=True):
        found[split] = {}
        for i, entry in enumerate(every):
            if not isinstance(entry["answer"], str):
                raise ConfigError(
                    f"Items of rg:{name} have no answer to show: reasoning-gym only checks answers to them.",
                    next_step="Choose another data set.",
                )
            key = fingerprint(entry["question"])
            if key not in seen:
                seen.add(key)
                found[split][f"{split}-{i}"] = entry
        if not found[split]:
            raise ConfigError(
                f"The split {split} of rg:{name} is empty: all its items are asked in another one.",
                next_step="Set the task's options so that there are more different items.",
            )
    return found


def fingerprint(question: str) -> str:
    """What stands for a question; its group."""
    return hashlib.blake2b(question.encode(), digest_size=8).hexdigest()


class ReasoningGymPrivate:
    """Makes the items again, with their answers; opened in the scoring process only."""

    def __init__(self, name: str, params: Params) -> None:
        self._name = name
        self._data = dataset(name, params.options)
        self._entries = distinct(name, params, texts=False)
        longest = max(len(entry["answer"]) for found in self._entries.values() for entry in found.values())
        self._longest = 4 * longest + SPARE

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the data set's scorer gives the stripped answer exactly 1. An answer that it cannot read is ill-formed.

        Raises:
            KeyError: the split has no such item.
        """
        entry = self._entries[split][example]
        text = "" if answer is None else answer.strip()
        if not text or len(text) > self._longest or not harmless(self._name, text):
            return Scored(reward=0.0, passed=False, well_formed=False)
        try:
            right = bool(self._data.score_answer(text, entry) == 1.0)
        except Exception:
            # It fails on what agents write, as `int("x")` does: the answer is at fault.
            return Scored(reward=0.0, passed=False, well_formed=False)
        return Scored(reward=float(right), passed=right)


class ReasoningGym:
    """The task ``rg:<name>``. Parameters: :class:`Params`."""

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        self.data = name
        self.name = f"rg:{name}"
        self.summary = f"the data set {name} of reasoning-gym"
        if name in REFUSED:
            raise ConfigError(f"{self.name} is no task: {REFUSED[name]}.", next_step="Choose another data set.")
        self._sized = "dev" in params
        self.params = read_params(params, Params, f"The task {self.name}")

    def public(self) -> PublicFace:
        found = distinct(self.data, self.params, texts=True)
        examples = {
            split: tuple(
                Example(id=i, group=fingerprint(e["question"]), input={"question": e["question"]})
                for i, e in every.items()
            )
            for split, every in found.items()
        }
        answers = {i: e["answer"] for i, e in found["train"].items()}
        return PublicFace(
            name=self.name,
            version="1",
            description=(
                f"Items of the kind {self.data!r} of reasoning-gym. Each question says what is asked for and in which "
                "form. The answer is that and nothing else; only a fully right one counts."
            ),
            train=examples["train"],
            answers=answers,
            dev=examples["dev"],
            sealed=examples["sealed"],
            # A token is at least a character of an answer.
            max_answer_tokens=min(max(map(len, answers.values())) + 4, 4096),
            source="made by reasoning-gym (PyPI), from seeds",
            licence="Apache-2.0 (the package); some of its data sets ship word lists and tasks of others",
        )

    def private(self) -> ReasoningGymPrivate:
        return ReasoningGymPrivate(self.data, self.params)

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat", system_prompt=SYSTEM, params={"form": "chat", "extract": "last_line", "max_tokens": 64}
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The best constant of train."""
        return (constant_baseline("best-constant", public, best_constant(public)),)

    def defaults(self) -> dict[str, Any]:
        """Items can be made without end, so each generation's dev is fresh, unless its size is set."""
        usual: dict[str, Any] = {"evaluation": {"train_groups": 32, "train_samples": 8}, "max_generations": 4}
        if self._sized:
            return usual
        fresh = Params().dev
        usual["evaluation"]["fresh_dev"] = fresh
        return {**usual, "task": {"params": {"dev": (usual["max_generations"] + 1) * fresh}}}
