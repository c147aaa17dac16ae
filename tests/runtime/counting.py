"""A task whose scorer looks at whole episodes and can run programs: it counts model calls, once by way of a program."""

from __future__ import annotations

import json
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.sandbox import Program, Programs
from bascule.plugins.tasks.arith import Arith
from bascule.schemas.events import Split
from bascule.schemas.trajectory import ModelCall, Note, Scored, Trajectory, Verdict

#: Episodes about sums ask twice, and those that begin with a 1 are long.
HARNESS = """
def solve(example, model, tools, context):
    question = example["question"]
    if question.startswith("1"):
        context.note("long " * 15000)
    said = model.chat([{"role": "user", "content": question}])[0].text
    if "+" in question:
        said = model.chat([{"role": "user", "content": question}])[0].text
    return said
"""


class Counter:
    def __init__(self) -> None:
        self._programs: Programs | None = None

    def use(self, programs: Programs) -> None:
        self._programs = programs

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        raise AssertionError("episodes are scored")

    def score_episode(self, split: Split, example: str, episode: Trajectory) -> Verdict:
        calls = sum(isinstance(step, ModelCall) for step in episode.steps)
        long = any(isinstance(step, Note) and len(step.text) > 60_000 for step in episode.steps)
        if split == "sealed":
            assert self._programs is not None
            source = f"print({calls} * 2)".encode()
            ran = self._programs.run(Program(files={"main.py": source}, arguments=("main.py",)))
            return Scored(reward=float(ran.stdout), passed=long)
        # Of a difference the scorer says too much.
        given = calls + (example.startswith("sub") and split == "dev")
        return Scored(reward=float(calls), passed=long, steps=(1.0,) * given)


class Counting(Arith):
    name = "counting"
    summary = "sums, scored by how often the model was asked"

    def private(self) -> Counter:  # type: ignore[override]
        return Counter()

    def harness(self) -> dict[str, str]:
        return {
            "harness.py": HARNESS,
            "manifest.json": json.dumps({"name": "twice"}),
            "system_prompt.md": "",
        }

    def defaults(self) -> dict[str, Any]:
        return {}


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("counting", Counting, version="1")
