"""Trials: an author tries harnesses on train items, with real episodes and scores, each recorded once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.plugins.authors.suggesting import SUGGEST
from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.loader import plugins
from bascule.plugins.policy import (
    TRIAL,
    AuthorInput,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    TrialRequest,
    TrialResult,
)
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.harness_files import literal, reference_files
from bascule.runtime.audit.replay import replay
from bascule.runtime.audit.whatif import Fork, whatif
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.services.workbench import Workbench
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import EngineError
from bascule.schemas.harness import Harness
from tests.runtime.conftest import RUN, SMALL

#: It adds by itself, as far as it is told to; asks no model.
ADDS = """
import importlib.util

PARAMS = {
    "limit": 2,  # the largest result that it knows
    "minus": False,
}
TUNABLE = {"limit": {"low": 0, "high": 60, "integer": True}, "minus": {"values": [False, True]}}


def solve(example, model, tools, context):
    left, sign, right = example["question"].split()[:3]
    result = int(left) + int(right) if sign == "+" else int(left) - int(right)
    known = result <= PARAMS["limit"] and (sign == "+" or PARAMS["minus"])
    return str(result) if known else "unknown"
"""
ASKS = "def solve(example, model, tools, context):\n    return model.chat([{'role': 'user', 'content': 'x'}])[0].text\n"
#: It answers from the train items that it was prepared with, and has a remark where an item is not among them.
RECALLS = """
def prepare(data, context):
    return {item["input"]["question"]: item["answer"] for item in data}


def solve(example, model, tools, context):
    assert len(context.prepared) > 100
    return context.prepared.get(example["question"], "not seen")
"""
TRIALS = 5
Make = Callable[[MemoryLog], View]


class Adding(Arith):
    """The task arith with a first harness that declares what can be tuned; its scorer stays what it is."""

    def harness(self) -> dict[str, str]:
        return {**reference_files(name="adds", system_prompt="Add.", params={}), "harness.py": ADDS}


class Counted(ConstantEngine):
    """Counts how often it is made, started and closed, and fails for trials where it is told to."""

    made = started = closed = 0
    failing = False

    async def start(self) -> EngineInfo:
        Counted.started += 1
        return await super().start()

    async def close(self) -> None:
        Counted.closed += 1
        await super().close()

    async def sample(self, request: SampleRequest) -> Sampled:
        if Counted.failing and "author" in request.trajectory:
            raise EngineError("The model is gone.", next_step="Put it back.")
        return await super().sample(request)


def engine(model: str, params: Mapping[str, Any]) -> Counted:
    Counted.made += 1
    return Counted(params["text"])


@pytest.fixture(autouse=True)
def adding(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = plugins().registry
    monkeypatch.setitem(registry.tasks.items, "arith", Adding)
    monkeypatch.setitem(registry.engines.items, "constant", engine)
    monkeypatch.setattr(Counted, "made", 0)
    monkeypatch.setattr(Counted, "started", 0)
    monkeypatch.setattr(Counted, "closed", 0)
    monkeypatch.setattr(Counted, "failing", False)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls whose trials were begun."""
    names: list[str] = []
    trial = Workbench.trial

    async def noted(self: Workbench, request: TrialRequest, name: str) -> TrialResult:
        names.append(name)
        return await trial(self, request, name)

    monkeypatch.setattr(Workbench, "trial", noted)
    return names


async def started(make_view: Make, author: str, params: dict[str, Any], generations: int = 1) -> MemoryLog:
    log = MemoryLog()
    values = {**SMALL, "author": {"name": author, "params": params}, "max_generations": generations}
    begin = preflight(configure(values, [], plugins()), plugins())
    await make_view(log).append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=begin)])
    Counted.made = Counted.started = Counted.closed = 0
    return log


async def finish(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read(f"bascule.{RUN}.>")]


def forked(events: list[Recorded], **author: Any) -> Fork:
    """The run decided again from its first step on, the author with other parameters if any are given."""
    config = RunState.of(RUN, events).config
    choice = msgspec.structs.replace(config.author, **author)
    return whatif(
        events,
        "other",
        step=1,
        config=msgspec.structs.replace(config, author=choice),
        changes={},
        plugins=plugins(),
        producers={s: producer(s) for s in (*SERVICES, "cli")},
    )


def of(events: Sequence[Recorded], kind: type[Any]) -> list[Any]:
    return [e.data for e in events if isinstance(e.data, kind)]


async def test_the_tuner_improves_a_harness_by_real_trials_and_a_replay_makes_none(
    make_view: Make, tried: list[str]
) -> None:
    log = await started(make_view, "tuner", {"trials": TRIALS, "positions": 16})
    events = await finish(make_view, log)
    calls = of(events, ev.ToolCalled)
    assert tried == [f"g01-author-{i:03d}" for i in range(0, 2 * TRIALS, 2)]
    assert [(c.session, c.ordinal) for c in calls] == [("g01-author", i) for i in range(2 * TRIALS - 1)]
    assert [c.name for c in calls] == [TRIAL, *[SUGGEST, TRIAL] * (TRIALS - 1)]
    results = [msgspec.json.decode(c.result, type=TrialResult) for c in calls if c.name == TRIAL]
    assert {(r.n, len(r.rewards), r.errors, r.unscored) for r in results} == {(16, 16, 0, 0)}
    assert max(r.score for r in results) > results[0].score
    edited = of(events, ev.HarnessProposed)[1]
    assert (edited.author, edited.edit.startswith("tune-1: ")) == ("tuner", True)
    assert literal(edited.files["harness.py"], "PARAMS")["limit"] > 2
    assert any(g.generation == 1 for g in of(events, ev.CandidatePromoted))
    sealed = of(events, ev.RunCompleted)[0].sealed
    assert sealed.after > sealed.before
    assert Counted.made == 1, "a harness that asks no model needs no engine but rollout's"
    assert replay(RUN, events, plugins()).differences == ()
    same, other = forked(events), forked(events, params={"trials": TRIALS, "positions": 15})
    assert same.stopped_at is None, "a fork that asks for the same trials takes them from the log"
    assert other.stopped_at == "call 0 of g01-author"
    assert len(tried) == TRIALS


async def test_a_run_that_is_stopped_between_trials_repeats_none(make_view: Make, tried: list[str]) -> None:
    log = await started(make_view, "tuner", {"trials": TRIALS, "positions": 4})
    view = make_view(log)
    reached = asyncio.Event()

    def look(event: Recorded) -> None:
        if isinstance(event.data, ev.ToolCalled) and event.data.ordinal == 2:
            reached.set()

    view.listeners.append(look)
    task = asyncio.create_task(serve(view, list(SERVICES.values())))
    waiting = asyncio.create_task(reached.wait())
    # A run that fails ends the wait at once; the limit is many times what a slow machine needs.
    await asyncio.wait({task, waiting}, timeout=600, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert reached.is_set(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    before = list(tried)
    events = await finish(make_view, log)
    assert before[:2] == ["g01-author-000", "g01-author-002"]
    # One may have been under way, and is made again; none whose result was recorded.
    assert not {"g01-author-000", "g01-author-002"} & set(tried[len(before) :])
    assert [c.ordinal for c in of(events, ev.ToolCalled)] == list(range(2 * TRIALS - 1))
    assert of(events, ev.RunCompleted)


class Trying:
    """Asks for given trials, one after the other, and proposes nothing."""

    name = "trying"
    version = "1"

    def __init__(self, requests: Sequence[dict[str, Any]]) -> None:
        self._requests = requests

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> CallTool | HarnessEdit | NoEdit:
        if len(results) < len(self._requests):
            return CallTool(name=TRIAL, arguments=self._requests[len(results)])
        return NoEdit(reason="enough")

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        return None


async def results(make_view: Make, monkeypatch: pytest.MonkeyPatch, *requests: dict[str, Any]) -> list[ev.ToolCalled]:
    """What comes of the requests."""
    monkeypatch.setitem(plugins().registry.authors.items, "operators", lambda _: Trying(requests))
    log = await started(make_view, "operators", {})
    calls: list[ev.ToolCalled] = of(await finish(make_view, log), ev.ToolCalled)
    assert len(calls) == len(requests)
    return calls


async def test_what_is_wrong_with_a_harness_is_the_result_of_its_trial(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = reference_files(name="h", system_prompt="", params={})["manifest.json"]
    bad: list[dict[str, str | None]] = [
        {"harness.py": "def solve(:"},
        {"system_prompt.md": None},
        {"manifest.json": manifest.replace('"tools"', '"packages": ["numpy"], "tools"')},
        {"harness.py": "def solve(example, model, tools, context):\n    raise ValueError('no idea')\n"},
    ]
    calls = await results(
        make_view, monkeypatch, *({"files": files, "positions": [0, 3], "samples": 2} for files in bad)
    )
    found = [msgspec.json.decode(c.result or "", type=TrialResult) for c in calls]
    assert [(r.score, r.n, r.errors) for r in found] == [(0.0, 2, 4)] * 4
    for said, r in zip(("does not parse", "system_prompt.md", "numpy", "no idea"), found, strict=True):
        assert said in r.message
    assert Counted.made == 1


async def test_a_trial_in_a_batch_is_prepared_without_the_items_that_it_asks(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = reference_files(name="h", system_prompt="", params={})["manifest.json"]
    batch = manifest.replace('"params"', '"isolation": "batch", "data": "train", "params"')
    files = {"harness.py": RECALLS, "manifest.json": batch}
    (call,) = await results(make_view, monkeypatch, {"files": files, "positions": list(range(12))})
    found = msgspec.json.decode(call.result or "", type=TrialResult)
    assert (found.errors, found.message) == (0, "")
    assert found.rewards == (0.0,) * 12


async def test_a_request_that_nobody_can_try_is_the_calls_error(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = len(Adding({}).public().train)
    calls = await results(
        make_view,
        monkeypatch,
        {"files": {}, "positions": []},
        {"files": {}, "positions": [n]},
        {"files": {}, "positions": [-1]},
        {"files": {}, "positions": [1, 1]},
        {"files": {}, "positions": [1], "samples": 0},
        {"files": {"harness.py": 1}, "positions": [1]},
        {"positions": [1]},
    )
    assert [c.result for c in calls] == [None] * 7
    said = ["needs a train item", f"no train item {n}", "no train item -1", "once", "a sample", "harness.py", "files"]
    assert all(part in (c.error or "") for part, c in zip(said[:5], calls[:5], strict=True))
    assert all("no request for a trial" in (c.error or "") for c in calls[5:])


async def test_trials_whose_harness_asks_the_model_share_the_engine_of_rollout(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"files": {"harness.py": ASKS}, "positions": list(range(20)), "samples": 1}
    first, second = await results(make_view, monkeypatch, request, request)
    assert first.result == second.result
    found = msgspec.json.decode(first.result or "", type=TrialResult)
    public = Adding({}).public()
    sevens = sum(public.answers[public.train[p].id] == "7" for p in range(20))
    assert found.score == pytest.approx(sevens / 20), "the engine answers 7"
    assert found.errors == 0
    assert (Counted.made, Counted.started, Counted.closed) == (1, 1, 1)


async def test_an_engine_that_fails_stops_the_service_and_leaves_the_trial_to_be_made(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"files": {"harness.py": ASKS}, "positions": [0, 1, 2]}
    monkeypatch.setitem(plugins().registry.authors.items, "operators", lambda _: Trying([request]))
    log = await started(make_view, "operators", {})
    Counted.failing = True
    with pytest.RaisesGroup(pytest.RaisesExc(EngineError, match="The model is gone")):
        await finish(make_view, log)
    assert not of([e async for e in log.read(f"bascule.{RUN}.>")], ev.ToolCalled)
    Counted.failing = False
    events = await finish(make_view, log)
    assert len(of(events, ev.ToolCalled)) == 1


async def test_the_workbench_leaves_no_process_and_no_file_behind(make_view: Make, tmp_path: Path) -> None:
    log = await started(make_view, "tuner", {"trials": 2, "positions": 2})
    await finish(make_view, log)
    left = [p for p in tmp_path.rglob("*") if p.is_file() and "blobs" not in p.parts]
    assert left == []
