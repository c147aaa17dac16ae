"""Makes the runs of an experiment, one after the other: what is done is taken as it is, what is under way goes on."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import product
from typing import Any

import msgspec

from bascule.plugins.loader import described, plugins
from bascule.plugins.whole import whole_file
from bascule.runtime.cli import launch
from bascule.runtime.cli.experiment_file import Experiment
from bascule.runtime.cli.store import Store, leaves
from bascule.runtime.experiments.comparison import ArmPlan, Comparison, RunLine, compare
from bascule.runtime.experiments.outcome import Folder
from bascule.runtime.experiments.votes import best_of_samples
from bascule.runtime.redaction import redact_message
from bascule.runtime.state import RunState
from bascule.runtime.world import plain, world_of
from bascule.schemas.errors import BasculeError, LogError, NotFound
from bascule.schemas.events import RunStarted

#: Besides its configuration, what makes a run another one.
_DATA = ("task_version", "task_digest", "model_digest")
_SHOWN = 60
#: Something that follows a run's events, open while the run is served.
Follow = Callable[[], AbstractContextManager[Any]]


async def make_runs(store: Store, experiment: Experiment, say: Callable[[str], None], follow: Follow) -> list[RunLine]:
    """Make every run that is not completed yet, seed by seed, so that a part of the table can be had early.

    Raises:
        LogError: the log itself fails; what any other failure ends is that run.
    """
    todo = []
    for seed, arm in product(experiment.seeds, experiment.arms):
        state = await known(store, experiment.run(arm.name, seed))
        todo.append((seed, arm, _judged(experiment, arm, seed, state), state is None))
    took: dict[str, list[float]] = {}
    lines = []
    for place, (seed, arm, judged, fresh) in enumerate(todo):
        told = f"[{place + 1}/{len(todo)}] {arm.name}, seed {seed} ({experiment.run(arm.name, seed)})"
        line = judged
        if line is None:
            left = [a.name for _, a, there, _ in todo[place:] if there is None]
            say(f"{told}: {'begins' if fresh else 'goes on'}; {len(left)} left with it, {_time_left(took, left)}")
            before = time.monotonic()
            line = await _made(store, experiment, arm, seed, fresh=fresh, follow=follow)
            if line.status == "completed":
                took.setdefault(arm.name, []).append(time.monotonic() - before)
        say(f"{told}: {line.status}" + (f": {line.reason}" if line.reason else ""))
        lines.append(line)
    return lines


def _judged(experiment: Experiment, arm: ArmPlan, seed: int, state: RunState | None) -> RunLine | None:
    """What there is to say of a run without making it; None if it is to be made, or to go on."""
    if state is None:
        return None
    line = RunLine(arm=arm.name, seed=seed, run=state.run, status=state.status)
    assert state.started is not None
    differ = differences(state.started, start_of(experiment, arm, seed))
    if differ:
        reason = f"it was started otherwise: {'; '.join(differ)}. Give the experiment another name, or make it so again"
        return msgspec.structs.replace(line, status="refused", reason=reason)
    if state.end is None:
        return None
    return line if line.status == "completed" else msgspec.structs.replace(line, reason=state.end.reason)


def start_of(experiment: Experiment, arm: ArmPlan, seed: int) -> RunStarted:
    """How a run starts."""
    started = experiment.started[arm.name]
    return msgspec.structs.replace(started, config=msgspec.structs.replace(started.config, seed=seed))


def differences(recorded: RunStarted, asked: RunStarted) -> list[str]:
    """Where a run was started otherwise, by dotted key: what is recorded, and what is asked now."""
    found = [f"its {name} was another" for name in _DATA if getattr(recorded, name) != getattr(asked, name)]
    return [*found, *_differing("", plain(recorded.config), plain(asked.config))]


def _differing(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [line for k in keys for line in _differing(f"{path}.{k}" if path else k, old.get(k), new.get(k))]
    if old == new:
        return []
    if path.startswith("harness."):
        return [f"{path} was another text"]
    return [f"{path} was {_short(old)}, and is {_short(new)}"]


def _short(value: Any) -> str:
    text = "not set" if value is None else msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


async def known(store: Store, name: str) -> RunState | None:
    """The state of a run, if there is one of that name."""
    try:
        return await launch.state_of(store, name)
    except NotFound:
        return None


async def _made(
    store: Store, experiment: Experiment, arm: ArmPlan, seed: int, *, fresh: bool, follow: Follow
) -> RunLine:
    name = experiment.run(arm.name, seed)
    line = RunLine(arm=arm.name, seed=seed, run=name, status="open")
    try:
        if fresh:
            await launch.start(store, name, start_of(experiment, arm, seed))
        else:
            await launch.resume(store, name)
        with follow() as live:
            if not fresh:
                live.skip_to(await store.log.head(f"bascule.{name}.>"))
            await launch.work(store, name, [live])
    except Exception as error:
        causes = [*leaves(error)]
        if any(isinstance(cause, LogError) for cause in causes):
            raise
        cause = next((c for c in causes if isinstance(c, BasculeError)), causes[0])
        reason = str(cause) if isinstance(cause, BasculeError) else described(cause)
        return msgspec.structs.replace(line, status="failed", reason=redact_message(reason))
    state = await launch.state_of(store, name)
    reason = state.paused or ""
    if state.end is not None and state.status != "completed":
        reason = state.end.reason
    return msgspec.structs.replace(line, status=state.status, reason=reason)


def _time_left(took: dict[str, list[float]], left: Sequence[str]) -> str:
    """An estimate from the runs that were made just now: of the same arm where there is one, else of all."""
    every = [seconds for found in took.values() for seconds in found]
    if not every:
        return "no run was made yet to tell the time from"
    seconds = sum(statistics.fmean(took.get(arm) or every) for arm in left)
    return f"about {duration(seconds)}"


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``7 min``, ``40 s``."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"


async def comparison_of(
    store: Store, experiment: Experiment, lines: Sequence[RunLine], say: Callable[[str], None]
) -> Comparison:
    """The table of the runs that are completed."""
    plans = {arm.name: arm for arm in experiment.arms}
    outcomes, notes = [], []
    for line in lines:
        if line.status != "completed":
            continue
        folder = Folder(line.run)
        async for event in store.read(line.run):
            folder.add(event)
        oracle = None
        if plans[line.arm].kind == "best-of-n":
            try:
                oracle = await _pass_at_n(store, folder, say)
            except BasculeError as error:
                notes.append(redact_message(f"pass@n of {line.run} is not known: {error}"))
        outcomes.append(folder.outcome(line.arm, oracle))
    found = compare(
        name=experiment.name,
        description=experiment.description,
        quick=experiment.quick,
        seeds=experiment.seeds,
        baselines=experiment.baselines,
        arms=experiment.arms,
        runs=lines,
        outcomes=outcomes,
    )
    return msgspec.structs.replace(found, notes=(*found.notes, *notes))


class _PassAtN(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of :func:`best_of_samples`; ``of`` is a digest of the run's start and of its episodes."""

    of: str
    rewards: dict[int, float] | None


async def _pass_at_n(store: Store, folder: Folder, say: Callable[[str], None]) -> dict[int, float] | None:
    """As :func:`best_of_samples`, which is asked once for a run: samples are many, and may be slow programs."""
    run, started, logged = folder.state.run, folder.state.started, folder.logged
    assert started is not None
    of = hashlib.sha256(msgspec.json.encode([started, *logged.values()], order="deterministic")).hexdigest()
    file = store.home / "runs" / run / "pass-at-n.json"
    with suppress(FileNotFoundError, msgspec.DecodeError):
        kept = msgspec.json.decode(file.read_bytes(), type=_PassAtN)
        if kept.of == of:
            return kept.rewards
    say(f"{run}: the samples of {len(logged)} items are scored for pass@n")
    rewards = await best_of_samples(world_of(plugins(), started), store.blobs(run), logged)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as out:
        out.write(msgspec.json.encode(_PassAtN(of=of, rewards=rewards)))
    return rewards
