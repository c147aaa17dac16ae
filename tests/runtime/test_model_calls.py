"""What is recorded of calls to models, how a run pauses for one, and what may be read of recorded episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.policy import READ, Call, CallModel, CallResult, CallTool, Performed, PolicyInput
from bascule.runtime.audit.replay import replay
from bascule.runtime.audit.whatif import whatif
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.calls import _missing
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import Erased, ModelError

Make = Callable[[MemoryLog], View]
LONG = "x" * 100_000
#: What must not be told of; the first one is asked beside these.
OTHERS = ("g00-dev-0000-n0", "g00-train-9999-n0", "../g00-train", None)


class Reading:
    """A policy that reads what it is told to, asks a long question, and stops.

    Attributes:
        fails: the errors of its next calls; ``pauses`` are what their answers pause with.
    """

    name = "reading"
    version = "1"

    def __init__(self) -> None:
        self.asked = 0
        self.missing: str | None = None
        self.fails: list[str] = []
        self.pauses: list[str] = []

    def ready(self) -> None:
        if self.missing is not None:
            raise ModelError(self.missing, next_step="Set it.")

    async def perform(self, call: Call) -> Performed:
        assert isinstance(call, CallModel)
        self.asked += 1
        if self.fails:
            raise ModelError(self.fails.pop(), next_step="Wait.")
        pause = self.pauses.pop() if self.pauses else None
        return Performed(
            answer={"text": "so"}, input_tokens=5, cache_read_tokens=3, cache_write_tokens=2,
            stop_reason="refusal" if pause else "end_turn", pause=pause,
        )  # fmt: skip

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> Call | LeverDecision:
        read = [r for r in results if isinstance(r, ev.ToolCalled)]
        wanted = (given.outcomes[0].trajectory, *OTHERS)
        if len(read) < len(wanted):
            return CallTool(name=READ, arguments={"trajectory": wanted[len(read)]})
        if not any(isinstance(r, ev.ModelCalled) and r.stop_reason == "end_turn" for r in results):
            return CallModel(model="m", request={"about": f"{LONG} {given.generation}"})
        return LeverDecision(lever="stop", reasons=("read",))


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """The policy of every run of the fixtures."""
    found = Reading()
    monkeypatch.setitem(plugins().registry.policies.items, "rules", lambda _: found)
    return found


async def served(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read("bascule.small.>")]


async def resumed(make_view: Make, log: MemoryLog, pauses: int) -> None:
    draft = Draft(subject=subjects.run_resumed("small", pauses), step=0, data=ev.RunResumed())
    await make_view(log).append("cli", [draft])


def paused(events: Sequence[Recorded]) -> list[str]:
    return [e.data.reason for e in events if isinstance(e.data, ev.RunPaused)]


async def test_a_long_request_is_in_a_blob_that_replay_needs_not_and_a_fork_knows_again(
    reading: Reading, make_view: Make, started_log: MemoryLog
) -> None:
    events = await served(make_view, started_log)
    (called,) = [e.data for e in events if isinstance(e.data, ev.ModelCalled)]
    assert called.request == {}
    assert called.request_blob is not None
    stored = await make_view(started_log).blobs.get(called.request_blob)
    assert msgspec.json.decode(stored) == {"about": f"{LONG} 1"}
    assert (called.input_tokens, called.cache_read_tokens, called.cache_write_tokens) == (5, 3, 2)
    assert called.stop_reason == "end_turn"
    assert replay("small", events, plugins()).differences == ()
    started = events[0].data
    assert isinstance(started, ev.RunStarted)
    fork = whatif(
        events, "fork", step=1, config=started.config, changes={}, plugins=plugins(),
        producers={name: producer(name) for name in (*SERVICES, "cli")},
    )  # fmt: skip
    assert fork.stopped_at is None
    assert called.request_blob.sha256 in {b.sha256 for b in fork.blobs}
    assert reading.asked == 1


async def test_only_episodes_on_train_are_told_of(reading: Reading, make_view: Make, started_log: MemoryLog) -> None:
    events = await served(make_view, started_log)
    train, dev, *others = [e.data for e in events if isinstance(e.data, ev.ToolCalled)]
    assert train.result is not None
    assert "answer: '7'" in train.result
    assert "reward: " in train.result
    assert all(c.result is None and c.error and "no trajectory" in c.error for c in (dev, *others))


async def test_a_call_that_cannot_be_made_pauses_and_is_made_after_the_resume(
    reading: Reading, make_view: Make, started_log: MemoryLog
) -> None:
    reading.fails = ["The endpoint is gone."]
    events = await served(make_view, started_log)
    assert paused(events) == ["The endpoint is gone. Wait."]
    assert not any(isinstance(e.data, ev.ModelCalled | ev.RunCompleted) for e in events)
    await resumed(make_view, started_log, 1)
    events = await served(make_view, started_log)
    assert any(isinstance(e.data, ev.RunCompleted) for e in events)
    assert replay("small", events, plugins()).differences == ()


async def test_an_answer_that_somebody_should_look_at_is_recorded_with_the_pause(
    reading: Reading, make_view: Make, started_log: MemoryLog
) -> None:
    reading.pauses = ["It refused."]
    events = await served(make_view, started_log)
    assert paused(events) == ["It refused."]
    assert len([e for e in events if isinstance(e.data, ev.ModelCalled)]) == 1
    await resumed(make_view, started_log, 1)
    events = await served(make_view, started_log)
    assert len([e for e in events if isinstance(e.data, ev.ModelCalled)]) == reading.asked == 2
    assert any(isinstance(e.data, ev.RunCompleted) for e in events)


async def test_what_calls_need_is_looked_for_before_anything_is_spent(
    reading: Reading, make_view: Make, started_log: MemoryLog
) -> None:
    reading.missing = "There is no key."
    events = await served(make_view, started_log)
    assert paused(events) == ["There is no key. Set it."]
    reading.missing = None
    await resumed(make_view, started_log, 1)
    assert any(isinstance(e.data, ev.RunCompleted) for e in await served(make_view, started_log))


async def test_an_episode_that_was_erased_is_not_read_and_the_run_goes_on(
    reading: Reading, make_view: Make, started_log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(self: FileBlobs, ref: ev.BlobRef) -> bytes:
        raise Erased("It was erased.")

    body = ev.BlobRef(sha256="0" * 64, size=1, media="application/json")
    get = MemoryLog.get

    async def in_a_blob(self: MemoryLog, subject: str) -> Recorded | None:
        found = await get(self, subject)
        if found is None or not isinstance(found.data, ev.TrajectoryLogged):
            return found
        return msgspec.structs.replace(found, data=msgspec.structs.replace(found.data, body=None, blob=body))

    monkeypatch.setattr(FileBlobs, "get", gone)
    monkeypatch.setattr(MemoryLog, "get", in_a_blob)
    events = await served(make_view, started_log)
    train, *_ = [e.data for e in events if isinstance(e.data, ev.ToolCalled)]
    assert "is not kept any more" in str(train.error)
    assert any(isinstance(e.data, ev.RunCompleted) for e in events)


def test_what_an_author_needs_is_not_asked_for_where_it_writes_nothing() -> None:
    def missing(*levers: str) -> str | None:
        author = SimpleNamespace(ready=fails)
        config = SimpleNamespace(levers=levers)
        return _missing(SimpleNamespace(policy=object(), author=author, config=config))  # type: ignore[arg-type]

    def fails() -> None:
        raise ModelError("There is no key.")

    assert missing("harness", "weights") == "There is no key."
    assert missing("weights") is None


def test_a_fork_asks_for_nothing_that_a_call_of_another_name_said(reading: Reading) -> None:
    from bascule.runtime.redaction import Redaction
    from bascule.runtime.services.recording import asks_the_same

    called: Any = ev.ToolCalled(session="s", ordinal=0, name="look", arguments={"a": 1}, result="x")
    none = Redaction([])
    assert asks_the_same(called, CallTool(name="look", arguments={"a": 1}), none, None)
    assert not asks_the_same(called, CallTool(name="other", arguments={"a": 1}), none, None)
    assert not asks_the_same(called, CallModel(model="m", request={"a": 1}), none, None)
