"""The client of the scoring process: verdicts in, truths never."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from typing import Any, ClassVar, Self

from bascule.schemas.errors import ScoringError
from bascule.schemas.events import Split
from bascule.schemas.run import PluginChoice
from bascule.schemas.sandbox import SandboxConfig, SandboxReport
from bascule.schemas.trajectory import Trajectory, Unscored, Verdict
from bascule.verifiers.frames import FramedProcess, Lost, Refused, frame
from bascule.verifiers.sandbox.server import Confine, Probed
from bascule.verifiers.scoring_process import Open, Ready, Reply, Request

#: What the server of programs gets of the environment: where it finds itself.
SERVER_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH", "TMPDIR")
#: What the scoring process gets: a cache and the package index as well. No keys.
ENVIRONMENT = (
    *SERVER_ENVIRONMENT,
    *("XDG_CACHE_HOME", "BASCULE_CACHE", "BASCULE_PLUGINS", "BASCULE_PLUGINS_STRICT"),
    *("REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
)
ENVIRONMENT_PREFIX = "PIP_"
TRIES = 2
#: Requests in a row that may lose the process; later ones get a single try each, until there is a verdict again.
PATIENCE = 3


class Scorer:
    """Scores in a separate process, one at a time, in the order of the calls.

    Where the task's scorer runs programs, a second process makes the sandboxes that they run in. One that crashes or
    hangs is killed with the other and both are started again, and the request that it held is tried once more; after
    that the request is Unscored. After three such requests in a row each has one try, until there is a verdict again:
    what ends a process may be one candidate's answers, so no request goes without a try. Any number of calls may wait
    at once. As a context it starts and closes itself.

    Args:
        task: name of the task plugin.
        params: its parameters.
        second: a second verifier beside the task's own.
        sandbox: what programs have to be confined by.
        report: what the sandbox of this machine is known to hold; probed at the start if it is None.
        timeout: seconds for one verdict, counted while the process works on it; by default what the private face says.
        start_timeout: seconds for opening the private face, which may fetch data.
        tries: how often a request that loses the process is made.

    Attributes:
        restarts: how many times the processes were started again.
        episodes: the task's scorer scores whole episodes; known once it is started.
        report: what the sandbox holds that programs run in, once it is started; None if the task runs none.
        uid: whose process the scoring process is, once it is started.
        lost: why the last request has no verdict, if it lost the process; else empty.
    """

    #: Arguments of the interpreter; -P keeps the working folder off the path.
    command: ClassVar[tuple[str, ...]] = ("-P", "-m", "bascule.verifiers.scoring_process")
    server_command: ClassVar[tuple[str, ...]] = ("-P", "-m", "bascule.verifiers.sandbox.server")
    #: Seconds that the server of programs has to end what runs and to remove its folders.
    server_grace: ClassVar[float] = 5.0

    def __init__(
        self,
        task: str,
        params: dict[str, Any],
        *,
        second: PluginChoice | None = None,
        sandbox: SandboxConfig | None = None,
        report: SandboxReport | None = None,
        timeout: float | None = None,
        start_timeout: float = 600.0,
        tries: int = TRIES,
    ) -> None:
        self._opening = Open(task=task, params=params, second=second)
        self._sandbox = sandbox if sandbox is not None else SandboxConfig()
        self._open = False
        self._timeout = timeout
        self.start_timeout = start_timeout
        self._tries = tries
        self._losses = 0
        self.lost = ""
        self.restarts = 0
        self.episodes = False
        self.report: SandboxReport | None = None
        self._known = report
        self.uid: int | None = None
        self._seconds = 0.0
        self._ids = itertools.count()
        self._lock = asyncio.Lock()
        self._scoring = FramedProcess("the scoring process", self.command)
        self._server = FramedProcess("the server of programs", self.server_command, grace=self.server_grace)

    @property
    def pid(self) -> int | None:
        """The scoring process, while there is one."""
        return self._scoring.pid

    @property
    def server_pid(self) -> int | None:
        """The server of programs, while there is one."""
        return self._server.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the processes and open the private face; does nothing if that is done.

        Raises:
            ScoringError: it does not open, or what its programs need is not there; says why and what to do.
        """
        async with self._lock:
            if not self._open:
                await self._launch()
                self._open = True

    async def score(self, split: Split, example: str, answer: str | None, episode: Trajectory | None = None) -> Verdict:
        """The verdict on one answer. A failure of the runtime or the scorer is Unscored with its reason.

        Args:
            episode: how the answer came about; a scorer of episodes takes None for an episode without a step.

        Raises:
            ScoringError: the scorer is not started, or closed.
        """
        return (await self.opinions(split, example, answer, episode, second=False))[0]

    async def opinions(
        self, split: Split, example: str, answer: str | None, episode: Trajectory | None = None, *, second: bool = True
    ) -> tuple[Verdict, Verdict | None]:
        """The verdict as :meth:`score` gives it, and the second verifier's.

        Args:
            second: whether the second verifier is asked; None is its verdict if not, and where there is none.

        Raises:
            ScoringError: the scorer is not started, or closed.
        """
        async with self._lock:
            if not self._open:
                raise ScoringError("The scorer is not running.", next_step="Call start() first.")
            # JSON cannot hold lone surrogates, and an answer is whatever a model wrote.
            text = None if answer is None else answer.encode("utf-8", "replace").decode("utf-8")
            sent = episode if self.episodes else None
            request = Request(
                id=next(self._ids), split=split, example=example, answer=text, episode=sent, second=second
            )
            try:
                data = frame(request)
            except (ValueError, UnicodeEncodeError) as e:
                return Unscored(reason=f"The episode cannot be sent to the scorer: {e}"), None
            tries = self._tries if self._losses < PATIENCE else 1
            for _ in range(tries):
                try:
                    if self._scoring.pid is None:
                        self.restarts += 1
                        await self._launch()
                    reply = await self._exchange(request.id, data)
                except (Lost, ScoringError) as e:
                    self.lost = str(e)
                else:
                    self.lost, self._losses = "", 0
                    return reply.verdict, reply.second
            self._losses += 1
            return Unscored(reason=f"Tried {'once' if tries == 1 else f'{tries} times'}: {self.lost}"), None

    async def close(self) -> None:
        """End the processes; calls that wait get a ScoringError."""
        async with self._lock:
            self._open = False
            await self._kill()

    async def _launch(self) -> None:
        """Start both processes, with a socket between them; none of them is there if that fails."""
        await self._kill()
        environment = {k: v for k, v in os.environ.items() if k in ENVIRONMENT or k.startswith(ENVIRONMENT_PREFIX)}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                ready: Ready = await self._started(
                    self._scoring, environment, ours, frame(self._opening), Ready | Refused
                )
                if ready.programs:
                    confine = frame(Confine(config=self._sandbox, report=self._known))
                    bare = {k: v for k, v in environment.items() if k in SERVER_ENVIRONMENT}
                    probed: Probed = await self._started(self._server, bare, theirs, confine, Probed | Refused)
                    self.report = self._known = probed.report
            except BaseException:
                await self._kill()
                raise
        self.episodes, self.uid = ready.episodes, ready.uid
        self._seconds = self._timeout if self._timeout is not None else ready.seconds

    async def _started(
        self, process: FramedProcess, environment: dict[str, str], channel: socket.socket, opening: bytes, type_: Any
    ) -> Any:
        try:
            await process.start(environment, channel)
            answer = await process.ask(opening, type_, self.start_timeout)
        except Lost as e:
            raise ScoringError(
                f"The task {self._opening.task!r} cannot be scored, since a process does not start: {e}",
                next_step="Check that the task's plugin loads: bascule plugins.",
            ) from e
        if isinstance(answer, Refused):
            raise ScoringError(answer.message, next_step=answer.next_step)
        return answer

    async def _exchange(self, identity: int, data: bytes) -> Reply:
        try:
            reply: Reply = await self._scoring.ask(data, Reply, self._seconds)
        except BaseException:
            # What the scoring process asked the server for is of no use to the next one.
            await self._kill()
            raise
        if reply.id != identity:
            await self._kill()
            raise Lost(f"the scoring process answered request {reply.id} instead of {identity}.")
        return reply

    async def _kill(self) -> None:
        try:
            await self._scoring.kill()
        finally:
            await self._server.kill()
