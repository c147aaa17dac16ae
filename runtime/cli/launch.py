"""Start, resume, end and work off runs: what the commands ``run``, ``resume``, ``pause`` and ``ablate`` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from bascule.plugins.loader import code_hash, plugins
from bascule.plugins.tasks.splits import best_constant
from bascule.runtime.audit.baselines import score_constant
from bascule.runtime.cli.store import Store, leaves
from bascule.runtime.exports.importing import unfinished
from bascule.runtime.redaction import process_redaction, redact_log, redact_message
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.runtime.world import changed_pins, world_of
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import ConfigError, EngineError, PluginError
from bascule.schemas.events import (
    AblationRequested,
    CandidatePromoted,
    RunCancelled,
    RunCompleted,
    RunPaused,
    RunResumed,
    RunRolledBack,
    RunStarted,
    RuntimeChanged,
)

Listener = Callable[[Recorded], None]
#: Characters of a run's name that leave room for a number.
_STEM = 56


def producer(service: str) -> Producer:
    """Who this process is, as recorded in events."""
    return Producer(service=service, version=version("bascule"), hash=code_hash())


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


async def roll_back(store: Store, run: str, *, to: int, reason: str) -> int:
    """Make an earlier promoted candidate the parent again. Returns the generation that still comes to its end.

    Where the next generation's choice is open already, that is the one: it may be on its way at a model.

    Raises:
        NotFound: there is no such run.
        ConfigError: it has ended or stopped, or ``to`` is none of its promoted candidates.
    """
    state = await state_of(store, run)
    if state.end is not None:
        raise ConfigError(
            f"The run {run} has ended, so nothing follows from a rollback.",
            next_step=f"Fork it where it went wrong: bascule whatif {run} --from STEP --execute.",
        )
    promoted = [n for n, s in sorted(state.steps.items()) if isinstance(s.gate, CandidatePromoted)]
    if to not in promoted:
        known = ", ".join(map(str, promoted)) or "none yet"
        raise ConfigError(f"The candidate {to} of {run} was not promoted.", next_step=f"Promoted were: {known}.")
    last = max(state.steps)
    if (lever := state.steps[last].lever) is not None and lever.lever == "stop":
        raise ConfigError(
            f"The run {run} has stopped, and its sealed split is being scored, so nothing follows from a rollback.",
            next_step=f"Fork it where it went wrong: bascule whatif {run} --from STEP --execute.",
        )
    if to == (state.best if state.rollback is None else state.rollback):
        raise ConfigError(f"The candidate {to} of {run} is the parent already.", next_step="Nothing is to be done.")
    data = RunRolledBack(generation=to, reason=reason)
    draft = Draft(subject=subjects.run_rolled_back(run, state.rollbacks + 1), step=0, data=data)
    recorded = await view_of(store, run).append("cli", [draft])
    if recorded[0].duplicate:
        raise ConfigError(f"Somebody else rolled {run} back at this moment.", next_step=f"See `bascule status {run}`.")
    return state.open_choice or last


async def work(store: Store, run: str, listeners: Sequence[Listener]) -> None:
    """Serve a run with all five services until it needs nothing more.

    Where the engine fails, the run is paused with what a person can do about it.
    """
    try:
        await serve(view_of(store, run, listeners), list(SERVICES.values()))
    except Exception as error:
        causes = [*leaves(error)]
        state = await state_of(store, run) if all(isinstance(c, EngineError) for c in causes) else None
        if state is None or state.end is not None:
            raise
        said = redact_message(str(causes[0])).replace("bascule resume RUN", f"bascule resume {run}")
        step = "" if "bascule resume" in said else f" Then `bascule resume {run}` goes on."
        await end(store, run, cancel=False, reason=f"{said}{step}")


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
