"""Where blobs are kept changes no decision, and a collection after the run takes nothing that an audit needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def test_a_run_with_its_blobs_on_the_broker_is_the_same_run(
    world: Any, recorded: dict[str, Any], unkilled: dict[str, Any]
) -> None:
    there = replace(world, env=world.env | {"BASCULE_BLOBS": "nats"})
    report = there.json(*there.cassette_run(recorded["cassette"]), home="broker")
    assert report["decision_hash"] == unkilled["decision_hash"]
    assert not (world.root / "broker" / "blobs").exists()

    (found,) = there.json("blobs", "gc", "--grace", "0", home="broker")["runs"]
    assert found["kept"] > 0
    assert there.json("verify", "same", home="broker")["faults"] == []
    states = {b["state"] for b in there.json("blobs", "list", "same", home="broker")["blobs"]}
    assert "missing" not in states
    # Without its blobs the run is not intact.
    assert world.bascule("verify", "same", home="broker", ok=False).returncode == 2
