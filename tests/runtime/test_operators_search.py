"""The author ``operators`` in a whole run: its trials are recorded, decide what is proposed, and are made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from bascule.plugins.engine import Sampled, SampleRequest
from bascule.plugins.loader import plugins
from bascule.plugins.policy import TRIAL, TrialResult
from bascule.runtime.audit.replay import replay
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.harness import make_harness
from tests.runtime.conftest import RUN, SMALL

Make = Callable[[MemoryLog], View]


class Imitating(ConstantEngine):
    """Adds up where the lines before the question show how, more surely if the last one has an operand in common."""

    async def sample(self, request: SampleRequest) -> Sampled:
        told = ConstantEngine("I do not know")
        if isinstance(request.prompt, str):
            *shots, question = request.prompt.split("\n")
            left, sign, right = question.split()[:3]
            if shots and shots[-1].split()[0] == left:
                told = ConstantEngine(str(int(left) + int(right) if sign == "+" else int(left) - int(right)))
        return await told.sample(request)


def engine(model: str, params: Mapping[str, Any]) -> Imitating:
    return Imitating("")


async def searched(make_view: Make, generations: int, **params: Any) -> list[Recorded]:
    log = MemoryLog()
    values = {**SMALL, "author": {"name": "operators", "params": params}, "max_generations": generations}
    begin = preflight(configure(values, [], plugins()), plugins())
    await make_view(log).append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=begin)])
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read(f"bascule.{RUN}.>")]


def of(events: list[Recorded], kind: type[Any]) -> list[Any]:
    return [e.data for e in events if isinstance(e.data, kind)]


async def test_the_edit_that_helps_this_model_is_found_by_trials_and_a_replay_makes_none(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plugins().registry.engines.items, "constant", engine)
    events = await searched(make_view, 1, episodes=120, candidates=8)
    calls = of(events, ev.ToolCalled)
    assert {c.name for c in calls} == {TRIAL}
    assert [c.ordinal for c in calls] == list(range(len(calls)))
    results = [msgspec.json.decode(c.result, type=TrialResult) for c in calls]
    assert sum(r.n for r in results) <= 120
    assert not any(r.errors or r.unscored for r in results), next(r.message for r in results if r.message)
    proposed = of(events, ev.HarnessProposed)[1]
    # What is nearest often has an operand in common, what is drawn hardly ever.
    assert proposed.edit == "completion-nearest-8"
    assert make_harness(proposed.files).manifest.data == "train"
    assert [g.generation for g in of(events, ev.CandidatePromoted)] == [0, 1]
    sealed = of(events, ev.RunCompleted)[0].sealed
    assert sealed.after > sealed.before == 0
    assert replay(RUN, events, plugins()).differences == ()


async def test_where_nothing_helps_the_generation_ends_without_a_candidate_and_none_is_left(make_view: Make) -> None:
    events = await searched(make_view, 2, episodes=40, candidates=4)
    failed = of(events, ev.AuthorFailed)
    assert [f.generation for f in failed] == [1]
    assert "None of 4 edits was better" in failed[0].reason
    assert [c.lever for c in of(events, ev.LeverChosen)] == ["harness", "stop"]
    assert replay(RUN, events, plugins()).differences == ()
