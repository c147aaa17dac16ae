"""Training again from the log: the same adapter, whatever happened to the trainer while it was made."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_kill import kill_everything


@pytest.fixture(scope="module")
def generation(recorded: dict[str, Any]) -> str:
    """The generation of the recorded run that trained with grpo."""
    return next(str(g["generation"]) for g in recorded["report"]["generations"] if g["algorithm"] == "grpo")


def published(world: Any, run: str, home: str = "home") -> dict[str, Any]:
    """What the run published first."""
    lines = world.bascule("log", run, "--type", "adapter.published", "--json", home=home).stdout.split("\n")
    found: dict[str, Any] = json.loads(lines[0])["data"]
    return found


def test_the_logged_trajectories_give_the_same_adapter_again_and_the_log_stays_as_it_is(
    world: Any, generation: str
) -> None:
    before = world.bascule("log", "live", "--json").stdout
    event = world.json("explain", "live", f"train.g{int(generation):02d}.requested")["id"]
    text = world.bascule("train", "live", "--request", event).stdout
    adapter = published(world, "live")
    assert f"the same adapter: {adapter['sha256']}" in text
    assert text.count("  same\n") == adapter["iterations"] == 3
    assert world.bascule("log", "live", "--json").stdout == before
    assert adapter["base"]
    assert adapter["data_digest"]
    assert adapter["metrics"]["trained_tokens"] > 0


def test_another_thread_count_is_said_with_the_distance(world: Any, generation: str) -> None:
    done = world.bascule("train", "live", "--request", generation, "--threads", "2")
    assert "2 thread(s), where 1 are recorded" in done.stdout
    assert re.search(
        r"adapter: [0-9a-f]{64}.*; largest difference [0-9.e-]+, relative L2 distance [0-9.e-]+\n", done.stdout
    )


def test_another_algorithm_trains_the_same_samples(world: Any, generation: str) -> None:
    text = world.bascule("train", "live", "--request", generation, "--algorithm", "best_of_n").stdout
    assert "with grpo from" in text
    assert "now with best_of_n, on the samples of the recorded job's own adapters" in text
    assert text.count("\n  update ") == 3
    adapter = re.search(r"the adapter: ([0-9a-f]{64}), of best_of_n; there is none to compare it with", text)
    assert adapter is not None
    assert adapter[1] != published(world, "live")["sha256"]


def test_a_job_that_is_not_there_lists_those_that_are(world: Any, generation: str) -> None:
    done = world.bascule("train", "live", "--request", "0", ok=False)
    assert done.returncode == 3
    assert f"generation {generation} (grpo)" in done.stderr


def test_progress_is_told_and_is_no_event(world: Any, generation: str) -> None:
    text = world.bascule("log", "live", "--telemetry").stdout
    assert f"train.g{int(generation):02d}.step" in text
    assert "loss=" in text
    lines = [json.loads(line) for line in world.bascule("log", "live", "--telemetry", "--json").stdout.splitlines()]
    assert [line["iteration"] for line in lines] == sorted(line["iteration"] for line in lines)
    assert {"loss", "grad_norm"} <= set(lines[-1]["figures"])
    assert "telemetry" not in world.bascule("log", "live").stdout


def wait_for_update(home: Path, iteration: int, process: subprocess.Popen[bytes]) -> None:
    """Until the trainer of the run ``same`` has begun the update."""
    path = home / "runs" / "same" / "services.jsonl"
    while not (path.exists() and begun(path, iteration)):
        assert process.poll() is None
        time.sleep(0.001)


def begun(path: Path, iteration: int) -> bool:
    lines = [line for line in path.read_text().splitlines() if "update.started" in line]
    return any(f'"iteration": {iteration},' in line for line in lines)


@pytest.mark.parametrize("iteration", [0, 1])
def test_a_training_that_is_killed_in_an_update_makes_the_adapter_of_one_that_is_not(
    world: Any, recorded: dict[str, Any], generation: str, iteration: int
) -> None:
    """SIGKILL of everything, then a resume; and trained again in one go from what was logged."""
    home = f"killed-{iteration}"
    process = subprocess.Popen(
        world.command(*world.cassette_run(recorded["cassette"])),
        env=world.environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_update(world.root / home, iteration, process)
    finally:
        kill_everything(process)
    world.bascule("resume", "same", home=home)
    assert f"train.g{int(generation):02d}.started-002" in world.bascule("log", "same", home=home).stdout
    found = world.json("train", "same", "--request", generation, home=home)
    assert found["same"] is True
    final = published(world, "same", home)["sha256"]
    assert found["iterations"][-1]["sha256"] == final == published(world, "live")["sha256"]
