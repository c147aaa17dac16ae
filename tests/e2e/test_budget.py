"""A budget over whole runs: at tokens, within a training job, killed and resumed; and what they cost by the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_kill import kill_and_resume


@pytest.fixture(scope="module")
def whole(world: Any, unkilled: dict[str, Any]) -> dict[str, Any]:
    """The cost of the run that no budget bounds."""
    del unkilled
    found: dict[str, Any] = world.json("cost", "same", home="unkilled")
    return found


def tokens(cost: dict[str, Any], generations: int) -> int:
    """Of the loop's first generations."""
    rows = [r for r in cost["rows"] if r["part"] != "stop" and r["generation"] < generations]
    return sum(r["prompt_tokens"] + r["output_tokens"] for r in rows)


def test_the_cost_of_a_run_is_that_of_its_report_and_of_its_export(
    world: Any, unkilled: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    total = whole["total"]
    assert total["prompt_tokens"] + total["output_tokens"] == unkilled["tokens"]
    assert {r["service"] for r in whole["services"]} >= {"rollout", "verifier", "trainer"}
    assert {r["part"] for r in whole["rows"]} == {None, "harness", "weights", "stop"}
    assert whole["lacks"] == []
    assert total["seconds"] > 0
    assert total["gpu_seconds"] == 0
    export = tmp_path / "same.tar"
    world.bascule("export", "same", "-o", str(export), home="unkilled")
    assert world.json("cost", str(export), home="elsewhere") == whole
    text = world.bascule("cost", "same", home="unkilled").stdout
    for part in ("sealed split", "first harness", "trainer", "the feedback agent itself", "no prices are given"):
        assert part in text


def test_a_run_that_is_killed_stops_at_its_tokens_as_one_that_is_not(
    world: Any, recorded: dict[str, Any], whole: dict[str, Any]
) -> None:
    bound = tokens(whole, 2)
    command = [*world.cassette_run(recorded["cassette"]), "--set", f"budget.tokens={bound}"]
    report = world.json(*command, home="bounded")
    assert report["status"] == "completed"
    assert report["reason"] == f"budget: {bound:,} of {bound:,} tokens spent"
    assert [g["generation"] for g in report["generations"]] == [0, 1]
    assert [(b["spent"], b["left"]) for b in report["budget"]] == [(bound, 0)]
    events = report["events"]
    killed = kill_and_resume(world, "bounded-killed", command, "same", [events // 4, events // 2, events * 3 // 4])
    assert killed["decision_hash"] == report["decision_hash"]
    for home in ("bounded", "bounded-killed"):
        assert world.json("replay", "same", home=home)["differences"] == []
        assert world.json("verify", "same", home=home)["faults"] == []
    cost = world.json("cost", "same", home="bounded-killed")
    assert cost["loop"]["rollouts"] == sum(r["rollouts"] for r in whole["rows"] if r["generation"] < 2)
    said = world.bascule("explain", "same", "2", home="bounded").stdout
    assert "the run's budget chose stop" in said
    assert "0 left" in said
    assert "tokens spent" in world.bascule("cost", "same", home="bounded").stdout


def test_a_training_job_publishes_what_its_levers_budget_allowed(
    world: Any, recorded: dict[str, Any], unkilled: dict[str, Any], whole: dict[str, Any]
) -> None:
    first = next(g["generation"] for g in unkilled["generations"] if g["lever"] == "weights")
    rollouts = next(r["rollouts"] for r in whole["rows"] if (r["generation"], r["service"]) == (first, "rollout"))
    assert rollouts > 1
    command = [*world.cassette_run(recorded["cassette"]), "--set", "budget.levers.weights.rollouts=1"]
    report = world.json(*command, home="one-update")
    lines = world.bascule("log", "same", home="one-update").stdout.splitlines()
    assert len([x for x in lines if f"g{first:02d}" in x and "adapter.checkpointed" in x]) == 1
    assert len([x for x in lines if f"g{first:02d}" in x and "adapter.published" in x]) == 1
    assert report["status"] == "completed"
    assert [g["lever"] for g in report["generations"]].count("weights") == 1
    assert world.json("replay", "same", home="one-update")["differences"] == []
