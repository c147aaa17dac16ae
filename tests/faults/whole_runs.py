"""Whole runs under faults of their surroundings: paused processes, a killed server, wrong clocks, odd deliveries."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from bascule.runtime.log.access import embedded_access
from bascule.runtime.log.protocol import NewEvent
from bascule.schemas import subjects
from bascule.schemas.codec import decode, encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.landscape import Measured
from tests.faults.disk import ran
from tests.faults.fault import Outcome, Setting
from tests.faults.fleet import SERVICES, Fleet, alone, fleet, run_name, site
from tests.faults.launcher import Injection
from tests.faults.verdict import CALLS, LEDGER, judged
from tests.log.restarts import restart

_DAY = 86_400.0
#: By service: the type of event before whose append its process is paused, and the one at which it goes on.
PAUSES = (
    ("trainer", "bascule.adapter.checkpointed", "bascule.adapter.published"),
    ("rollout", "bascule.trajectory.logged", "bascule.lever.chosen"),
    ("verifier", "bascule.trajectory.scored", "bascule.lever.chosen"),
    ("feedback", "bascule.model.called", "bascule.harness.failed"),
)


async def _checked(system: Fleet, setting: Setting, name: str, *arguments: str) -> tuple[str, ...]:
    """Problems that ``replay`` finds."""
    done = await system.bascule("replay", name, "--json", *arguments)
    setting.say(f"{name}: {done.out.strip()[:100]}")
    return () if done.code == 0 else (f"replay {name}: {done.out} {done.err}",)


async def pause_services(setting: Setting) -> Outcome:
    """SIGSTOP of a service in its work, which a second process then does, and SIGCONT: one service a run."""
    found: list[Outcome] = []
    for service, stop, go_on in PAUSES[: setting.count]:
        home = setting.folder / service
        home.mkdir()
        name, refused, stopped = run_name(setting.seed), 0, home / "stopped"
        plain = Injection(ledger=str(home / LEDGER))
        pausing = structs.replace(plain, stop=stop, stopped=str(stopped))
        env = {"GAUNTLET_CALLS": str(home / CALLS)}
        each = {**dict.fromkeys(SERVICES, plain), service: pausing}
        async with fleet(home, SERVICES, each.__getitem__, **env) as system:
            running = asyncio.create_task(system.completed(name, setting.seed))
            await _until(stopped.exists)
            await system.begin(f"{service}-2", service, plain)
            woken = await system.seen(name, _of_type(go_on))
            system.send(service, signal.SIGCONT)
            report = await running
            events = await system.events(name)
        if service == "trainer":
            refused = (home / "runs" / name / "services.jsonl").read_text().count('"training.superseded"')
        broken = ["the stale trainer was not refused"] if service == "trainer" and refused == 0 else []
        found.append(judged(report, events, home, injected=1, broken=broken))
        setting.say(
            f"{service}: paused before its first {stop}, woken at event {woken.seq}; {refused} appends refused, "
            f"{found[-1].duplicated} effects repeated"
        )
    return summed(found, note=", ".join(s for s, _, _ in PAUSES[: setting.count]) + "; the stale trainer was refused")


def _of_type(type_: str) -> Callable[[Recorded], bool]:
    return lambda event: event.envelope.type == type_


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.05)


async def kill_server_of_run(setting: Setting) -> Outcome:
    """SIGKILL of the server, and its restart on the same store and port, at events spread over the run."""
    home, name = setting.folder / "home", run_name(setting.seed)
    home.mkdir()
    env = {"GAUNTLET_CALLS": str(home / CALLS)}
    async with fleet(home, SERVICES, lambda _: Injection(ledger=str(home / LEDGER)), **env) as system:
        running = asyncio.create_task(system.completed(name, setting.seed))
        targets = sorted(setting.rng("server").sample(range(10, 300), setting.count))
        for target in targets:
            first = system.server.home  # the store stays where it is
            await system.seen(name, _counting(target))
            os.kill(system.server.pid, signal.SIGKILL)
            await asyncio.to_thread(restart, system.server)
            assert system.server.home == first
        report = await running
        setting.say(f"killed the server at events {targets} of {report['events']}; {system.restarts} services died")
        broken = await _checked(system, setting, name)
        events = await system.events(name)
    return judged(report, events, home, injected=setting.count, broken=broken)


def _counting(target: int) -> Callable[[Recorded], bool]:
    left = target

    def reached(event: Recorded) -> bool:
        nonlocal left
        del event
        left -= 1
        return left <= 0

    return reached


async def skew_clocks(setting: Setting) -> Outcome:
    """Every service a day ahead or behind, by a seed."""
    rng = setting.rng("clocks")
    found: list[Outcome] = []
    for round_ in range(setting.count):
        home, name = setting.folder / f"home-{round_}", run_name(setting.seed)
        home.mkdir()
        clocks = {s: rng.choice((-_DAY, 0.0, _DAY)) for s in SERVICES}
        clocks[rng.choice(SERVICES)] = _DAY * rng.choice((-1, 1))

        def each(service: str, clocks: dict[str, float] = clocks, home: Path = home) -> Injection:
            return Injection(clock=clocks[service], ledger=str(home / LEDGER))

        async with fleet(home, SERVICES, each) as system:
            report = await system.completed(name, setting.seed)
            broken = await _checked(system, setting, name)
            found.append(judged(report, await system.events(name), home, injected=1, broken=broken))
        setting.say(f"clocks {clocks}")
    return summed(found)


async def disturb_deliveries(setting: Setting) -> Outcome:
    """Work comes late, in any order and some of it twice, to two rollouts and two verifiers.

    Two workers that get the same work at the same time both do it, and the first to record it wins. So an episode that
    ran twice is no broken promise here, as it is where only one worker was handed it; it is counted in the note.
    """
    found: list[Outcome] = []
    twice = 0
    for round_ in range(setting.count):
        home, name = setting.folder / f"home-{round_}", run_name(setting.seed)
        home.mkdir()
        injection = Injection(deliveries=setting.seed + round_, ledger=str(home / LEDGER))
        async with fleet(home, SERVICES, dict.fromkeys(SERVICES, injection).__getitem__) as system:
            await system.begin("rollout-2", "rollout", injection)
            await system.begin("verifier-2", "verifier", injection)
            report = await system.completed(name, setting.seed)
            twice += report["repeated_rollouts"]
            broken = await _checked(system, setting, name)
            report["repeated_rollouts"] = 0
            found.append(judged(report, await system.events(name), home, injected=1, broken=broken))
    return summed(found, note=f"{twice} episodes were handed to both workers, and recorded once")


async def poison_run(setting: Setting) -> Outcome:
    """An event that no verifier can do anything with: one dead letter, which can be tried again; the run completes."""
    home, name, broken = setting.folder / "home", run_name(setting.seed), []
    home.mkdir()
    gate = home / "gate"  # the policy's model does not answer before we have looked
    async with fleet(home, GAUNTLET_GATE=str(gate), GAUNTLET_CALLS=str(home / CALLS)) as system:
        running = asyncio.create_task(system.completed(name, setting.seed))
        await system.seen(name, lambda e: e.envelope.type == "bascule.trajectory.logged")
        await _append_poison(system, name)
        listed = await _letters(system, name, lambda letters: len(letters) == 1 and letters[0]["dead"])
        again = await system.bascule("dlq", "retry", name, "--json")
        if again.code or json.loads(again.out)["retried"] != 1:
            broken.append(f"dlq retry: {again.out} {again.err}")
        await _letters(system, name, lambda letters: letters[0]["dead"] and letters[0]["retries"] == 1)
        gate.touch()
        report = await running
        letters = await _letters(system, name, bool)
        if len(letters) != 1:
            broken.append(f"{len(letters)} dead letters instead of 1")
        setting.say(f"{listed[0]['subject']}: {listed[0]['error']}")
        broken += await _checked(system, setting, name)
        return judged(report, await system.events(name), home, injected=1, broken=broken, note="1 dead letter, retried")


async def _append_poison(system: Fleet, name: str) -> None:
    """With the rights of the rollout service."""
    trajectory = subjects.trajectory_id("g99-dev", 0, 0)
    data = TrajectoryLogged(
        trajectory=trajectory, evaluation="g99-dev", example="dev-0", position=0, sample=0, answer="yes", error=None,
        prompt_tokens=1, output_tokens=1, measured=Measured(seconds=0.0),
    )  # fmt: skip
    subject = subjects.trajectory_logged(name, trajectory)
    producer = Producer(service="rollout", version="0", hash="0")
    root = subjects.event_id(subjects.run_started(name))
    cause = subjects.event_id(subjects.episodes_requested(name, "g00-dev", 0))
    draft = Draft(subject=subject, step=0, data=data, cause=cause)
    payload = encode(draft, run=name, producer=producer, time="2026-01-01T00:00:00Z", root=root)
    log = await embedded_access(system.server.connection).connect("rollout")
    try:
        await log.append([NewEvent(subject=subject, payload=payload)])
    finally:
        await log.close()


async def _letters(system: Fleet, name: str, condition: Callable[[list[Any]], object]) -> list[Any]:
    """What ``bascule dlq list`` shows, once it is so."""
    async with asyncio.timeout(120):
        while True:
            done = await system.bascule("dlq", "list", name, "--json")
            letters = json.loads(done.out) if done.code == 0 else []
            if letters and condition(letters):
                return list(letters)


async def fill_disk_of_run(setting: Setting) -> Outcome:
    """A run on a small file system: it stops with a clear message, and goes on once there is more room."""
    disk, size, name = setting.folder / "disk", 384, run_name(setting.seed)
    disk.mkdir()
    if not await ran("mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)):
        return Outcome(injected=0, skipped="a tmpfs cannot be mounted: not root")
    home, stops, broken = disk / "home", 0, []
    commands = alone(home, GAUNTLET_CALLS=str(home / CALLS))
    try:
        done = await commands.bascule(*site().run(name, setting.seed))
        while done.code != 0 and stops < 40:
            stops += 1
            setting.say(f"{size} KiB: {done.err.strip().splitlines()[-1][:200] if done.err.strip() else done.code}")
            if done.code != 3 or "Traceback" in done.err or not any(w in done.err for w in ("full", "space", "disk")):
                return Outcome(injected=stops, broken=(f"at {size} KiB: exit {done.code}: {done.err}",))
            size += 128
            await ran("mount", "-o", f"remount,size={size}k", str(disk))
            begun = (await commands.bascule("status", name)).code == 0
            done = await commands.bascule(*(["resume", name, "--json"] if begun else site().run(name, setting.seed)))
        lines = (await commands.bascule("log", name, "--json")).out.encode().splitlines()
        events = [decode(0, json.loads(line)["subject"], line) for line in lines]
        replayed = await commands.bascule("replay", name, "--json")
        broken += [] if replayed.code == 0 else [f"replay: {replayed.out} {replayed.err}"]
        note = f"{size} KiB were enough"
        return judged(json.loads(done.out), events, home, injected=stops, broken=broken, note=note)
    finally:
        await ran("umount", str(disk))


def summed(found: list[Outcome], note: str = "") -> Outcome:
    return Outcome(
        injected=sum(o.injected for o in found),
        lost=sum(o.lost for o in found),
        duplicated=sum(o.duplicated for o in found),
        equal=all(o.equal for o in found),
        broken=tuple(b for o in found for b in o.broken),
        note=note,
    )
