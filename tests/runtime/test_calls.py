"""Policies and authors that ask a model: each call is recorded, repeated by no crash and made by no replay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.policy import (
    AuthorInput,
    Call,
    CallModel,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    Performed,
    Performer,
    PolicyInput,
)
from bascule.runtime.audit.replay import replay
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import events as ev
from bascule.schemas.codec import decision_hash
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Recorded
from bascule.schemas.harness import Harness

Make = Callable[[MemoryLog], View]


class Endpoint:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def perform(self, call: Call) -> Performed:
        await asyncio.sleep(0)
        if isinstance(call, CallTool):
            self.asked.append(call.name)
            return Performed(answer={"result": "3 files"})
        self.asked.append(call.request["about"])
        return Performed(answer={"text": f"answer {len(self.asked)}"}, input_tokens=5, output_tokens=2)


class Asking:
    """A policy of two calls, and an author of a tool call and a model call, over one endpoint."""

    name = "asking"
    version = "1"

    def __init__(self, endpoint: Endpoint, *, policy: bool) -> None:
        self._endpoint = endpoint
        self._policy = policy

    async def perform(self, call: Call) -> Performed:
        return await self._endpoint.perform(call)

    def step(self, given: Any, results: Sequence[CallResult]) -> Any:
        return self._choose(given, results) if self._policy else self._write(given, results)

    def _choose(self, given: PolicyInput, results: Sequence[CallResult]) -> Call | LeverDecision:
        if given.generation > given.max_generations:
            return LeverDecision(lever="stop", reasons=("enough",))
        if len(results) < 2:
            return CallModel(model="m", request={"about": f"lever {given.generation}.{len(results)}"})
        said = [r.answer["text"] for r in results if isinstance(r, ev.ModelCalled)]
        return LeverDecision(lever="harness", reasons=tuple(said))

    def _write(self, given: AuthorInput, results: Sequence[CallResult]) -> Call | HarnessEdit | NoEdit:
        if not results:
            return CallTool(name="list", arguments={})
        if len(results) == 1:
            return CallModel(model="m", request={"about": f"edit {given.generation}"})
        assert isinstance(results[0], ev.ToolCalled)
        assert isinstance(results[1], ev.ModelCalled)
        if given.generation == 2:
            return NoEdit(reason="nothing more")
        prompt = f"{results[0].result}; {results[1].answer['text']}"
        return HarnessEdit(files={**given.harness.files, "system_prompt.md": prompt}, edit="as answered")

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        return None


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """Everything that a run of the fixtures uses now asks this endpoint."""
    found = Endpoint()
    registry = plugins().registry
    monkeypatch.setitem(registry.policies.items, "rules", lambda _: Asking(found, policy=True))
    monkeypatch.setitem(registry.authors.items, "operators", lambda _: Asking(found, policy=False))
    return found


async def finish(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read("bascule.small.>")]


ASKED = ["lever 1.0", "lever 1.1", "list", "edit 1", "lever 2.0", "lever 2.1", "list", "edit 2"]


async def test_every_call_is_recorded_with_its_cause_and_decides(
    endpoint: Endpoint, make_view: Make, started_log: MemoryLog
) -> None:
    events = await finish(make_view, started_log)
    assert any(isinstance(e.data, ev.RunCompleted) for e in events)
    assert endpoint.asked == ASKED
    ids = {e.envelope.id: e.subject for e in events}
    calls = [e for e in events if isinstance(e.data, ev.ModelCalled | ev.ToolCalled)]
    causes = [ids[e.envelope.causationid or ""] for e in calls]
    assert causes[:5] == [
        "bascule.small.candidate.g00.gate",
        "bascule.small.call.g01-policy-000.outcome",
        "bascule.small.decision.g01.lever",
        "bascule.small.call.g01-author-000.outcome",
        "bascule.small.candidate.g01.gate",
    ]
    proposed = next(e.data for e in events if isinstance(e.data, ev.HarnessProposed) and e.data.generation == 1)
    assert proposed.files["system_prompt.md"] == "3 files; answer 4"
    assert [e.data.reason for e in events if isinstance(e.data, ev.AuthorFailed)] == ["nothing more"]


async def test_a_replay_makes_no_call_and_finds_no_difference(
    endpoint: Endpoint, make_view: Make, started_log: MemoryLog
) -> None:
    events = await finish(make_view, started_log)
    made = len(endpoint.asked)
    assert replay("small", events, plugins()).differences == ()
    assert len(endpoint.asked) == made


async def test_a_changed_answer_leads_replay_to_the_decision_that_came_of_it(
    endpoint: Endpoint, make_view: Make, started_log: MemoryLog
) -> None:
    events = await finish(make_view, started_log)
    at = next(i for i, e in enumerate(events) if e.subject.endswith("g01-author-001.outcome"))
    data = events[at].data
    assert isinstance(data, ev.ModelCalled)
    events[at] = msgspec.structs.replace(events[at], data=msgspec.structs.replace(data, answer={"text": "forged"}))
    assert replay("small", events, plugins()).differences[0].subject == "bascule.small.harness.g01.outcome"


async def test_a_service_stopped_at_every_call_repeats_none_that_was_recorded(
    endpoint: Endpoint, make_view: Make, started_log: MemoryLog
) -> None:
    for target in ASKED:
        view = make_view(started_log)
        reached = asyncio.Event()

        def look(event: Recorded, target: str = target, reached: asyncio.Event = reached) -> None:
            data = event.data
            if isinstance(data, ev.ModelCalled) and data.request["about"] == target:
                reached.set()
            if isinstance(data, ev.ToolCalled) and data.name == target:
                reached.set()

        view.listeners.append(look)
        task = asyncio.create_task(serve(view, list(SERVICES.values())))
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    events = await finish(make_view, started_log)
    assert endpoint.asked == ASKED
    recorded = [e for e in events if isinstance(e.data, ev.ModelCalled | ev.ToolCalled)]
    assert len(recorded) == len(ASKED)
    assert decision_hash(events)


class Behind:
    """A log that a process sees only up to an event, until it looks up or appends anything: it was paused there."""

    def __init__(self, log: MemoryLog, seq: int) -> None:
        self._log = log
        self._seq = seq
        self._awake = asyncio.Event()

    async def head(self, filter_: str) -> int:
        return min(self._seq, await self._log.head(filter_))

    async def follow(self, filter_: str, *, after: int = 0) -> AsyncIterator[Recorded]:
        async for event in self._log.follow(filter_, after=after):
            if event.seq > self._seq:
                await self._awake.wait()
            yield event

    async def get(self, subject: str) -> Recorded | None:
        self._awake.set()
        return await self._log.get(subject)

    async def append(self, *args: Any, **options: Any) -> list[Recorded]:
        self._awake.set()
        return await self._log.append(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


async def test_a_process_that_wakes_up_behind_the_log_makes_no_call_that_another_has_recorded(
    endpoint: Endpoint, make_view: Callable[[Any], View], started_log: MemoryLog
) -> None:
    events = await finish(make_view, started_log)
    first = next(e.seq for e in events if isinstance(e.data, ev.ModelCalled))
    async with asyncio.timeout(30):
        await serve(make_view(Behind(started_log, first - 1)), [SERVICES["feedback"]])
    assert endpoint.asked == ASKED


def test_a_plugin_that_asks_without_an_endpoint_is_told_apart() -> None:
    rules = plugins().registry.policies.get("rules")({})
    assert not isinstance(rules, Performer)
    assert isinstance(Asking(Endpoint(), policy=True), Performer)
