"""A run of as many generations as a run may have: what serves and what reads it stays within its memory."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.server import attach
from bascule.schemas.events import LeverChosen
from tests.faults.fault import Outcome, Setting
from tests.faults.fleet import site

_NAME = "endless"
#: A serving process may grow by this factor from a tenth of its generations to the last.
_GROWTH = 1.5
#: Small evaluations, the harness alone, a policy that never stops and an author that always edits.
_SET = (
    "policy.endless=true",
    "author.endless=true",
    "engine.text=yes",
    "evaluation.dev_examples=2",
    "evaluation.sealed_examples=2",
    "evaluation.train_groups=1",
    "evaluation.train_samples=1",
)


async def run_on(setting: Setting) -> Outcome:
    """``count`` generations, and then replay, status and verify."""
    home, stations = setting.folder / "home", [setting.count // 10, setting.count // 2, setting.count]
    env = site().environment(home)
    arguments = site().run(_NAME, setting.seed, "--levers", "harness", "--engine", "constant")
    arguments += ["--max-gen", str(setting.count), *(x for value in _SET for x in ("--set", value))]
    with (setting.folder / "run.out").open("wb") as out:
        command = [sys.executable, "-m", "bascule.runtime.cli"]
        process = subprocess.Popen([*command, *arguments], env=env, stdout=out, stderr=subprocess.STDOUT)
    begin = time.monotonic()
    try:
        sizes = await _sizes(home, process, stations)
        code = await asyncio.to_thread(process.wait)
    finally:
        process.kill()
        process.wait()
    figures = [f"generation {g}: {size // 1024} MiB" for g, size in sizes.items()]
    setting.say(f"{', '.join(figures)}; {time.monotonic() - begin:.0f} s")
    broken = [] if code == 0 else [f"the run ended with {code}: {(setting.folder / 'run.out').read_text()}"]
    growth = sizes[stations[-1]] / sizes[stations[0]] if len(sizes) == len(stations) else float("inf")
    if growth >= _GROWTH:
        broken.append(f"the serving process grew by {growth:.2f}: {', '.join(figures)}")
    for check in ("replay", "status", "verify"):
        begin = time.monotonic()
        with (setting.folder / f"{check}.out").open("wb") as out:
            reader = subprocess.Popen([*command, check, _NAME, "--json"], env=env, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = await asyncio.to_thread(os.wait4, reader.pid, 0)
        reader.returncode = os.waitstatus_to_exitcode(status)
        figures.append(f"{check} {time.monotonic() - begin:.1f} s, {usage.ru_maxrss // 1024} MiB")
        setting.say(figures[-1])
        if reader.returncode != 0:
            broken.append(
                f"{check} ended with {reader.returncode}: {(setting.folder / f'{check}.out').read_text()[:2000]}"
            )
    return Outcome(injected=setting.count, broken=tuple(broken), note=f"grew by {growth:.2f}; {'; '.join(figures)}")


async def _sizes(home: Path, process: subprocess.Popen[bytes], stations: list[int]) -> dict[int, int]:
    """KiB of the serving process in memory as each of ``stations`` is chosen; fewer if it ends before that."""
    while (connection := attach(home)) is None:
        if process.poll() is not None:
            return {}
        await asyncio.sleep(0.05)
    sizes: dict[int, int] = {}
    log = await NatsLog.connect(connection.url, user=connection.user, password=connection.password)
    try:
        async with aclosing(log.follow(f"bascule.{_NAME}.decision.*.lever")) as events:
            async for event in events:
                if isinstance(event.data, LeverChosen) and event.data.generation in stations:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found = re.search(r"VmRSS:\s+(\d+) kB", status)
                    assert found is not None
                    sizes[event.data.generation] = int(found[1])
                    if len(sizes) == len(stations):
                        break
    finally:
        await log.close()
    return sizes
