"""Auditing a finished run as its user does: forks, exports, dead letters, hash seeds, other code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def weights_step(recorded: dict[str, Any]) -> int:
    """The step at which the recorded run trained with grpo."""
    return next(int(g["generation"]) for g in recorded["report"]["generations"] if g["algorithm"] == "grpo")


def test_a_whatif_with_another_algorithm_stops_at_its_training_and_leaves_the_run_as_it_was(
    world: Any, recorded: dict[str, Any], weights_step: int
) -> None:
    del recorded
    before = world.bascule("log", "live", "--json").stdout
    arguments = ("whatif", "live", "--from", str(weights_step), "--set", "policy.algorithm=best_of_n")
    made = world.json(*arguments)
    assert (made["recorded"]["algorithm"], made["decided"]["algorithm"]) == ("grpo", "best_of_n")
    assert "with best_of_n" in made["stopped_at"]
    assert world.bascule("log", "live", "--json").stdout == before
    fork = made["run"]
    assert world.json("replay", fork)["differences"] == []
    assert world.json("verify", fork)["faults"] == []
    assert world.json("status", fork)["status"] == "paused"
    forked = [
        json.loads(line)
        for line in world.bascule("log", fork, "--type", "run.forked", "--json").stdout.split("\n")
        if line
    ]
    assert forked[0]["data"]["run"] == "live"
    done = world.json("resume", fork)
    assert done["status"] == "completed"
    assert "best_of_n" in {g["algorithm"] for g in done["generations"]}
    assert world.json("replay", fork)["differences"] == []
    assert world.bascule("log", "live", "--json").stdout == before


@pytest.mark.parametrize("seed", range(10))
def test_replay_finds_no_difference_whatever_the_hash_seed(world: Any, recorded: dict[str, Any], seed: int) -> None:
    done = subprocess.run(
        world.command("replay", "live", "--json"),
        env={**world.environment("home"), "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["differences"] == []
    assert result["decision_hash"] == recorded["report"]["decision_hash"]


def test_an_export_names_the_changed_reward_and_the_dropped_event(
    world: Any, recorded: dict[str, Any], tmp_path: Path
) -> None:
    del recorded
    folder = tmp_path / "export"
    world.bascule("export", "live", "--to", str(folder))
    events = folder / "events.jsonl"
    whole = events.read_bytes()
    lines = whole.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"bascule.trajectory.scored"' in line)
    changed = lines[at].replace(b'"reward":0.0', b'"reward":9.0').replace(b'"reward":1.0', b'"reward":9.0')
    assert changed != lines[at]
    subject = json.loads(lines[at])["subject"]
    events.write_bytes(b"".join([*lines[:at], changed, *lines[at + 1 :]]))
    found = world.bascule("verify", str(folder), "--json", ok=False)
    assert found.returncode == 2
    assert subject in {f["subject"] for f in json.loads(found.stdout)["faults"]}
    events.write_bytes(b"".join(lines[:-1]))
    found = world.bascule("verify", str(folder), ok=False)
    assert found.returncode == 2
    assert "anchor is ahead" in found.stdout
    events.write_bytes(whole)
    assert world.bascule("verify", str(folder)).returncode == 0


def test_an_imported_run_is_equal_and_replays_where_nothing_else_is(world: Any, recorded: dict[str, Any]) -> None:
    del recorded
    with subprocess.Popen(
        world.command("export", "live"), env=world.environment("home"), stdout=subprocess.PIPE
    ) as exporting:
        done = subprocess.run(
            world.command("import", "-"), env=world.environment("elsewhere"), stdin=exporting.stdout, check=False
        )
    assert (exporting.returncode, done.returncode) == (0, 0)
    equal = world.bascule("diff", "live", "live", "--other-home", str(world.root / "home"), home="elsewhere")
    assert "equal" in equal.stdout
    assert world.json("replay", "live", home="elsewhere")["differences"] == []
    assert world.json("verify", "live", home="elsewhere")["faults"] == []


def test_other_code_is_refused_or_recorded(world: Any, recorded: dict[str, Any]) -> None:
    """The plugin changes while the run is paused."""
    home, plugin = "changed", world.root / "site" / "bascule_parity.py"
    run = [*world.cassette_run(recorded["cassette"])]
    process = subprocess.Popen(world.command(*run), env=world.environment(home), stderr=subprocess.DEVNULL)
    while not (world.root / home / "server.json").exists():
        assert process.poll() is None
    while "same" not in world.bascule("status", home=home, ok=False).stdout:
        assert process.poll() is None
    world.bascule("pause", "same", home=home)
    process.wait()
    original = plugin.read_text()
    try:
        plugin.write_text(original + "\n# another version of it\n")
        refused = world.bascule("resume", "same", home=home, ok=False)
        assert refused.returncode == 3
        assert "task parity" in refused.stderr
        assert "--accept-changes" in refused.stderr
        report = world.json("resume", "same", "--accept-changes", home=home)
        assert report["status"] == "completed"
        assert "bascule.run.runtime_changed" in world.bascule("log", "same", home=home).stdout
    finally:
        plugin.write_text(original)
    assert world.json("replay", "same", home=home)["differences"] == []


def test_explain_answers_for_a_step_and_for_any_event(world: Any, recorded: dict[str, Any], weights_step: int) -> None:
    del recorded
    text = world.bascule("explain", "live", str(weights_step)).stdout
    for part in ("chose weights with grpo", "Also feasible, and not chosen", "on dev", "because of", "policy rules 3"):
        assert part in text
    gate = world.json("explain", "live", "candidate.g00.gate")
    assert gate["type"] == "bascule.candidate.promoted"
    assert gate["causes"][-1]["type"] == "bascule.run.started"
