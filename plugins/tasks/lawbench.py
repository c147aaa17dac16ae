"""LawBench's charge prediction: of which of 191 charges was the defendant convicted?

One task under three regimes, which are never compared with each other:

- ``llm_only``: a harness gets no train label; only here do figures mean what a model knows.
- ``retrieval``: train items with their charges may be used as examples; nothing is fitted.
- ``classical_allowed``: a harness may fit a classifier on them. TF-IDF and a linear SVM reach .77 on sealed then, which
  is more than any published figure of a language model in the first two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bascule.plugins.task import Allows, Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.harness_files import manifest_text, reference_files
from bascule.plugins.tasks.lawbench_data import LAYOUT, NAME, Case, charges, public_cases, truths
from bascule.plugins.tasks.lawbench_duplicates import need_sklearn
from bascule.plugins.tasks.sia_data import FOUND_IN, WHEEL, kept_name
from bascule.plugins.tasks.splits import best_constant, constant_baseline, split_seed
from bascule.plugins.tasks.truths import Truths, kept_truths
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import HarnessManifest, Tunable
from bascule.schemas.trajectory import Scored, Verdict

PACKAGES = ("numpy", "scipy", "scikit-learn")
REGIMES = {
    "llm_only": Allows(data=False),
    "retrieval": Allows(data=True),
    "classical_allowed": Allows(data=True, packages=PACKAGES, memory_mb=6144, disk_mb=64, prepare_seconds=300.0),
}
#: What a regime asks for. Of this only what :data:`REGIMES` says is enforced: the packages that a harness may import,
#: and whether it is given the train cases. No check finds cases that an author wrote into a harness, or a classifier
#: without a package; whoever compares figures of two regimes looks into the harnesses.
RULES = {
    "llm_only": "No labelled case may be used: not in a prompt, and not by code.",
    "retrieval": "The train cases and their charges may be used as examples; no classifier may be fitted on them.",
    "classical_allowed": f"A classifier may be fitted on the train cases, with {', '.join(PACKAGES)}.",
}
#: Characters of a case in its question: a small model has no room for more. The whole text is in ``input["text"]``.
EXCERPT = 120
HARNESS = Path(__file__).with_name("lawbench_harness.py")
#: The baseline's classifier: what did well on a fold of train, with the default C of scikit-learn.
CLASSICAL = {
    "ngram_max": 2,
    "min_texts": 5,
    "weighting": "sublinear",
    "classifier": "svm",
    "c": 1.0,
    "max_chars": 100_000,
}
FIRST_PARAMS = {
    "ngram_max": 1,
    "min_texts": 30,
    "weighting": "counts",
    "classifier": "centroid",
    "c": 1.0,
    "max_chars": 300,
}
TUNABLE = {
    "ngram_max": Tunable(values=(1, 2)),
    "min_texts": Tunable(low=3, high=30, log=True, integer=True),
    "weighting": Tunable(values=("counts", "tfidf", "sublinear")),
    "classifier": Tunable(values=("centroid", "svm")),
    "c": Tunable(low=0.7, high=4.0, log=True),
    "max_chars": Tunable(values=(300, 3000)),
}


def example_of(case: Case) -> Example:
    """A case as agents see it."""
    excerpt = case.text if len(case.text) <= EXCERPT else case.text[:EXCERPT] + "……"
    return Example(id=case.id, group=case.group, input={"question": f"{excerpt}\n罪名：", "text": case.text})


class LawBenchPrivate:
    """Holds the charges of all splits; opened in the scoring process only."""

    def __init__(self, held: Truths, known: Sequence[str]) -> None:
        self._truths = held
        self._known = frozenset(known)

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the stripped answer is exactly the charge; ill-formed if it is none of the 191.

        Raises:
            KeyError: the split has no such case.
        """
        truth = self._truths[split][example]
        text = "" if answer is None else answer.strip()
        return Scored(reward=float(text == truth), passed=text == truth, well_formed=text in self._known)


class LawBench:
    """The task ``lawbench``. Parameters: ``regime`` (``llm_only``), ``split_seed`` (0) of dev.

    Of a regime's rules the packages and the access to the train cases are enforced, the rest is asked for: see
    :data:`RULES`.
    """

    name = NAME
    summary = "LawBench: which of 191 criminal charges a Chinese case led to; three regimes"
    wheels = (WHEEL,)

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params, ("regime",))
        self.regime = params.get("regime", "llm_only")
        if not isinstance(self.regime, str) or self.regime not in REGIMES:
            raise ConfigError(
                f"The task {self.name} has no regime {self.regime!r}.", next_step=f"It has {', '.join(REGIMES)}."
            )

    def public(self) -> PublicFace:
        cases = public_cases(self.seed)
        examples = {split: tuple(map(example_of, found)) for split, found in cases.items()}
        return PublicFace(
            name=self.name,
            version="1",
            description=(
                "Facts of Chinese criminal cases, as the prosecution or the court states them; the charge and the "
                "articles of law are masked. The answer is the one charge (罪名) of which the defendant was convicted: "
                "exactly one of these strings, and nothing else.\n\n"
                f"{'；'.join(charges())}\n\n"
                f"`question` is an excerpt of {EXCERPT} characters, `text` is all of it. "
                f"Regime {self.regime}: {RULES[self.regime]}"
            ),
            train=examples["train"],
            answers={c.id: c.charge for c in cases["train"]},
            dev=examples["dev"],
            sealed=examples["sealed"],
            max_answer_tokens=48,
            source=f"LawBench's charge prediction (Fei et al., arXiv:2309.16289), in {FOUND_IN}",
            licence="the wheel is MIT; the cases are public Chinese judgments (CAIL); nothing is redistributed here",
            allows=REGIMES[self.regime],
            regime=self.regime,
        )

    def private(self) -> LawBenchPrivate:
        name = kept_name(self.name, LAYOUT, self.seed)
        return LawBenchPrivate(kept_truths(self.name, name, partial(truths, self.seed)), charges())

    def harness(self) -> dict[str, str]:
        """The general reference harness, or where classifiers are allowed a plain one with parameters to search."""
        if self.regime != "classical_allowed":
            return reference_files(
                name="chat",
                system_prompt="判断下面案件的罪名。只回答罪名本身。",
                params={"form": "chat", "extract": "first_line", "max_tokens": 24},
            )
        manifest = HarnessManifest(
            name="centroid",
            params=FIRST_PARAMS,
            isolation="batch",
            data="train",
            packages=PACKAGES,
            prepare_seconds=240.0,
            memory_mb=3072,
            tunable=TUNABLE,
        )
        return {
            "harness.py": HARNESS.read_text(encoding="utf-8"),
            "manifest.json": manifest_text(manifest),
            "system_prompt.md": "No model is asked.\n",
        }

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The most frequent charge of train; and TF-IDF with a linear SVM, which belongs to one regime only."""
        own = self.regime == "classical_allowed"
        return (
            constant_baseline("train-majority", public, best_constant(public)),
            classical_baseline("tfidf-svm" if own else "tfidf-svm (regime classical_allowed)", public),
        )

    def defaults(self) -> dict[str, Any]:
        if self.regime == "classical_allowed":
            # A classifier gives the same answer every time, and each evaluation fits one.
            return {
                "levers": ["harness"],
                "author": {"name": "tuner", "params": {"positions": 600}},
                "evaluation": {"train_groups": 32, "train_samples": 1},
                "max_generations": 2,
            }
        return {"evaluation": {"train_groups": 16, "train_samples": 4}, "max_generations": 2}


def classical_baseline(name: str, public: PublicFace) -> Baseline:
    """What :data:`CLASSICAL`, fitted on train, answers; about 20 s of one core.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    need_sklearn("The classical baseline of lawbench")
    from bascule.plugins.tasks.lawbench_harness import fit

    classifier = fit([e.input["text"] for e in public.train], [public.answers[e.id] for e in public.train], CLASSICAL)
    answers: dict[str, dict[str, str]] = {}
    splits: tuple[Split, ...] = ("train", "dev", "sealed")
    for split in splits:
        found = public.split(split)
        predicted = classifier.predict([e.input["text"] for e in found])
        answers[split] = {e.id: charge for e, charge in zip(found, predicted, strict=True)}
    return Baseline(name=name, answers=answers)
