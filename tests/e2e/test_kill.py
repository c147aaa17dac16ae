"""kill -9 of everything at random moments: nothing that the log holds is done again, and the decisions are the same."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

from bascule.runtime.cli.store import open_store
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import attach
from bascule.runtime.state import RunState
from bascule.schemas.errors import LogError


async def reached(home: Path, run: str, target: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the run's log holds ``target`` events; False if the process ended before that."""
    while process.poll() is None:
        connection = attach(home)
        if connection is None:
            await asyncio.sleep(0.01)
            continue
        try:
            log = await NatsLog.connect(connection.url, user=connection.user, password=connection.password)
        except LogError:  # the server is starting, or its log is yet to be made
            await asyncio.sleep(0.01)
            continue
        try:
            count = 0
            async for _ in log.follow(f"bascule.{run}.>"):
                count += 1
                if count >= target:
                    return True
                if process.poll() is not None:
                    return False
        except LogError:
            await asyncio.sleep(0.01)
        finally:
            await log.close()
    return False


def children_of(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found |= {child} | children_of(child)
    return found


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process and every descendant."""
    everyone = {process.pid} | children_of(process.pid)
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def kill_and_resume(world: Any, home: str, start: list[str], run: str, targets: list[int]) -> dict[str, Any]:
    """Start a run, kill it as its log reaches each target, resume it each time, and let the last one end."""
    arguments = start
    for target in targets:
        process = subprocess.Popen(
            world.command(*arguments),
            env=world.environment(home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert asyncio.run(reached(world.root / home, run, target, process)), f"ended before event {target}"
        finally:
            kill_everything(process)
        arguments = ["resume", run]
    report: dict[str, Any] = world.json(*arguments, home=home)
    return report


async def live_and_folded(home: Path, run: str) -> tuple[str, str]:
    """Digests of the state that the last serving process held when it let go, and of a fold of the log to there."""
    lines = (home / "runs" / run / "services.jsonl").read_text().splitlines()
    left = json.loads([line for line in lines if '"run.left"' in line][-1])
    async with open_store(home) as store:
        folded = RunState.of(run, [e for e in await store.events(run) if e.seq <= left["seq"]])
    assert folded.end is not None
    return left["state"], hashlib.blake2b(folded.digest(), digest_size=16).hexdigest()


def test_twenty_kills_repeat_nothing_and_change_no_decision(
    world: Any, recorded: dict[str, Any], unkilled: dict[str, Any]
) -> None:
    rng = random.Random(11)
    # The last process must have work left: only one that lets go by itself writes down the state that it held.
    targets = sorted(rng.sample(range(2, unkilled["events"] * 4 // 5), 20))
    print(f"kills at events {targets} of {unkilled['events']}")
    report = kill_and_resume(world, "killed", world.cassette_run(recorded["cassette"]), "same", targets)
    assert report["decision_hash"] == unkilled["decision_hash"]
    assert report["repeated_rollouts"] == 0
    assert report["repeated_updates"] == 0
    assert world.json("replay", "same", home="killed")["differences"] == []
    assert world.json("verify", "same", home="killed")["faults"] == []
    live, folded = asyncio.run(live_and_folded(world.root / "killed", "same"))
    assert live == folded
