"""Work of two kinds is never under way at one time, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.engines.phases import Door, Phases
from bascule.schemas.errors import EngineError


async def some_given_up(tasks: Sequence[asyncio.Task[Any]], many: int, rng: random.Random) -> list[Any]:
    """What comes of tasks some of which are cancelled now; all end, and none fails."""
    for task in rng.sample(tasks, many):
        task.cancel()
    async with asyncio.timeout(60):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [r for r in results if isinstance(r, Exception)]
    return results


async def test_kinds_exclude_each_other_and_everybody_gets_in_or_away() -> None:
    for seed in range(50):
        rng, phases, inside, most = random.Random(seed), Phases(), [], 0

        async def work(kind: str, rests: int, phases: Phases = phases, inside: list[str] = inside) -> int:
            for _ in range(rests):
                await asyncio.sleep(0)
            async with phases.of(kind):
                inside.append(kind)
                assert len(set(inside)) == 1
                count = len(inside)
                try:
                    for _ in range(rests):
                        await asyncio.sleep(0)
                finally:
                    inside.remove(kind)
            return count

        tasks = [asyncio.create_task(work(rng.choice("ab"), rng.randrange(6))) for _ in range(40)]
        for _ in range(4):
            await asyncio.sleep(0)
        results = await some_given_up(tasks, 10, rng)
        most = max(r for r in results if isinstance(r, int))
        assert most > 1  # of one kind, several at a time
        async with asyncio.timeout(60), phases.of("a"):
            pass


async def test_processes_take_turns_at_a_shared_door(tmp_path: Path) -> None:
    inside: list[tuple[int, str]] = []
    most = 0

    async def work(process: int, phases: Phases, kind: str, rests: int) -> None:
        nonlocal most
        for _ in range(rests):
            await asyncio.sleep(0)
        async with phases.of(kind):
            inside.append((process, kind))
            most = max(most, len(inside))
            assert len(set(inside)) == 1
            try:
                await asyncio.sleep(0.002)
            finally:
                inside.remove((process, kind))

    rng = random.Random(1)
    # A file that is opened twice has two locks, as if it were by two processes.
    shared = [Phases(Door(tmp_path / "replica.lock")) for _ in range(3)]
    tasks = [
        asyncio.create_task(work(i, phases, rng.choice("ab"), rng.randrange(50)))
        for i, phases in enumerate(shared)
        for _ in range(60)
    ]
    await asyncio.sleep(0.02)
    await some_given_up(tasks, 20, rng)
    assert most > 3
    assert inside == []
    async with asyncio.timeout(60):
        for phases in shared:
            async with phases.of("a"):
                pass
    for phases in shared:
        phases.close()


async def test_one_that_is_always_busy_lets_another_process_in(tmp_path: Path) -> None:
    busy, other = (Phases(Door(tmp_path / "replica.lock")) for _ in range(2))
    over = False

    async def without_end() -> None:
        while not over:
            async with busy.of("a"):
                await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(without_end()) for _ in range(4)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        for _ in range(3):
            async with other.of("b"):
                pass
    over = True
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    busy.close()
    other.close()


async def test_a_door_that_cannot_be_locked_is_the_engines_error(tmp_path: Path) -> None:
    door = Door(tmp_path / "replica.lock")
    phases = Phases(door)
    door.close()
    with pytest.raises(EngineError, match="shared with other workers"):
        async with phases.of("a"):
            pass


async def test_who_waits_is_not_passed_by_those_of_the_kind_that_is_in() -> None:
    phases, order = Phases(), []
    release = asyncio.Event()

    async def work(kind: str, name: str) -> None:
        async with phases.of(kind):
            order.append(name)
            await release.wait()

    tasks = []
    for kind, name in (("a", "first"), ("b", "second"), ("a", "third")):
        tasks.append(asyncio.create_task(work(kind, name)))
        await asyncio.sleep(0)
    assert order == ["first"]
    release.set()
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    assert order == ["first", "second", "third"]
