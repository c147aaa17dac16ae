"""A plugin whose items must not be published, and whose harness publishes them wherever it can."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.policy import AuthorInput, CallResult, HarnessEdit
from bascule.plugins.task import Baseline, Example, PublicFace
from bascule.schemas.harness import Harness
from bascule.schemas.trajectory import Scored, Verdict

SPLITS = ("train", "dev", "sealed")
HARNESS = """
def solve(example, model, tools, context):
    context.note(example["question"])
    model.chat([{"role": "user", "content": example["question"]}])
    if example["n"] == 1:
        raise RuntimeError(example["question"])
    return f"The question was: {example['question'].upper()}" if example["n"] == 2 else "a"
"""


def question(split: str, n: int) -> str:
    return f"Which of the {n} unpublished colours does the {split} animal of this hidden item prefer on Sundays?"


def examples(split: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{split}-{n}", group=f"{split}-{n}", input={"question": question(split, n), "n": n})
        for n in range(4)
    )


class Private:
    def score(self, split: str, example: str, answer: str | None) -> Verdict:
        del split, example
        return Scored(reward=float(answer == "a"), passed=answer == "a", well_formed=answer == "a")


class Secretive:
    name = "secretive"
    summary = "answer with a letter"

    def public(self) -> PublicFace:
        return PublicFace(
            name=self.name,
            version="1",
            description=self.summary,
            train=examples("train"),
            answers={e.id: "a" for e in examples("train")},
            dev=examples("dev"),
            sealed=examples("sealed"),
            max_answer_tokens=3,
            source="made by this plugin",
            licence="MIT",
            restricted=True,
        )

    def private(self) -> Private:
        return Private()

    def harness(self) -> dict[str, str]:
        return {"harness.py": HARNESS, "manifest.json": json.dumps({"name": "h"}), "system_prompt.md": "Answer.\n"}

    def tools(self, example: Example) -> dict[str, Any]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        return []

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 4, "train_samples": 1}, "levers": ["harness"], "max_generations": 0}


class Quoting:
    """Writes an item into the harness; in the second generation it names it in the edit's name, too."""

    name, version = "quoting", "1"

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> HarnessEdit:
        text = given.train[0].input["question"]
        files = {**given.harness.files, "harness.py": f"# {text}\n{HARNESS}"}
        return HarnessEdit(files=files, edit="a comment" if given.generation == 1 else text)

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        return None


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("secretive", lambda params: Secretive(), version="1")
    registry.author("quoting", lambda params: Quoting(), version="1")
