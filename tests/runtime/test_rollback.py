"""Taking promotions back: an earlier candidate is the parent again, from the end of the generation under way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.loader import Plugins, load_plugins
from bascule.runtime.audit import replay as audit
from bascule.runtime.cli import launch
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.services.inputs import tried
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError
from tests.plugin_site import install_plugin
from tests.runtime.conftest import RUN, SMALL

Make = Callable[[MemoryLog], View]
#: An author whose every edit works out more sums than the one before: those of numbers up to a bound.
SOLVERS = '''
from bascule.plugins import hookimpl
from bascule.plugins.policy import HarnessEdit

SOLVER = """
import re

def solve(example, model, tools, context):
    a, sign, b = re.match(r"(\\\\d+) ([+-]) (\\\\d+)", example["question"]).groups()
    if max(int(a), int(b)) > BOUND:
        return "none"
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))
"""

class Solvers:
    name, version = "solvers", "1"

    def step(self, given, results):
        bound = 6 + 5 * given.generation
        files = {**given.harness.files, "harness.py": SOLVER.replace("BOUND", str(bound))}
        return HarnessEdit(files=files, edit=f"up to {bound}")

    def edits_left(self, harness, tried):
        return None

@hookimpl
def bascule_register(registry):
    registry.author("solvers", lambda params: Solvers(), version="1")
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    install_plugin(tmp_path / "site", "solvers", SOLVERS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sys.modules.pop("bascule_solvers", None)
    return load_plugins()


@pytest.fixture
def make_view(tmp_path: Path, installed: Plugins) -> Make:
    def make(log: MemoryLog) -> View:
        return View(log, FileBlobs(tmp_path / "blobs"), installed, RUN, producer, home=tmp_path, fresh=True)

    return make


@pytest.fixture
async def log(make_view: Make, installed: Plugins) -> MemoryLog:
    config: dict[str, Any] = {
        **SMALL,
        "author": {"name": "solvers"},
        "max_generations": 3,
        "evaluation": {**SMALL["evaluation"], "dev_examples": 100},
    }
    log = MemoryLog()
    started = preflight(configure(config, [], installed), installed)
    await make_view(log).append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=started)])
    return log


class Store:
    """As much of a store as the command asks for."""

    def __init__(self, log: MemoryLog, make_view: Make) -> None:
        self.log, self.make_view = log, make_view

    def read(self, run: str) -> Any:
        return self.log.read(f"bascule.{run}.>")


@pytest.fixture
def roll_back(make_view: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(launch, "view_of", lambda store, *_: store.make_view(store.log))

    async def of(log: MemoryLog, to: int) -> int | None:
        return await launch.roll_back(Store(log, make_view), RUN, to=to, reason="it games the verifier")  # type: ignore[arg-type]

    return of


async def serve_until(view: View, there: Callable[[Recorded], bool]) -> None:
    reached = asyncio.Event()
    view.listeners.append(lambda e: reached.set() if there(e) else None)
    task = asyncio.create_task(serve(view, list(SERVICES.values())))
    done = asyncio.create_task(reached.wait())
    await asyncio.wait({task, done}, return_when=asyncio.FIRST_COMPLETED)
    for each in (task, done):
        each.cancel()
    await asyncio.gather(task, done, return_exceptions=True)
    assert reached.is_set()


def again(event: Recorded) -> NewEvent:
    return NewEvent(subject=event.subject, payload=event.payload)


async def test_after_a_rollback_the_earlier_candidate_is_the_parent(
    make_view: Make, log: MemoryLog, roll_back: Callable[..., Any], installed: Plugins
) -> None:
    await serve_until(make_view(log), lambda e: e.subject.endswith("candidate.g02.proposed"))
    assert await roll_back(log, 0) == 2
    with pytest.raises(ConfigError, match="is the parent already"):
        await roll_back(log, 0)
    view = make_view(log)
    await serve(view, list(SERVICES.values()))
    events = [e async for e in log.read(f"bascule.{RUN}.>")]
    state = RunState.of(RUN, events)
    gates = {n: s.gate for n, s in state.steps.items() if s.gate is not None}
    # What was under way is judged against the parent that it was made from; what follows, against the other one.
    assert {n: (type(g).__name__, g.over) for n, g in gates.items()} == {
        0: ("CandidatePromoted", None),
        1: ("CandidatePromoted", 0),
        2: ("CandidatePromoted", 1),
        3: ("CandidatePromoted", 0),
    }
    assert state.step(3).lever is not None
    assert state.step(3).lever.parent == 0  # type: ignore[union-attr]
    assert state.step(3).harness.parent == state.candidate(0).harness  # type: ignore[union-attr]
    assert tried(state, 0) == ("up to 11", "up to 21"), "what was promoted and taken back was tried"
    assert isinstance(state.end, ev.RunCompleted)
    assert state.end.best == 3
    assert state.digest() == view.state.digest()
    assert audit.replay(RUN, events, installed).differences == ()


async def test_what_is_rolled_back_before_the_stop_is_not_what_the_run_ends_with(
    make_view: Make, log: MemoryLog, roll_back: Callable[..., Any], installed: Plugins
) -> None:
    whole = MemoryLog()
    await whole.append([again(e) async for e in log.read(f"bascule.{RUN}.>")])
    await serve(make_view(whole), list(SERVICES.values()))
    events = [e async for e in whole.read(f"bascule.{RUN}.>")]
    stop = next(i for i, e in enumerate(events) if isinstance(e.data, ev.LeverChosen) and e.data.lever == "stop")
    assert isinstance(events[stop].data, ev.LeverChosen)
    for event in events[1:stop]:
        await log.append([again(event)])
    await roll_back(log, 1)  # while the choice is open
    await serve(make_view(log), list(SERVICES.values()))
    events = [e async for e in log.read(f"bascule.{RUN}.>")]
    state = RunState.of(RUN, events)
    assert isinstance(state.end, ev.RunCompleted)
    assert state.end.best == 1
    sealed = {
        e.data.generation for e in events if isinstance(e.data, ev.EpisodesRequested) and e.data.split == "sealed"
    }
    assert sealed == {0, 1, 3}
    assert audit.replay(RUN, events, installed).differences == ()


async def test_what_cannot_be_rolled_back_is_refused(
    make_view: Make, log: MemoryLog, roll_back: Callable[..., Any]
) -> None:
    await serve_until(make_view(log), lambda e: e.subject.endswith("candidate.g01.proposed"))
    before = [e.seq async for e in log.read(f"bascule.{RUN}.>")]
    with pytest.raises(ConfigError, match="The candidate 1 of small was not promoted") as refused:
        await roll_back(log, 1)
    assert refused.value.next_step == "Promoted were: 0."
    with pytest.raises(ConfigError, match="is the parent already"):
        await roll_back(log, 0)
    assert [e.seq async for e in log.read(f"bascule.{RUN}.>")] == before
    await serve_until(make_view(log), lambda e: isinstance(e.data, ev.LeverChosen) and e.data.lever == "stop")
    with pytest.raises(ConfigError, match="has stopped, and its sealed split is being scored"):
        await roll_back(log, 0)
    await serve(make_view(log), list(SERVICES.values()))
    with pytest.raises(ConfigError, match="has ended"):
        await roll_back(log, 0)
