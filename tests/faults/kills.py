"""kill -9 of each service, and of the command line, at every moment of the append of every type of event."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bascule.schemas.events import KNOWN_TYPES, LeverChosen
from tests.faults.fault import Outcome, Setting
from tests.faults.fleet import SERVICES, Fleet, alone, fleet, run_name, site
from tests.faults.launcher import MOMENTS, Injection, Point, lines_of
from tests.faults.verdict import CALLS, LEDGER, both, judged

_POINTS = "points.jsonl"


async def kill_services(setting: Setting) -> Outcome:
    """At most ``count`` points: first in a run with the seed, then, with what is left, in one with the next seed.

    What happens once in a run is killed before it and while its acknowledgement comes in the first run, and after it in
    the second one. A whole round (all points) also kills the commands, and covers every type.
    """
    home, seeds = setting.folder / "home", (setting.seed, setting.seed + 1)
    home.mkdir()
    points, calls = home / _POINTS, home / CALLS
    injection = Injection(points=str(points), kills=setting.count, ledger=str(home / LEDGER))
    whole = setting.count > 100
    found: list[Outcome] = []
    async with fleet(home, SERVICES, lambda _: injection, GAUNTLET_CALLS=str(calls)) as system:
        for seed in seeds if whole else seeds[:1]:
            before = len(lines_of(points, Point))
            name = run_name(seed)
            asked = asyncio.create_task(_pause(system, name, injection)) if whole else None
            report = await system.completed(name, seed, injection)
            if asked is not None:
                await asked
            events = await system.events(name)
            found.append(judged(report, events, home, injected=len(lines_of(points, Point)) - before))
            setting.say(f"{name}: {found[-1].injected} points, {system.restarts} restarts so far")
            if whole:
                await _end_otherwise(system, seed, injection)
        restarts = system.restarts
    if whole:
        for seed in seeds:
            found[-1] = both(found[-1], await _afterwards(home, seed, injection, points), note="")
    used = lines_of(points, Point)
    outcome = found[0] if len(found) == 1 else both(found[0], found[1])
    broken = uncovered(used) if whole else ()
    types = len({p.type for p in used})
    return Outcome(
        injected=len(used),
        lost=outcome.lost,
        duplicated=outcome.duplicated,
        equal=outcome.equal,
        broken=(*outcome.broken, *broken),
        note=f"{types} types, {restarts} restarts of services",
    )


async def _pause(system: Fleet, name: str, injection: Injection) -> None:
    await system.seen(name, lambda e: isinstance(e.data, LeverChosen))
    await system.insisting("pause", name, injection=injection)


async def _end_otherwise(system: Fleet, seed: int, injection: Injection) -> None:
    """A run whose first harness is not usable, and one that is paused, resumed under other code, and cancelled."""
    remote = ("--url", system.server.url)
    broken = site().run(f"broken-{seed}", seed, "--set", "task.broken=true")
    await system.insisting(*broken, *remote, injection=injection)
    await system.insisting("resume", f"broken-{seed}", *remote, "--json", injection=injection)
    name = f"cancelled-{seed}"
    started = asyncio.create_task(system.insisting(*site().run(name, seed), *remote, injection=injection))
    await system.seen(name, lambda e: e.envelope.type == "bascule.run.started")
    await system.insisting("pause", name, injection=injection)
    await started
    other = system.under(PYTHONPATH=str(site().altered))
    resumed = asyncio.create_task(
        other.insisting("resume", name, "--accept-changes", *remote, "--json", injection=injection)
    )
    await system.seen(name, lambda e: e.envelope.type == "bascule.run.runtime_changed")
    await system.insisting("cancel", name, injection=injection)
    await resumed


async def _afterwards(home: Path, seed: int, injection: Injection, points: Path) -> Outcome:
    """Commands that need the log for themselves, on a completed run: a fork, ablations, an erasure, the checks."""
    commands, name, broken, before = alone(home), run_name(seed), [], len(lines_of(points, Point))
    for attempt in range(4):
        fork = ("whatif", name, "--from", "4", "--set", "policy.endless=true", "--run-id", f"fork-{seed}-{attempt}")
        done = await commands.bascule(*fork, injection=injection)
        if not done.killed:
            break
    broken += [f"{fork}: {done.err}"] if done.code else []
    done = await commands.insisting("ablate", name, "--json", injection=injection)
    broken += [f"ablate {name}: {done.err}"] if done.code else []
    for check in ("replay", "verify"):
        done = await commands.bascule(check, name, "--json")
        broken += [f"{check} {name}: {done.out} {done.err}"] if done.code else []
    listed = await commands.bascule("blobs", "list", name)
    sha256 = next(line.split()[0] for line in listed.out.splitlines() if ".logged" in line)
    done = await commands.insisting("blobs", "erase", name, sha256, "--reason", "asked for", injection=injection)
    broken += [f"erase {name}: {done.err}"] if done.code else []
    done = await commands.bascule("verify", name)
    broken += [f"verify {name} after the erasure: {done.out} {done.err}"] if done.code else []
    return Outcome(injected=len(lines_of(points, Point)) - before, equal=True, broken=tuple(broken))


def uncovered(used: list[Point]) -> tuple[str, ...]:
    """Types that nobody was killed at, and moments that were not reached."""
    missing = [f"no kill at {t}" for t in sorted(KNOWN_TYPES - {p.type for p in used})]
    reached = {
        (p.service, p.type): {q.moment for q in used if (q.service, q.type) == (p.service, p.type)} for p in used
    }
    return (*missing, *(f"{w}: only {sorted(m)}" for w, m in sorted(reached.items()) if m != set(MOMENTS)))
