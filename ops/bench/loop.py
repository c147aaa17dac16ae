"""Where the wall-clock of a run goes, and what the log, the processes and the scoring cost over the bare loop.

A short run of the embedded task is made, and each instant of it goes to what was under way, by the times in its log.
Beside it, in the same process and on the same prompts, the bare loop: the same engine and the same trainer without a
log, harness processes or a scoring process.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bascule.plugins.engine import SampleRequest
from bascule.plugins.loader import plugins
from bascule.runtime.cli import configuration, launch
from bascule.runtime.cli.store import open_store
from bascule.runtime.engines.transformers import make
from bascule.runtime.state import Evaluation, RunState
from bascule.runtime.training.data import groups_of, load_trajectories
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.trajectory import ModelCall, Trajectory, unpack_ids
from bascule.trainers.base_model import resolve_model
from bascule.trainers.loop import TrainJob
from ops.bench.report import Figure, figure

STEPS = 6
GIVEN: dict[str, Any] = {"task": {"name": "arith"}, "max_generations": 2}
SETTINGS = [f"algorithms.grpo.steps={STEPS}"]
#: What an instant counts as when several things are under way: the first of these.
ORDER = ("update", "episodes: training", "episodes: gate", "episodes: landscape", "episodes: report")


def _time(event: Recorded) -> float:
    return datetime.fromisoformat(event.envelope.time).timestamp()


def spans(events: Sequence[Recorded]) -> list[tuple[str, float, float]]:
    """What was under way, from when to when (seconds since the epoch)."""
    asked: dict[str, float] = {}
    done: dict[str, float] = {}
    found = []
    for event in events:
        data = event.data
        if isinstance(data, ev.EpisodesRequested):
            asked.setdefault(data.evaluation, _time(event))
        elif isinstance(data, ev.EvaluationCompleted):
            done[data.evaluation] = _time(event)
            found.append((f"episodes: {data.purpose}", asked[data.evaluation], _time(event)))
        elif isinstance(data, ev.AdapterCheckpointed) and data.adapter in done:
            found.append(("update", done[data.adapter], _time(event)))
    return found


def attribute(events: Sequence[Recorded]) -> dict[str, float]:
    """Seconds by what was under way; what is left is between the lines."""
    found = spans(events)
    marks = sorted({t for _, a, b in found for t in (a, b)} | {_time(events[0]), _time(events[-1])})
    totals = dict.fromkeys((*ORDER, "rest"), 0.0)
    for a, b in itertools.pairwise(marks):
        under_way = {name for name, start, end in found if start <= a and end >= b}
        totals[next((n for n in ORDER if n in under_way), "rest")] += b - a
    return totals


def run() -> tuple[dict[str, Figure], list[str]]:
    """Make the run and the bare loop, and compare an iteration of each."""
    return asyncio.run(_run())


async def _run() -> tuple[dict[str, Figure], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.configure(GIVEN, SETTINGS, plugins())
        started = configuration.preflight(config, plugins())
        async with open_store(Path(folder), exclusive=True) as store:
            before = time.perf_counter()
            await launch.start(store, "bench", started)
            await launch.work(store, "bench", [])
            wall = time.perf_counter() - before
            events = await store.events("bench")
            view = launch.view_of(store, "bench")
            for event in events:
                view.state.apply(event)
            bare = await _bare(view, view.state, events)
    totals = attribute(events)
    lengths = _iterations(events)
    middle = statistics.median(lengths)
    ratio = statistics.median(bare) / middle
    figures = {name: figure([seconds], "s") for name, seconds in totals.items()}
    figures["wall-clock"] = figure([wall], "s")
    figures["training iteration"] = figure(lengths, "s", baseline="the bare loop", ratio=ratio)
    figures["bare iteration"] = figure(bare, "s")
    parts = ", ".join(f"{name} {seconds / sum(totals.values()):.0%}" for name, seconds in totals.items())
    return figures, [parts, f"{len(events)} events; an iteration is 32 prompts of 8 samples and one update"]


def _iterations(events: Sequence[Recorded]) -> list[float]:
    """Seconds from one checkpoint to the next."""
    times = [_time(e) for e in events if isinstance(e.data, ev.AdapterCheckpointed)]
    return [b - a for a, b in itertools.pairwise(times)]


def _trained_from(events: Sequence[Recorded]) -> list[Evaluation]:
    """The evaluation of each iteration as it was when it was completed; later the state forgets it."""
    state = RunState(run=events[0].envelope.run)
    found = []
    for event in events:
        state.apply(event)
        if isinstance(event.data, ev.EvaluationCompleted) and event.data.purpose == "training":
            found.append(copy.copy(state.evaluations[event.data.evaluation]))
    return found


async def _bare(view: Any, state: RunState, events: Sequence[Recorded]) -> list[float]:
    """The same prompts through the same engine, and the same trajectories through the same trainer."""
    training = next(s.training for s in state.steps.values() if s.training is not None)
    request = training.request
    algorithm = plugins().registry.algorithms.get(request.algorithm)
    engine = make(state.config.model, {})
    await engine.start()
    job = TrainJob(resolve_model(state.config.model), algorithm, request.params, request.seed)
    seconds = []
    for iteration, evaluation in enumerate(_trained_from(events)):
        trajectories = await load_trajectories(view, evaluation)
        asked = [_request(name, t, engine) for name, t in trajectories.items()]
        before = time.perf_counter()
        await asyncio.gather(*(engine.sample(r) for r in asked))
        await asyncio.to_thread(job.update, groups_of(evaluation, trajectories), trajectories, iteration)
        seconds.append(time.perf_counter() - before)
    await engine.close()
    return seconds[1:]


def _request(name: str, trajectory: Trajectory, engine: Any) -> SampleRequest:
    call = next(s for s in trajectory.steps if isinstance(s, ModelCall))
    text = engine.decode(unpack_ids(call.prompt_ids))
    return SampleRequest(trajectory=name, call=0, prompt=text, n=1, sampling=call.sampling, seed=call.seed)
