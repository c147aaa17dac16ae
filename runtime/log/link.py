"""The connection to a NATS server: requests that fail as what they are, and retries until a deadline.

It hides what nats-py leaves to its callers: a publish that is buffered while disconnected and stored later (so nothing
is buffered), a request that hangs after its connection broke, a permission violation that looks like a timeout.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bascule.runtime.log.client import NoTlsError, SafeClient
from bascule.runtime.log.login import Credential, plain, trust, unknown_user, untrusted
from bascule.schemas.errors import LogError, LogUnavailable, NotPermitted

T = TypeVar("T")
Watcher = Callable[[Exception], object]

_REQUEST_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.5
_DENIED = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)


_UNREACHABLE: Final = "Check that nats-server runs; doing it again is safe."
_STUCK: Final = (
    "The server is connected but does not answer: look into its log. If its disk was full, free some space and restart "
    "it, since it does not recover by itself; doing it again is safe."
)


class DisconnectedError(Exception):
    """The connection broke before a request was answered."""


#: What may pass by itself. TimeoutError covers nats-py's and asyncio's.
TRANSIENT: Final = (DisconnectedError, OSError, TimeoutError, nats.errors.Error)


class Link:
    """One connection. It reconnects for ever; each operation gives up after ``deadline`` seconds."""

    def __init__(self, *, deadline: float, inbox: str = "_INBOX") -> None:
        self.deadline = deadline
        self._inbox = inbox
        self._nc = SafeClient()
        self._watchers: dict[Watcher, frozenset[str]] = {}
        self._refused: asyncio.Future[LogError] | None = None
        self._deaf: NotPermitted | None = None
        self._user: str | None = None
        self._url = ""
        self._violation = ""
        self._closed = False

    async def connect(self, url: str, *, user: str | None, credential: Credential, ca: Path | None, name: str) -> None:
        """Connect.

        Args:
            ca: certificates to trust instead of the system's; where it or ``tls://`` says so, TLS is demanded.

        Raises:
            NotPermitted: the server refuses the user.
            LogError: its certificate is not trusted, or it offers no TLS where that is asked for.
            LogUnavailable: nothing answers before the deadline.
            ConfigError: ``ca`` or the seed is not usable.
        """
        credential.check(user)
        self._user, self._url = user, url
        self._refused = asyncio.get_running_loop().create_future()
        connecting = asyncio.ensure_future(
            self._nc.connect(
                url,
                user=user if credential.nkey_seed is None else None,
                password=credential.password,
                nkeys_seed_str=credential.nkey_seed,
                name=name,
                inbox_prefix=self._inbox,
                tls=trust(ca) if ca is not None or url.startswith("tls://") else None,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.2,  # type: ignore[arg-type]  # seconds; only its annotation is an int
                ping_interval=5,
                max_outstanding_pings=2,
                pending_size=0,
            )
        )
        try:
            await asyncio.wait((connecting, self._refused), timeout=self.deadline, return_when=asyncio.FIRST_COMPLETED)
            if self._refused.done():
                raise self._refused.result()
            if connecting.done():
                connecting.result()
                return
            raise LogUnavailable(
                f"No server answered at {url} within {self.deadline:g} s.", next_step="Check that it runs."
            )
        except (OSError, nats.errors.Error) as e:
            raise LogUnavailable(f"Connecting to {url} failed: {e}.", next_step="Check that it runs.") from e
        finally:
            self._refused = None
            if not connecting.done():
                connecting.cancel()
                await self._nc.close()

    async def request(
        self, subject: str, payload: bytes = b"", *, headers: dict[str, str] | None = None, also: Iterable[str] = ()
    ) -> Msg:
        """Send and wait for the answer.

        Args:
            also: further subjects just published to, whose refusal ends this request as well.

        Raises:
            NotPermitted: the user may not publish to one of the subjects, or not receive answers.
            Exception: one of ``TRANSIENT``.
        """
        if self._deaf is not None:
            raise self._deaf
        broken: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        reply = asyncio.ensure_future(self._nc.request(subject, payload, timeout=_REQUEST_SECONDS, headers=headers))
        try:
            with self.watching(partial(_fail, broken), subject, *also):
                await asyncio.wait((reply, broken), return_when=asyncio.FIRST_COMPLETED)
            return (broken if broken.done() else reply).result()
        finally:
            for future in (reply, broken):
                if not future.done():
                    future.cancel()
                elif not future.cancelled():
                    future.exception()  # seen; asyncio would report the one that was not returned

    @contextmanager
    def watching(self, watcher: Watcher, *subjects: str) -> Iterator[None]:
        """Tell ``watcher`` why, when the connection breaks or ends, or ``subjects`` are denied to the user."""
        self._watchers[watcher] = frozenset(s.lower() for s in subjects)
        try:
            yield
        finally:
            del self._watchers[watcher]

    async def api(self, subject: str, request: dict[str, Any]) -> dict[str, Any]:
        """A JetStream API request and its answer, which may hold an ``error``."""
        answer = await self.request(f"$JS.API.{subject}", msgspec.json.encode(request))
        return msgspec.json.decode(answer.data, type=dict[str, Any])

    async def ask(self, what: str, subject: str, request: dict[str, Any]) -> dict[str, Any]:
        """A JetStream API request, repeated until it is answered; ``what`` it is for, for messages.

        Raises:
            LogError: the server refuses it for good; else as :meth:`persist`.
        """

        async def attempt() -> dict[str, Any] | None:
            return settled(await self.api(subject, request), what)

        return await self.persist(what, attempt)

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send without waiting for an answer; raises one of ``TRANSIENT`` if not connected."""
        await self._nc.publish(subject, payload, reply=reply, headers=headers)

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        return await self._nc.subscribe(subject, cb=callback)

    def new_inbox(self) -> str:
        return self._nc.new_inbox()

    async def persist(self, what: str, attempt: Callable[[], Awaitable[T | None]]) -> T:
        """Repeat ``attempt`` with jitter until it returns something.

        Args:
            what: the operation and its object, for the message.

        Raises:
            LogUnavailable: the deadline has passed.
            NotPermitted: the user may not do it.
            LogError: as raised by ``attempt``, or the connection is closed.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.deadline
        pause, problem = _FIRST_PAUSE, "no answer"
        while True:
            try:
                async with asyncio.timeout_at(end):
                    result = await attempt()
                if result is not None:
                    return result
            except TRANSIENT as e:
                problem = _reason(e) or problem
            if self.closed:
                raise _closed()
            if loop.time() >= end:
                raise LogUnavailable(
                    f"{what}: not confirmed within {self.deadline:g} s ({problem}{self._violation}).",
                    next_step=_STUCK if self._nc.is_connected else _UNREACHABLE,
                )
            await asyncio.sleep(min(random.uniform(0, pause), max(0.0, end - loop.time())))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def closed(self) -> bool:
        return self._closed or self._nc.is_closed

    async def close(self) -> None:
        self._closed = True
        self._tell(_closed())
        await self._nc.close()

    def _tell(self, reason: Exception, subject: str | None = None) -> None:
        for watcher, subjects in tuple(self._watchers.items()):
            if subject is None or subject in subjects:
                watcher(reason)

    async def _on_error(self, error: Exception) -> None:
        text = str(error)
        if self._refused is not None and not self._refused.done():
            if "authorization violation" in text.lower():
                self._refused.set_result(unknown_user(self._url, self._user))
            elif isinstance(error, ssl.SSLError):
                self._refused.set_result(untrusted(self._url, error))
            elif isinstance(error, NoTlsError):
                self._refused.set_result(plain(self._url))
        if isinstance(error, NoTlsError):
            self._violation = f"; {error}"
        denied = _DENIED.search(text)
        if denied is None:
            return
        self._violation = f"; the server refused this user: {denied[0]}"
        what, subject = denied[1].lower(), denied[2].lower()
        reason = _not_allowed(denied[0])
        # A subscription that no watcher named is the one on which nats-py takes the answers to all requests.
        if what == "subscription" and not any(subject in watched for watched in self._watchers.values()):
            self._deaf = reason
            self._tell(reason)
        else:
            self._tell(reason, subject)

    async def _on_disconnect(self) -> None:
        self._deaf = None  # a new connection subscribes anew
        self._tell(_closed() if self.closed else DisconnectedError("the connection broke"))


def settled(answer: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The answer; None asks for another try, since the server is still starting or choosing a leader.

    Raises:
        LogError: it is a refusal for good; ``what`` was refused.
    """
    error = answer.get("error")
    if error is None:
        return answer
    if error["code"] >= 500 or error["code"] == 404:
        return None
    raise LogError(f"{what} was refused: {error['description']}.", next_step="Look into the server's log.")


def _reason(error: Exception) -> str:
    """Why a try failed; empty where the error does not say more than an earlier one."""
    if isinstance(error, nats.errors.OutboundBufferLimitError):  # with nothing buffered it means just this
        return "not connected"
    return "" if type(error) is TimeoutError else str(error)


def _fail(future: asyncio.Future[Any], reason: Exception) -> None:
    if not future.done():
        future.set_exception(reason)


def _closed() -> LogError:
    return LogError("The connection to the log is closed.", next_step="Open the log again.")


def _not_allowed(violation: str) -> NotPermitted:
    return NotPermitted(
        f"The server refuses this user: {violation}.",
        next_step="Give the user this permission, or connect as another one.",
    )
