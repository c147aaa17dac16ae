"""The verifier service gives a scorer what it wants: whole episodes, a sandbox for programs; and records what holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from bascule.plugins.loader import Plugins, load_plugins
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.permissions import may_append
from bascule.runtime.runner import Service, View, serve
from bascule.runtime.services import verifier
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.services.probing import probed
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import BasculeError
from bascule.schemas.sandbox import SandboxConfig
from bascule.schemas.trajectory import ModelCall, Scored, Trajectory, Unscored
from bascule.verifiers.sandbox.probe import choose
from bascule.verifiers.scoring import Scorer
from tests.plugin_site import install_plugin

RUN = "small"


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    site = tmp_path / "site"
    install_plugin(site, "counting", Path(__file__).with_name("counting.py").read_text())
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return load_plugins()


async def started(plugins: Plugins, home: Path, require: Sequence[str]) -> tuple[MemoryLog, View]:
    given = {
        "task": {"name": "counting"},
        "engine": {"name": "constant", "params": {"text": "7"}},
        "levers": ["harness"],
        "max_generations": 0,
        "evaluation": {"dev_examples": 10, "sealed_examples": 2, "train_groups": 2, "train_samples": 1},
        "sandbox": {"require": list(require)},
    }
    log = MemoryLog()
    view = View(log, FileBlobs(home / "blobs"), plugins, RUN, producer, home=home, fresh=True)
    data = preflight(configure(given, [], plugins), plugins)
    await view.append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=data)])
    return log, View(log, FileBlobs(home / "blobs"), plugins, RUN, producer, home=home, fresh=True)


async def events_of(log: MemoryLog) -> list[Recorded]:
    return [event async for event in log.read(f"bascule.{RUN}.>")]


async def test_a_scorer_of_episodes_sees_each_as_it_was_recorded_and_may_run_programs(
    counting: Plugins, tmp_path: Path
) -> None:
    log, view = await started(counting, tmp_path, ())
    await serve(view, list(SERVICES.values()))
    events = await events_of(log)
    blobs = FileBlobs(tmp_path / "blobs")
    verdicts = {e.data.trajectory: e.data.verdict for e in events if isinstance(e.data, ev.TrajectoryScored)}
    kinds = set()
    for logged in (e.data for e in events if isinstance(e.data, ev.TrajectoryLogged)):
        body = logged.body
        if body is None:
            assert logged.blob is not None
            body = msgspec.json.decode(await blobs.get(logged.blob), type=Trajectory)
        calls = sum(isinstance(step, ModelCall) for step in body.steps)
        assert calls == (2 if logged.example.startswith("add") else 1)
        verdict = verdicts[logged.trajectory]
        long = logged.body is None
        split = view.state.evaluations[logged.evaluation].request.split
        if split == "sealed":
            assert verdict == Scored(reward=2.0 * calls, passed=long), "what a program said"
        elif split == "dev" and calls == 1:
            assert verdict == Unscored(reason="The scorer gave 2 step rewards for 1 model calls.")
        else:
            assert verdict == Scored(reward=float(calls), passed=long, steps=(1.0,) * calls)
        kinds.add((split, type(verdict), long))
    assert {("dev", Scored, True), ("dev", Scored, False)} <= kinds, "in the event, and in a blob"
    assert ("dev", Unscored, True) in kinds or ("dev", Unscored, False) in kinds
    (found,) = [e.data for e in events if isinstance(e.data, ev.SandboxProbed) and e.data.service == "verifier"]
    assert found.report.holds == choose(SandboxConfig(require=()))[1].holds


async def test_a_run_whose_sandbox_cannot_be_had_is_not_scored(counting: Plugins, tmp_path: Path) -> None:
    report = choose(SandboxConfig(require=()))[1]
    less = msgspec.structs.replace(report, holds=tuple(layer for layer in report.holds if layer != "network"))
    sandbox = SandboxConfig(require=("network",))
    effects = partial(verifier.Verifier, partial(Scorer, sandbox=sandbox, report=less))
    log, view = await started(counting, tmp_path, ("network",))
    with pytest.raises(ExceptionGroup) as caught:
        await serve(view, [Service(verifier.NAME, verifier.decide, effects)])
    (error,) = caught.value.exceptions
    assert isinstance(error, BasculeError)
    assert "network" in str(error)
    assert not [e for e in await events_of(log) if isinstance(e.data, ev.SandboxProbed | ev.TrajectoryScored)]


async def test_what_a_process_found_of_its_sandbox_is_recorded_once(counting: Plugins, tmp_path: Path) -> None:
    log, view = await started(counting, tmp_path, ())
    report = choose(SandboxConfig(require=()))[1]
    await probed(view, "verifier", report)
    await probed(view, "verifier", report)
    await probed(view, "rollout", report)
    found = [e for e in await events_of(log) if isinstance(e.data, ev.SandboxProbed)]
    assert [e.data.service for e in found] == ["verifier", "rollout"]
    assert len({e.data.worker for e in found}) == 1
    for event in found:
        assert may_append(event.data.service, event.subject)
