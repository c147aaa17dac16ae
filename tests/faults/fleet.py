"""Whole runs as processes: a server, a supervisor over ``bascule serve`` processes, and commands, each with a fault."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from bascule.runtime.log.access import embedded_access, written
from bascule.runtime.log.nats import NatsLog
from bascule.runtime.log.permissions import ADMIN
from bascule.runtime.log.server import EmbeddedServer
from bascule.schemas.envelope import Recorded
from tests.faults.launcher import Injection
from tests.faults.ledger import connected, everything, serving
from tests.plugin_site import install_plugin

ROOT = Path(__file__).parents[2]
SERVICES = ("meta", "rollout", "verifier", "feedback", "trainer")
_HANG_SECONDS = 240.0


class Done(msgspec.Struct, frozen=True):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Site:
    """Where the plugin is as it would be installed, once more with other code, and a model."""

    def __init__(self, root: Path) -> None:
        source = Path(__file__).with_name("gauntlet.py").read_text()
        self.root = root
        self.plugin, self.altered = root / "site", root / "altered"
        install_plugin(self.plugin, "gauntlet", source)
        install_plugin(self.altered, "gauntlet", source + "\n# other code\n")
        self.model = root / "tiny"
        # In a process of its own: this one stays without torch.
        make = "import sys; from pathlib import Path; from tests.tiny_model import make_tiny_model as make; "
        subprocess.run([sys.executable, "-c", make + "make(Path(sys.argv[1]))", str(self.model)], check=True, cwd=ROOT)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("BASCULE_", "GAUNTLET_"))}
        return plain | {"PYTHONPATH": str(self.plugin), "BASCULE_HOME": str(home), **more}

    def run(self, name: str, seed: int, *more: str) -> list[str]:
        """Arguments of a run of the plugin's task."""
        tags = ("--set", f"policy.tag={name}", "--set", f"author.tag={name}")
        return ["run", "--task", "gauntlet", "--model", str(self.model), "--seed", str(seed), "--run-id", name,
                *tags, *more, "--json"]  # fmt: skip


@cache
def site() -> Site:
    """The one site of this process; its folder goes with the process."""
    _kept.append(tempfile.TemporaryDirectory(prefix="gauntlet-"))
    return Site(Path(_kept[-1].name))


@cache
def undisturbed(seed: int) -> tuple[dict[str, Any], frozenset[str]]:
    """Report and decisions' subjects of the run without faults, named as the disturbed one is."""
    home, name = site().root / f"undisturbed-{seed}", run_name(seed)
    report = json.loads(_checked(site().run(name, seed), home))
    decisions = frozenset(
        line["subject"] for line in map(json.loads, _checked(["log", name, "--json"], home).splitlines())
        if is_decision(line["type"])
    )  # fmt: skip
    return report, decisions


_kept: list[tempfile.TemporaryDirectory[str]] = []


def run_name(seed: int) -> str:
    return f"gauntlet-{seed}"


def is_decision(type_: str) -> bool:
    from bascule.schemas.events import TYPES

    return any(t.KIND == "decision" for (name, _), t in TYPES.items() if name == type_)


def _checked(arguments: Sequence[str], home: Path) -> str:
    command = [sys.executable, "-m", "bascule.runtime.cli", *arguments]
    done = subprocess.run(command, env=site().environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Fleet:
    """A server in this process, and the processes of services around it. Made by :func:`fleet`."""

    def __init__(self, home: Path, server: EmbeddedServer | None, env: dict[str, str]) -> None:
        self.home = home
        self.env = env
        self.restarts = 0
        self._server = server
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._supervisors: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def server(self) -> EmbeddedServer:
        assert self._server is not None
        return self._server

    def under(self, **env: str) -> Fleet:
        """The same server, for commands in another environment."""
        return Fleet(self.home, self._server, self.env | env)

    async def launch(
        self, arguments: Sequence[str], injection: Injection, **options: Any
    ) -> asyncio.subprocess.Process:
        text = msgspec.json.encode(injection).decode()
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.launcher", text, *arguments), cwd=ROOT, env=self.env, **options
        )

    async def begin(self, name: str, service: str, injection: Injection) -> None:
        """Start a service; it is started again whenever it dies."""
        started = asyncio.Event()

        async def supervise() -> None:
            with (self.home / f"{name}.stderr").open("ab") as err:
                while not self._stopping:
                    self._processes[name] = await self.launch(["serve", service], injection, stderr=err)
                    started.set()
                    await self._processes[name].wait()
                    self.restarts += not self._stopping

        self._supervisors.append(asyncio.create_task(supervise()))
        await started.wait()

    def send(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    async def bascule(self, *arguments: str, injection: Injection | None = None) -> Done:
        """Run a command to its end.

        Raises:
            TimeoutError: it hangs.
        """
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        process = await self.launch(arguments, injection or Injection(), **pipes)
        try:
            async with asyncio.timeout(_HANG_SECONDS):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def insisting(self, *arguments: str, injection: Injection | None = None) -> Done:
        """The same, again each time that the command was killed."""
        while (done := await self.bascule(*arguments, injection=injection)).killed:
            pass
        return done

    async def completed(self, name: str, seed: int, injection: Injection | None = None, *more: str) -> dict[str, Any]:
        """Start a run of the services, and resume it however often it takes; its report."""
        remote = ("--url", self.server.url)
        done = await self.insisting(*site().run(name, seed, *more), *remote, injection=injection)
        for _ in range(20):
            if done.code == 0:
                return json.loads(done.out)  # type: ignore[no-any-return]
            done = await self.insisting("resume", name, *remote, "--json", injection=injection)
        raise AssertionError(f"{name} does not complete: {done.err}")

    async def seen(self, name: str, condition: Callable[[Recorded], bool]) -> Recorded:
        """The run's first event for which ``condition`` holds.

        Raises:
            TimeoutError: it does not come.
        """
        async with (
            asyncio.timeout(_HANG_SECONDS),
            self.log() as log,
            aclosing(log.follow(f"bascule.{name}.>")) as events,
        ):
            async for event in events:
                if condition(event):
                    return event
        raise AssertionError("a log that is followed has no end")

    @asynccontextmanager
    async def log(self) -> AsyncIterator[NatsLog]:
        async with connected(self.server) as log:
            yield log

    async def events(self, name: str) -> list[Recorded]:
        async with self.log() as log:
            return await everything(log, f"bascule.{name}.>")

    async def stop(self) -> None:
        self._stopping = True
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*self._supervisors)


@asynccontextmanager
async def fleet(
    home: Path, services: Sequence[str] = SERVICES, each: Callable[[str], Injection] = lambda _: Injection(), **env: str
) -> AsyncIterator[Fleet]:
    """A server on ``home`` and one process a service, with the fault that ``each`` gives it."""
    async with serving(home) as server:
        access = embedded_access(server.connection)
        await (await access.connect(ADMIN)).close()
        credentials = home / "credentials.json"
        credentials.write_text(written(access.credentials or {}))
        more = {"BASCULE_CREDENTIALS": str(credentials), **env}
        made = Fleet(home, server, site().environment(home, **more))
        try:
            for service in services:
                await made.begin(service, service, each(service))
            yield made
        finally:
            await made.stop()


def alone(home: Path, **env: str) -> Fleet:
    """Commands on ``home`` that bring a server of their own."""
    return Fleet(home, None, site().environment(home, **env))
