"""``python -m tests.simulation``: play schedules, or one of them with its trace; the exit status is 1 if one broke."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec

from tests.simulation.batch import Sums, batches
from tests.simulation.invariants import broken
from tests.simulation.schedule import play

_SHOWN = 20


def show(seed: int) -> int:
    """Print one schedule."""
    found = play(seed)
    print(msgspec.json.format(msgspec.json.encode(found.plan), indent=2).decode())
    print("\n".join(found.trace))
    problems = broken(found)
    print(f"{len(found.events)} events, {found.seconds:.1f} virtual seconds; {len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one and print its trace")
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return show(options.seed)
    sums = Sums()
    for part in batches(options.first, options.schedules, options.jobs):
        sums += part
        for seed, problem in part.failing[:_SHOWN]:
            print(f"seed {seed}: {problem}\n  python -m tests.simulation --seed {seed}", flush=True)
    print(
        f"{sums.schedules} schedules, {sums.events} events, {sums.effects} effects, "
        f"{sums.virtual_seconds:.0f} virtual seconds: {len(sums.failing)} failed"
    )
    return 1 if sums.failing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
