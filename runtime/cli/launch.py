"""Start, resume and serve runs: what the commands ``run``, ``resume``, ``ablate`` and ``serve`` do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from bascule.plugins.loader import Plugins, code_hash, plugins
from bascule.plugins.tasks.splits import best_constant
from bascule.runtime.audit.baselines import score_constant
from bascule.runtime.cli.store import Store, leaves
from bascule.runtime.exports.importing import unfinished
from bascule.runtime.log.rules import MAX_BATCH
from bascule.runtime.redaction import process_redaction, redact_log
from bascule.runtime.runner import Service, View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.services.rollout import engine_params
from bascule.runtime.state import RunState
from bascule.runtime.world import World, changed_pins, merged, plain, task_digest, world_of
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import ConfigError, PluginError
from bascule.schemas.events import (
    AblationRequested,
    RunCancelled,
    RunCompleted,
    RunPaused,
    RunResumed,
    RunStarted,
    RuntimeChanged,
)
from bascule.schemas.run import PluginChoice, RunConfig, parse_config
from bascule.trainers.params import train_params

Listener = Callable[[Recorded], None]
#: Characters of a run's name that leave room for a number.
_STEM = 56


@cache
def _code() -> str:
    return code_hash()


def producer(service: str) -> Producer:
    """Who this process is, as recorded in events."""
    return Producer(service=service, version=version("bascule"), hash=_code())


def configure(given: dict[str, Any], overrides: Sequence[str], loaded: Plugins) -> RunConfig:
    """The run's configuration: the task's defaults, then the user's values.

    Raises:
        ConfigError: an unknown task, plugin, field or value.
    """
    base = {k: v for k, v in given.items() if v is not None}
    for item in overrides:
        base = merged(base, override(item))
    if not isinstance(base.get("task"), dict) or not isinstance(base["task"].get("params", {}), dict):
        raise ConfigError(f"{base.get('task')!r} does not name a task.", next_step="`bascule tasks` lists them.")
    # A resume may come from another folder.
    if isinstance(base.get("model"), str) and "\0" not in base["model"] and Path(base["model"]).exists():
        base["model"] = str(Path(base["model"]).absolute())
    engine = base.get("engine")
    path = engine["params"].get("path") if isinstance(engine, dict) and isinstance(engine.get("params"), dict) else None
    if isinstance(path, str):
        base = merged(base, {"engine": {"params": {"path": str(Path(path).absolute())}}})
    task = loaded.registry.tasks.get(str(base["task"]["name"]))(base["task"].get("params", {}))
    defaults = plain(RunConfig(task=PluginChoice(name=task.name)))
    return parse_config(merged(merged(defaults, task.defaults()), base))


def override(item: str) -> dict[str, Any]:
    """``KEY=VALUE`` as nested configuration values; VALUE is JSON, or else text.

    A plugin may be named alone (``policy=rules``), and its parameters without ``params`` (``policy.patience=2``).

    Raises:
        ConfigError: it is not KEY=VALUE.
    """
    import msgspec

    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item!r} is not KEY=VALUE.", next_step="For example --set gate.alpha=0.01.")
    try:
        value: Any = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = text
    parts = key.split(".")
    if parts[0] in ("task", "engine", "policy", "author"):
        if len(parts) == 1 and isinstance(value, str):
            parts.append("name")
        elif len(parts) == 2 and parts[1] not in ("name", "params"):
            parts.insert(1, "params")
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def preflight(config: RunConfig, loaded: Plugins) -> RunStarted:
    """Check everything that can be checked before anything is recorded or spent, and pin it.

    Raises:
        BasculeError: a plugin, the task's data or the model is not there or not usable.
    """
    world = World(loaded, config)
    loaded.registry.engines.get(config.engine.name)(config.model, engine_params(config, config.engine))
    _ = world.policy, world.author
    for algorithm in world.algorithms:
        train_params(algorithm.params)
    public = world.public
    check_splits(world)
    digest = ""
    if config.engine.name == "transformers" or "weights" in config.levers:
        from bascule.trainers.base_model import model_digest, resolve_model

        digest = model_digest(resolve_model(config.model))
    return RunStarted(
        config=config,
        task_version=public.version,
        task_digest=task_digest(public),
        train=len(world.positions("train")),
        dev=len(world.positions("dev")),
        sealed=len(world.positions("sealed")),
        model_digest=digest,
        plugins=world.pins(),
    )


def check_splits(world: World) -> None:
    """Refuse a task that a run could not get through.

    Raises:
        ConfigError: a split is empty, a train item has no answer, or a decision would ask for too many shards.
    """
    public, e = world.public, world.config.evaluation
    for split in ("train", "dev", "sealed"):
        if not public.split(split):
            raise ConfigError(
                f"The split {split} of the task {public.name} is empty.", next_step="A run needs all three."
            )
    missing = [x.id for x in public.train if x.id not in public.answers]
    if missing:
        raise ConfigError(
            f"The task {public.name} has no answer for the train item {missing[0]!r}.", next_step="Correct the task."
        )
    sizes = (len(world.positions("dev")) + e.train_groups, 2 * len(world.positions("sealed")))
    shards = max(-(-size // world.config.shard_size) for size in sizes) + 4
    if shards > MAX_BATCH:
        raise ConfigError(
            f"A decision would ask for {shards} shards, and an atomic batch holds {MAX_BATCH} events.",
            next_step="Raise shard_size, or lower the evaluation sizes.",
        )


async def free_run_id(store: Store, stem: str) -> str:
    """The first unused ``<stem>-<number>``."""
    taken = {r async for r in store.runs()}
    stem = subjects.token(stem.replace(":", "-").lower()[:_STEM])
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def view_of(store: Store, run: str, listeners: Sequence[Listener] = (), *, fresh: bool | None = None) -> View:
    """A view of one run, logging to ``<home>/runs/<run>/services.jsonl``.

    Raises:
        ConfigError: the run was written only in part.
    """
    if unfinished(store.home, run):
        raise ConfigError(
            f"The import of {run}, or the what-if that makes it, is under way or was cut short.",
            next_step="Import it again; make a what-if again under another --run-id.",
        )
    folder = store.home / "runs" / subjects.token(run)
    folder.mkdir(parents=True, exist_ok=True)
    view = View(
        store.log,
        store.blobs(run),
        plugins(),
        run,
        producer,
        home=store.home,
        writers=store.writers,
        fresh=store.owner if fresh is None else fresh,
        anchor=store.anchor,
        logger=service_log(folder / "services.jsonl", run),
    )
    view.listeners.extend(listeners)
    return view


def service_log(path: Path, run: str) -> Any:
    """A structured log: one JSON object a line, in append mode, so that it survives a kill."""
    file = path.open("a", encoding="utf-8", buffering=1)
    logger = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Without the values of local variables, which are cut to a length: half a key is no longer known as one.
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            redact_log,
            structlog.processors.JSONRenderer(),
        ],
    )
    return logger.bind(run=run)


async def start(store: Store, run: str, started: RunStarted) -> None:
    """Record the run's start.

    Raises:
        ConfigError: the name is taken.
    """
    taken = ConfigError(
        f"There is a run {run!r} already.",
        next_step=f"`bascule resume {run}` goes on with it; or use another --run-id.",
    )
    if process_redaction().text(run) != run:
        raise ConfigError("The run's name looks like a key, and would stand in every event.", next_step="Use another.")
    if await store.log.head(f"bascule.{subjects.token(run)}.>"):
        raise taken
    draft = Draft(subject=subjects.run_started(run), step=0, data=started)
    recorded = await view_of(store, run).append("cli", [draft])
    if recorded[0].duplicate:
        raise taken


async def state_of(store: Store, run: str) -> RunState:
    """A run's state.

    Raises:
        NotFound: there is no such run.
    """
    state = RunState(run=run)
    async for event in store.read(run):
        state.apply(event)
    return state


async def resume(store: Store, run: str, *, accept: bool = False) -> bool:
    """Lift a pause, if there is one. Returns whether the run has anything left to do.

    Args:
        accept: go on under other code than the run is pinned to, and record that.

    Raises:
        PluginError: the code is not what the run is pinned to, and ``accept`` is not given.
    """
    state = await state_of(store, run)
    if state.end is not None and not state.active:
        return False
    if not accept:
        check_pins(state)
    changes = pinned(state)
    drafts = []
    if changes:
        assert state.started is not None
        data = RuntimeChanged(plugins=world_of(plugins(), state.started).pins(), changes=changes)
        drafts.append(Draft(subject=subjects.runtime_changed(run, state.runtimes + 1), step=0, data=data))
    if state.paused is not None:
        drafts.append(Draft(subject=subjects.run_resumed(run, state.pauses), step=0, data=RunResumed()))
    if drafts:
        await view_of(store, run).append("cli", drafts)
    return True


def pinned(state: RunState) -> tuple[str, ...]:
    """How the installed code differs from what a run is pinned to."""
    assert state.started is not None
    return changed_pins(plugins(), state.started)


def check_pins(state: RunState) -> None:
    """Refuse to serve a run under other code.

    Raises:
        PluginError: the code is not what the run is pinned to.
    """
    changes = pinned(state)
    if changes:
        raise PluginError(
            f"The run {state.run} is pinned to other code: {'; '.join(changes)}.",
            next_step=f"Install what it is pinned to, or `bascule resume {state.run} --accept-changes`, which is "
            "recorded.",
        )


async def end(store: Store, run: str, *, cancel: bool, reason: str) -> None:
    """Pause or cancel a run.

    Raises:
        NotFound: there is no such run; ConfigError: it has ended already.
    """
    state = await state_of(store, run)
    ended = ConfigError(f"The run {run} has ended already.", next_step=f"`bascule status {run}` shows how.")
    if state.end is not None:
        raise ended
    if cancel:
        draft = Draft(subject=subjects.run_end(run), step=0, data=RunCancelled(reason=reason))
    elif state.paused is not None:
        return
    else:
        draft = Draft(subject=subjects.run_paused(run, state.pauses + 1), step=0, data=RunPaused(reason=reason))
    recorded = await view_of(store, run).append("cli", [draft])
    if cancel and recorded[0].duplicate:
        raise ended


async def work(store: Store, run: str, listeners: Sequence[Listener]) -> None:
    """Serve a run with all five services until it needs nothing more."""
    await serve(view_of(store, run, listeners), list(SERVICES.values()))


async def watch(store: Store, run: str, listeners: Sequence[Listener]) -> None:
    """Follow a run that other processes serve, until it needs nothing more."""
    await view_of(store, run, listeners).follow([])


async def request_ablations(store: Store, run: str) -> float:
    """Ask for the two ablations of a completed run; asking again is harmless.

    Returns:
        What the constant answer scores on the sealed split without any harness.

    Raises:
        ConfigError: the run is not completed.
        PluginError: the code is not what the run is pinned to.
    """
    state = await state_of(store, run)
    if not isinstance(state.end, RunCompleted):
        raise ConfigError(f"The run {run} is not completed.", next_step=f"`bascule resume {run}` goes on with it.")
    assert state.started is not None
    check_pins(state)
    world = world_of(plugins(), state.started)
    answer = best_constant(world.public)
    best = state.end.best
    arms: list[AblationRequested] = [
        AblationRequested(name="constant", arm="constant-engine", generation=best, answer=answer)
    ]
    if state.candidate(best).adapter is not None:
        arms.append(AblationRequested(name="no-adapter", arm="no-adapter", generation=best))
    for arm in arms:
        await view_of(store, run).append(
            "cli", [Draft(subject=subjects.ablation_requested(run, arm.name), step=best, data=arm)]
        )
    return await score_constant(world, answer)


def service_named(name: str) -> Service:
    """A service by name.

    Raises:
        ConfigError: there is no such service.
    """
    if name not in SERVICES:
        raise ConfigError(f"There is no service {name!r}.", next_step=f"Known: {', '.join(SERVICES)}.")
    return SERVICES[name]


async def serve_forever(store: Store, service: Service, only: str | None, say: Callable[[str], None]) -> None:
    """Serve one service for every run of the log, each run on its own; a failing run does not stop the others.

    A run that has ended is taken up again when ablations are asked for.
    """
    serving: set[str] = set()

    async def one(run: str) -> None:
        if run in serving:
            return
        serving.add(run)
        delay = 1.0
        try:
            while not await attempt(run, delay):
                await asyncio.sleep(delay)
                delay = min(delay * 2, 60.0)
        finally:
            serving.discard(run)

    async def resumed(view: View) -> None:
        async for event in store.log.follow(f"bascule.{view.run}.run.>", after=view.state.seq):
            if isinstance(event.data, RunResumed | RunCancelled):
                return

    async def attempt(run: str, delay: float) -> bool:
        if unfinished(store.home, run):
            say(f"{run}: it is not whole yet. Looking again in {delay:.0f} s.")
            return False
        if await _finished(store, run):
            return True
        view = view_of(store, run, fresh=False)
        try:
            state = await state_of(store, run)
            if state.end is not None and not state.active:
                return True
            if state.paused is None:
                check_pins(state)
            say(f"{run}: serving {service.name}")
            await serve(view, [service])
            if view.state.paused is not None:
                say(f"{run}: paused")
                await resumed(view)
                return False
            say(f"{run}: done")
        except* Exception as errors:
            text = view.redaction.value("; ".join(str(e) or type(e).__name__ for e in leaves(errors)))
            view.logger.exception("service.failed", service=service.name)
            say(f"{run}: {text} Trying again in {delay:.0f} s.")
        else:
            return True
        return False

    async def each(pattern: str, group: asyncio.TaskGroup) -> None:
        async for event in store.log.follow(pattern):
            group.create_task(one(event.envelope.run))

    runs = subjects.token(only) if only else "*"
    async with asyncio.TaskGroup() as group:
        group.create_task(each(f"bascule.{runs}.run.run.started", group))
        group.create_task(each(f"bascule.{runs}.ablation.*.requested", group))


async def _finished(store: Store, run: str) -> bool:
    """Whether a run has ended and was never asked for more; says so without reading all of it."""
    if not await store.log.head(subjects.run_end(run)):
        return False
    return not await store.log.head(f"bascule.{run}.ablation.>")
