"""The client of the scoring process: verdicts in, truths never."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from typing import Any, ClassVar, Self

import msgspec

from bascule.schemas.errors import ScoringError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Unscored, Verdict
from bascule.verifiers.scoring_process import MAX_FRAME, Open, Ready, Refused, Reply, Request, frame

#: What the process gets of the environment: where it finds itself, its cache and the package index. No keys.
ENVIRONMENT = (
    *("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH", "TMPDIR", "XDG_CACHE_HOME"),
    *("BASCULE_CACHE", "BASCULE_PLUGINS", "BASCULE_PLUGINS_STRICT"),
    *("REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
)
ENVIRONMENT_PREFIX = "PIP_"
TRIES = 2


class _Lost(Exception):
    """The process crashed, hung or spoke nonsense."""


class Scorer:
    """Scores answers in a separate process, one at a time, in the order of the calls.

    A process that crashes or hangs is killed and started again, and the request that it held is tried once more;
    after that the request is Unscored. Any number of calls may wait at once. As a context it starts and closes itself.

    Args:
        task: name of the task plugin.
        params: its parameters.
        timeout: seconds for one verdict, counted while the process works on it.
        start_timeout: seconds for opening the private face, which may fetch data.
    """

    #: Arguments of the interpreter; -P keeps the working folder off the path.
    command: ClassVar[tuple[str, ...]] = ("-P", "-m", "bascule.verifiers.scoring_process")

    def __init__(
        self, task: str, params: dict[str, Any], *, timeout: float = 60.0, start_timeout: float = 600.0
    ) -> None:
        self._opening = Open(task=task, params=params)
        self._open = False
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.restarts = 0
        self._ids = itertools.count()
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The scoring process, while there is one."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the process and open the private face; does nothing if that is done.

        Raises:
            ScoringError: it does not open; says why and what to do.
        """
        async with self._lock:
            if not self._open:
                await self._launch()
                self._open = True

    async def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """The verdict on one answer. A failure of the runtime or the scorer is Unscored with its reason.

        Raises:
            ScoringError: the scorer is not started, or closed.
        """
        async with self._lock:
            if not self._open:
                raise ScoringError("The scorer is not running.", next_step="Call start() first.")
            # JSON cannot hold lone surrogates, and an answer is whatever a model wrote.
            text = None if answer is None else answer.encode("utf-8", "replace").decode("utf-8")
            request = Request(id=next(self._ids), split=split, example=example, answer=text)
            try:
                data = frame(request)
            except ValueError as e:
                return Unscored(reason=str(e))
            reason = ""
            for _ in range(TRIES):
                try:
                    if self._process is None:
                        self.restarts += 1
                        await self._launch()
                    return await self._exchange(request.id, data)
                except (_Lost, ScoringError) as e:
                    reason = str(e)
            return Unscored(reason=f"Tried {TRIES} times: {reason}")

    async def close(self) -> None:
        """End the process; calls that wait get a ScoringError."""
        async with self._lock:
            self._open = False
            await self._kill()

    async def _launch(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k in ENVIRONMENT or k.startswith(ENVIRONMENT_PREFIX)}
        # Its own session keeps a terminal's interrupt away, so that what is being scored at a drain gets its verdict.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *self.command, str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            answer: Ready | Refused = await self._talk(frame(self._opening), Ready | Refused, self.start_timeout)
        except _Lost as e:
            raise ScoringError(
                f"The scoring process of the task {self._opening.task!r} does not start: {e}",
                next_step="Check that the task's plugin loads: bascule plugins.",
            ) from e
        if isinstance(answer, Refused):
            await self._kill()
            raise ScoringError(answer.message, next_step=answer.next_step)

    async def _exchange(self, identity: int, data: bytes) -> Verdict:
        reply: Reply = await self._talk(data, Reply, self.timeout)
        if reply.id != identity:
            await self._kill()
            raise _Lost(f"the scoring process answered request {reply.id} instead of {identity}.")
        return reply.verdict

    async def _talk(self, data: bytes, type_: Any, seconds: float) -> Any:
        """Send one frame and read one; on any failure, being cancelled included, the process is gone.

        Raises:
            _Lost: with the reason.
        """
        try:
            async with asyncio.timeout(seconds):
                return msgspec.json.decode(await self._roundtrip(data), type=type_)
        except TimeoutError:
            await self._kill()
            raise _Lost(f"the scoring process gave no answer within {seconds:g} s.") from None
        except (OSError, EOFError, msgspec.DecodeError) as e:
            await self._kill()
            raise _Lost(f"the scoring process ended or broke its protocol ({type(e).__name__}).") from e
        except BaseException:
            # The answer may still come: a process that owes one must not meet the next request.
            await self._kill()
            raise

    async def _roundtrip(self, data: bytes) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError
        process.stdin.write(data)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(4), "big")
        if size > MAX_FRAME:
            raise EOFError
        return await process.stdout.readexactly(size)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        # A killed process ends at once. Were a cancelled wait to leave it, its transport would outlive the loop.
        cancelled: asyncio.CancelledError | None = None
        while process.returncode is None:
            try:
                await process.wait()
            except asyncio.CancelledError as e:
                cancelled = e
        if cancelled is not None:
            raise cancelled
