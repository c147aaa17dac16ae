"""What the services perform in a simulation: each effect takes virtual time, and is looked at when it begins."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from bascule.plugins.engine import Engine
from bascule.plugins.loader import Plugins
from bascule.plugins.policy import Call, CallModel, Performed
from bascule.runtime.episodes.broker import EpisodeSpec, MakeTools
from bascule.runtime.runner import Service
from bascule.runtime.services import calls, feedback, meta, rollout, trainer, verifier
from bascule.runtime.state import RunState
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Trajectory
from tests.simulation import world
from tests.simulation.faults import TRIGGER, Process
from tests.simulation.loop import OWNER


def _process() -> Process:
    process = OWNER.get()
    assert isinstance(process, Process)
    process.alive()
    return process


def _begun(what: str, known: bool) -> Process:
    """An effect begins; ``known`` says whether the process's own folded state held its outcome already."""
    process = _process()
    process.weather.effects += 1
    process.note(f"begins {what}")
    if known:
        process.weather.problems.append(f"{process.name} began {what} although it knew the outcome")
    return process


def _state() -> RunState:
    view = _process().view
    assert view is not None
    return view.state


@contextlib.asynccontextmanager
async def _episodes(config: Any) -> AsyncIterator[rollout.Episodes]:
    async def episode(spec: EpisodeSpec, engine: Engine, tools: MakeTools) -> Trajectory:
        name, position, sample = spec.trajectory.rsplit("-", 2)
        key = int(position), int(sample[1:])
        evaluation = _state().evaluations[name]
        process = _begun(f"episode {spec.trajectory}", evaluation.completed is not None or key in evaluation.logged)
        adapter = spec.adapter
        if adapter is not None and adapter not in engine.adapters:  # type: ignore[attr-defined]
            process.weather.problems.append(f"{process.name} sampled {spec.trajectory} without the adapter {adapter}")
        await process.weather.effort()
        prompt = spec.harness.files["system_prompt.md"]
        return world.episode(world.said(prompt, adapter, spec.example["question"], key[1]))

    yield episode


class _Scoring:
    async def opinions(
        self, split: Split, example: str, answer: str | None, episode: Trajectory | None = None, *, second: bool = True
    ) -> tuple[Scored, None]:
        trigger = TRIGGER.get()
        assert trigger is not None
        logged: Any = trigger.data
        evaluation = _state().evaluations[logged.evaluation]
        known = evaluation.completed is not None or (logged.position, logged.sample) in evaluation.verdicts
        process = _begun(f"score {logged.trajectory}", known)
        await process.weather.effort()
        return world.Private().score(answer), None


@contextlib.asynccontextmanager
async def _scoring(task: str, params: dict[str, Any]) -> AsyncIterator[verifier.Scoring]:
    yield _Scoring()


def _update_begins(generation: int, iteration: int) -> None:
    training = _state().training(generation)
    assert training is not None
    _begun(f"update {generation}/{iteration}", not training.open or training.iterations > iteration)


class _Performer:
    """Makes the calls of a policy or an author."""

    async def perform(self, call: Call) -> Performed:
        view = _process().view
        assert view is not None
        asked = calls.pending(view.state, view.world)
        process = _begun("call", asked is None or asked[2] != call)
        await process.weather.effort()
        return Performed(answer=world.answered(call.request if isinstance(call, CallModel) else call.arguments))


class _Policy(_Performer, world.Policy):
    pass


class _Author(_Performer, world.Author):
    pass


@cache
def plugins() -> Plugins:
    """The plugins of the simulated run."""
    return world.plugins_with(_Policy, _Author)


def services() -> dict[str, Service]:
    """The five services, looked up anew, so that a test can plant a mistake in any of them."""
    return {
        "meta": Service(meta.NAME, meta.decide),
        "rollout": Service(rollout.NAME, rollout.decide, lambda: rollout.Rollout(_episodes)),
        "verifier": Service(verifier.NAME, verifier.decide, lambda: verifier.Verifier(_scoring)),
        "feedback": Service(feedback.NAME, feedback.decide, calls.Feedback),
        "trainer": Service(trainer.NAME, trainer.decide, lambda: trainer.Trainer(world.Backend(_update_begins))),
    }
