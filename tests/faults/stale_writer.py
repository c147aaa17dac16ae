"""A writer that was replaced while it slept wakes up and goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.protocol import Fence
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas import subjects
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import Conflict
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import connected, event, everything, serving, take_over

RUN, WORKER = "faults", "trainer"
LEASE = 0.3


def job(number: int) -> str:
    """The filter over a job's events."""
    return f"bascule.{RUN}.train.j{number:03d}.>"


def started(number: int, attempt: int) -> str:
    return subjects.subject(RUN, "train", f"j{number:03d}", f"started-{attempt}")


def outcome(number: int) -> str:
    return subjects.subject(RUN, "train", f"j{number:03d}", "outcome")


def asked(number: int) -> str:
    return subjects.subject(RUN, "asked", f"j{number:03d}", "asked")


async def wake_stale_writer(setting: Setting) -> Outcome:
    """A paused process whose lease is over and whose job another has taken; half of them in the middle of an append."""
    refused = overtaken = 0
    broken: list[str] = []
    async with serving(setting.folder / "home") as server, connected(server, lease=LEASE) as log:
        for number in range(setting.count):
            await log.append([event(asked(number), "do it")])
            during_append = number % 2 == 1
            answer, second = await _pause_and_replace(server, log, number, during_append=during_append)
            if answer == "refused":
                refused += 1
            elif not during_append:
                broken.append(f"job {number}: the stale outcome was accepted")
            else:
                overtaken += 1
            setting.say(
                f"job {number}: SIGSTOP {'in an append' if during_append else 'before its append'}; "
                f"attempt 2 at sequence {second.seq}; attempt 1 was {answer}"
            )
        events = await everything(log)
    broken += [problem for number in range(setting.count) if (problem := _problem(number, events))]
    outcomes = sum(e.subject.endswith(".outcome") for e in events)
    return Outcome(
        injected=setting.count,
        lost=max(0, setting.count - outcomes),
        duplicated=max(0, outcomes - setting.count),
        broken=tuple(broken),
        note=f"{refused} refused, {overtaken} had written before they were paused",
    )


async def _pause_and_replace(
    server: EmbeddedServer, log: NatsLog, number: int, *, during_append: bool
) -> tuple[str, Recorded]:
    """What the first attempt reports after the second one has started, and that start."""
    first = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.stale_writer", server.url, server.user, server.password, str(number)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert await first.stdout.readline() == b"started\n"
        if during_append:
            first.stdin.write(b"go\n")
            assert await first.stdout.readline() == b"appending\n"
        os.kill(first.pid, signal.SIGSTOP)
        queue = await log.work(RUN, WORKER, [f"bascule.{RUN}.asked.>"])
        while not (items := [i for i in await queue.next(8, 2.0) if i.event.subject == asked(number)]):
            pass  # the lease of the first attempt goes on
        second = await take_over(log, job(number), event(started(number, 2), "attempt 2"))
        os.kill(first.pid, signal.SIGCONT)
        if not during_append:
            first.stdin.write(b"go\n")
            assert await first.stdout.readline() == b"appending\n"
        answer = (await first.stdout.readline()).decode().strip()
        await log.append([event(outcome(number), "attempt 2")], fence=Fence(filter=job(number), seq=second.seq))
        await items[0].done()
        await queue.close()
        return answer, second
    finally:
        if first.returncode is None:
            first.kill()
        await first.wait()


def _problem(number: int, events: list[Recorded]) -> str | None:
    """Why the events of a job could not have happened with fencing."""
    own = {e.subject: e for e in events}
    start, end = own[started(number, 2)], own.get(outcome(number))
    if end is None:
        return f"job {number} has no outcome"
    by_first = b"attempt 1" in end.payload
    return f"job {number}: attempt 1 wrote after attempt 2 had started" if by_first and end.seq > start.seq else None


async def _attempt(url: str, user: str, password: str, number: int) -> None:
    """The first attempt: take the job, start, wait for a line, and write the outcome."""
    log = await NatsLog.connect(url, user=user, password=password, lease=LEASE)
    queue = await log.work(RUN, WORKER, [f"bascule.{RUN}.asked.>"])
    while not any(item.event.subject == asked(number) for item in await queue.next(8, 1.0)):
        pass
    first = await take_over(log, job(number), event(started(number, 1), "attempt 1"))
    print("started", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("appending", flush=True)
    try:
        await log.append([event(outcome(number), "attempt 1")], fence=Fence(filter=job(number), seq=first.seq))
        print("accepted", flush=True)
    except Conflict:
        print("refused", flush=True)
    await log.close()


if __name__ == "__main__":
    asyncio.run(_attempt(*sys.argv[1:4], int(sys.argv[4])))
