"""A plugin as somebody else would ship it: a task on which a model with random weights gets mixed rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.task import Baseline, Example, PublicFace
from bascule.plugins.tasks.harness_files import reference_files
from bascule.schemas.trajectory import Scored, Verdict

NAMES = {"train": 60, "dev": 12, "sealed": 12}


def examples(split: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{split}-{i}", group=f"{split}-{i}", input={"question": f"{split} {i} ="})
        for i in range(NAMES[split])
    )


class Private:
    def score(self, split: str, example: str, answer: str | None) -> Verdict:
        del split, example
        right = answer is not None and bool(answer) and ord(answer[0]) % 2 == 0
        return Scored(reward=float(right), passed=right, well_formed=bool(answer))


class Parity:
    name = "parity"
    summary = "answer with a first character of an even code point"

    def public(self) -> PublicFace:
        train = examples("train")
        return PublicFace(
            name=self.name,
            version="1",
            description=self.summary,
            train=train,
            answers={e.id: "bd"[i % 2] for i, e in enumerate(train)},
            dev=examples("dev"),
            sealed=examples("sealed"),
            max_answer_tokens=3,
            source="made by this plugin",
            licence="MIT",
        )

    def private(self) -> Private:
        return Private()

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat", system_prompt="Answer.", params={"form": "chat", "extract": "whole", "max_tokens": 3}
        )

    def tools(self, example: Example) -> dict[str, Any]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        return [Baseline(name="b", answers={s: {e.id: "b" for e in public.split(s)} for s in ("dev", "sealed")})]

    def defaults(self) -> dict[str, Any]:
        small = {"steps": 3, "groups": 6, "num_generations": 4, "lora_r": 4, "learning_rate": 0.01}
        return {
            # A recording answers the episodes of a run and not its trials.
            "author": {"name": "operators", "params": {"episodes": 0}},
            "evaluation": {"train_groups": 6, "train_samples": 4},
            "algorithms": {"grpo": small},
            "max_generations": 3,
        }


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("parity", lambda params: Parity(), version="1")
