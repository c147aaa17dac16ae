"""Many schedules, in several processes."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import msgspec

from tests.simulation.invariants import broken
from tests.simulation.schedule import calm, play


class Sums(msgspec.Struct, frozen=True):
    """What several schedules came to."""

    schedules: int = 0
    events: int = 0
    effects: int = 0
    virtual_seconds: float = 0.0
    failing: tuple[tuple[int, str], ...] = ()

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.schedules + other.schedules,
            self.events + other.events,
            self.effects + other.effects,
            self.virtual_seconds + other.virtual_seconds,
            self.failing + other.failing,
        )


def played(seeds: range) -> Sums:
    """Play the schedules of ``seeds``."""
    calm()
    # What lives so far lives for good; the collector need not look at it again.
    gc.freeze()
    sums = Sums()
    for seed in seeds:
        found = play(seed)
        problems = broken(found)
        failing = ((seed, problems[0]),) if problems else ()
        sums += Sums(1, len(found.events), found.effects, found.seconds, failing)
    return sums


def batches(first: int, count: int, jobs: int) -> Iterator[Sums]:
    """Play ``count`` schedules in ``jobs`` processes; sums as they come."""
    parts = [range(i, min(i + 50, first + count)) for i in range(first, first + count, 50)]
    if jobs == 1:
        yield from map(played, parts)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(played, part) for part in parts]):
            yield done.result()
