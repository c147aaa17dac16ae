"""Nightly: SmolLM2 itself, killed at random moments and resumed, five times over."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.e2e.test_kill import kill_and_resume, live_and_folded

#: A run of some 2,200 events that pulls both levers.
START = [
    *("run", "--task", "arith", "--run-id", "smol", "--max-gen", "2"),
    *("--set", "evaluation.dev_examples=60", "--set", "evaluation.sealed_examples=40"),
    *("--set", "evaluation.train_groups=16", "--set", "evaluation.train_samples=4"),
    *("--set", "algorithms.grpo.steps=4", "--set", "algorithms.grpo.groups=12"),
]
EVENTS = 1200
KILLS = 6


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_runs_of_the_real_model_repeat_nothing(world: Any, seed: int) -> None:
    home = f"smol-{seed}"
    targets = sorted(random.Random(seed).sample(range(2, EVENTS), KILLS))
    report = kill_and_resume(world, home, [*START, "--seed", str(seed)], "smol", targets)
    assert report["status"] == "completed"
    assert (report["repeated_rollouts"], report["repeated_updates"]) == (0, 0)
    replayed = world.json("replay", "smol", home=home)
    assert replayed["differences"] == []
    assert world.json("verify", "smol", home=home)["faults"] == []
    live, folded = asyncio.run(live_and_folded(world.root / home, "smol"))
    assert live == folded
    shown = {k: report[k] for k in ("seed", "events", "decision_hash", "repeated_rollouts", "repeated_updates")}
    print(json.dumps({**shown, "killed at": targets, "decisions": replayed["decisions"], "sealed": report["sealed"]}))
