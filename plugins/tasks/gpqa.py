"""GPQA diamond: 198 questions at the level of a doctorate, each with four options.

All 198 are ``sealed``, so that the figure is the published one: right answers over 198. ``train`` and ``dev`` are
questions of the same form that this task's code makes; they teach the form, and no more. The authors ask that the
questions are not published where models are trained, so the task is restricted: they are read from the wheel each time
and written to no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bascule.plugins.task import Allows, Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks import sia_data
from bascule.plugins.tasks.gpqa_practice import LETTERS, Practice, practice
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.splits import constant_baseline, rule_baseline, split_seed
from bascule.plugins.tasks.truths import Truths, kept_truths
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Verdict

NAME = "gpqa"
LAYOUT = "1"


def question(text: str, options: Mapping[str, str]) -> str:
    """A question with its options, a line each."""
    lines = [f"{letter}. {options[letter]}" for letter in LETTERS]
    return "\n".join([text.strip(), "", *lines, "", "Answer with one letter, A, B, C or D:"])


def example_of(identity: str, group: str, text: str, options: Mapping[str, str]) -> Example:
    """A question as agents see it."""
    ordered = {letter: options[letter] for letter in LETTERS}
    return Example(id=identity, group=group, input={"question": question(text, ordered), "options": ordered})


def by_length(order: Callable[..., str]) -> Callable[[Example], str]:
    """The letter of the longest or shortest option (``max`` or ``min``), of equal ones the first."""
    return lambda e: order(LETTERS, key=lambda letter: len(e.input["options"][letter]))


def truths(seed: int) -> Truths:
    """The letters by split and question; for the scoring process."""
    made = practice(seed)
    private = sia_data.records(NAME, "private/diamond_questions.json")
    return {
        **{split: {p.id: p.letter for p in found} for split, found in made.items()},
        "sealed": {f"gpqa-{item['id']}": item["correct_answer_letter"] for item in private},
    }


class GPQAPrivate:
    """Holds the letters; opened in the scoring process only."""

    def __init__(self, held: Truths) -> None:
        self._truths = held

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the stripped answer is exactly the right capital letter; anything but one of A to D is ill-formed.

        Raises:
            KeyError: the split has no such question.
        """
        truth = self._truths[split][example]
        text = "" if answer is None else answer.strip()
        return Scored(reward=float(text == truth), passed=text == truth, well_formed=text in LETTERS)


class GPQA:
    """The task ``gpqa``. Parameter: ``split_seed`` (0) of the practice questions."""

    name = NAME
    summary = "GPQA diamond: 198 multiple-choice questions in physics, chemistry and biology; restricted"
    wheels = (sia_data.WHEEL,)

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params)

    def public(self) -> PublicFace:
        made = practice(self.seed)
        items = sia_data.records(NAME, "public/diamond_questions.json")

        def examples(found: Sequence[Practice]) -> tuple[Example, ...]:
            return tuple(example_of(p.id, p.group, p.text, p.options) for p in found)

        return PublicFace(
            name=self.name,
            version="1",
            description=(
                "Multiple-choice questions with the options A, B, C and D, one of which is right. The answer is that "
                "letter and nothing else. The sealed questions are GPQA diamond: physics, chemistry and biology at the "
                "level of a doctorate. Train and dev are short problems of the same form that code makes (school "
                "physics, chemistry, genetics and arithmetic): a score on dev says how well the form is kept and how "
                "well sums are done, not how well GPQA will go."
            ),
            train=examples(made["train"]),
            answers={p.id: p.letter for p in made["train"]},
            dev=examples(made["dev"]),
            sealed=tuple(
                example_of(f"gpqa-{item['id']}", f"gpqa-{item['id']}", item["Question"], item["options"])
                for item in items
            ),
            max_answer_tokens=2,
            source=f"GPQA diamond (Rein et al., arXiv:2311.12022) in {sia_data.FOUND_IN}; train, dev: this task's code",
            licence="GPQA is CC BY 4.0, its authors ask not to publish its questions in plain text; the wheel is MIT",
            allows=Allows(),
            restricted=True,
        )

    def private(self) -> GPQAPrivate:
        name = sia_data.kept_name(self.name, LAYOUT, self.seed)
        return GPQAPrivate(kept_truths(self.name, name, partial(truths, self.seed)))

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat",
            system_prompt="Choose the right option. Answer with its letter only.",
            params={"form": "chat", "extract": {"choice": list(LETTERS)}, "max_tokens": 8},
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """Each letter for all, the longest option, and the shortest."""
        return (
            *(constant_baseline(f"all-{letter}", public, letter) for letter in LETTERS),
            rule_baseline("longest-option", public, by_length(max)),
            rule_baseline("shortest-option", public, by_length(min)),
        )

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 32, "train_samples": 4}, "max_generations": 2}
