"""Work of two kinds is never under way at one time, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

from bascule.runtime.engines.phases import Phases


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
        for task in rng.sample(tasks, 10):
            task.cancel()
        async with asyncio.timeout(60):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)]
        most = max(r for r in results if isinstance(r, int))
        assert most > 1  # of one kind, several at a time
        async with asyncio.timeout(60), phases.of("a"):
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
