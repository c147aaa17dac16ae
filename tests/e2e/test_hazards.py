"""What a run must not be led astray by: a task on which every edit of the harness only hurts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.plugin_site import install_plugin

#: An answer is right by a sum over its characters and those of the question's name: a model without any sense is right
#: every now and then, and may learn to be so more often.
TASK = """
DESCRIPTION = "Answer with something odd."
MAX_ANSWER_TOKENS = 3
SIZES = {"train": 24, "dev": 40, "sealed": 40}

def items(split):
    return [{"id": f"{split}-{n}", "question": f"{split} {n} =", "answer": "b"} for n in range(SIZES[split])]

def verify(item, answer):
    return answer != "spoilt" and sum(map(ord, item["id"] + answer)) % 2 == 0
"""
#: Edits after which no answer is right.
SPOILER = """
from bascule.plugins import hookimpl
from bascule.plugins.policy import HarnessEdit

class Spoiler:
    name, version = "spoiler", "1"

    def step(self, given, results):
        code = f"def solve(example, model, tools, context):\\n    return 'spoilt'  # {given.generation}\\n"
        return HarnessEdit(files={**given.harness.files, "harness.py": code}, edit=f"spoilt {given.generation}")

    def edits_left(self, harness, tried):
        return None

@hookimpl
def bascule_register(registry):
    registry.author("spoiler", lambda params: Spoiler(), version="1")
"""


def test_where_every_edit_hurts_none_is_kept_and_the_weights_have_their_turn(world: Any, tmp_path: Path) -> None:
    install_plugin(tmp_path, "spoiler", SPOILER)
    task = tmp_path / "odd.py"
    task.write_text(TASK)
    spoilt = dataclasses.replace(world, env={**world.env, "PYTHONPATH": f"{world.env['PYTHONPATH']}:{tmp_path}"})
    report = spoilt.json(
        *("run", "--task", str(task), "--model", str(world.model), "--seed", "3", "--run-id", "spoilt"),
        *("--author", "spoiler", "--max-gen", "4", "--set", "threads=1"),
        *("--set", "evaluation.train_groups=12", "--set", "evaluation.train_samples=4"),
        *("--set", "algorithms.grpo.steps=2", "--set", "algorithms.grpo.groups=6"),
        home="spoilt",
    )
    assert report["status"] == "completed"
    first, *later = report["generations"]
    edits = [g for g in later if g["lever"] == "harness"]
    assert edits
    assert all(g["outcome"] == "rejected" and g["dev"] == 0 for g in edits)
    assert first["dev"] > 0
    assert min(g["generation"] for g in later if g["lever"] == "weights") <= 3
    kept = [g for g in report["generations"] if g["promoted"]][-1]
    assert kept["harness"] == first["harness"]
    assert report["sealed"]["after"] > 0
