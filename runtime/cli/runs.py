"""Commands that start, follow, end and report runs. Each imports what it needs when it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bascule.runtime.cli.command import (
    Credentials,
    Debug,
    Exit,
    Home,
    Json,
    Profile,
    Run,
    Set,
    Url,
    app,
    live_progress,
    make_console,
    on_store,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from bascule.runtime.audit.report import BaselineRow, Reporter, RunReport
    from bascule.runtime.cli.store import Store
    from bascule.runtime.state import RunState
    from bascule.schemas.envelope import Recorded


@app.command()
def run(
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "--task-file",
            help="The task; `bascule tasks` lists them. Or the file or folder of one's own. The profile's, else arith.",
        ),
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option("--task-dir", "--task_dir", help="A SIA task directory, as it is; instead of --task.")
    ] = None,
    max_gen: Annotated[
        int | None, typer.Option("--max-gen", "--max_gen", help="Lever choices after the first harness.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", "--run_id", help="Name of the run; <task>-<n> by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")] = None,
    levers: Annotated[str | None, typer.Option(help="harness, weights, or harness,weights.")] = None,
    model: Annotated[str | None, typer.Option(help="An embedded model's name, or a local Hugging Face folder.")] = None,
    engine: Annotated[str | None, typer.Option(help="Inference engine; `bascule plugins` lists them.")] = None,
    policy: Annotated[str | None, typer.Option(help="Who chooses the lever.")] = None,
    author: Annotated[str | None, typer.Option(help="Who writes harnesses.")] = None,
    harness: Annotated[
        Path | None, typer.Option(help="A folder with the first harness, instead of the task's own.")
    ] = None,
    regime: Annotated[
        str | None, typer.Option(help="The rules that a task is played under, where it has several (lawbench).")
    ] = None,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe-no-sandbox", help="Run harnesses and candidates unconfined; every result is marked."),
    ] = False,
    profile: Profile = None,
    set_: Set = None,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Improve a model on a task: run the five services until the loop stops, and report.

    With --url the run is only started and followed; `bascule serve` processes do the work.
    """
    from bascule.plugins.loader import plugins
    from bascule.runtime.cli import configuration, launch
    from bascule.runtime.cli.harness_folder import harness_in
    from bascule.runtime.cli.own_tasks import stem_of
    from bascule.runtime.cli.profiles import asked_task, attributed, read_profile
    from bascule.runtime.cli.sia import directory_named
    from bascule.runtime.cli.store import home_folder, open_store

    found = read_profile(profile, plugins()) if profile is not None else None
    given: dict[str, Any] = {
        "task": asked_task(task if task_dir is None else directory_named(task_dir), regime, found),
        "max_generations": max_gen,
        "seed": seed,
        "levers": [part.strip() for part in levers.split(",") if part.strip()] if levers is not None else None,
        "model": model,
        "engine": {"name": engine} if engine else None,
        "policy": {"name": policy} if policy else None,
        "author": {"name": author} if author else None,
        "sandbox": {"unsafe": True} if unsafe else None,
        "harness": harness_in(harness) if harness is not None else None,
    }
    with attributed(found):
        config = configuration.configure(given, set_ or [], plugins(), found.values if found else None)
        started = configuration.preflight(config, plugins())
    for caution in configuration.cautions(started):
        typer.echo(caution, err=True)

    async def execute() -> None:
        async with open_store(
            home_folder(home), url=url, credentials=credentials, exclusive=url is None, writes=True
        ) as store:
            name = run_id if run_id is not None else await launch.free_run_id(store, stem_of(config.task))
            await launch.start(store, name, started)
            await _follow(store, name, as_json, serve=url is None)

    run_async(execute())


@app.command()
def resume(
    run: Run,
    accept: Annotated[
        bool, typer.Option("--accept-changes", help="Go on under other code than the run is pinned to; recorded.")
    ] = False,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was killed or paused: nothing that the log holds is done again."""
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(
            home_folder(home), url=url, credentials=credentials, exclusive=url is None, writes=True
        ) as store:
            todo = await launch.resume(store, run, accept=accept)
            await _follow(store, run, as_json, serve=url is None and todo, skip=True)

    run_async(execute())


async def _follow(store: Store, name: str, as_json: bool, *, serve: bool, skip: bool = False) -> None:
    """Serve or watch a run to its end with live progress, then report it."""
    from rich.markup import escape

    from bascule.runtime.cli import launch

    with live_progress(as_json) as live:
        live.say(escape(f"log: {store.home}; run: {name}"))
        if skip:
            live.skip_to(await store.log.head(f"bascule.{name}.>"))
        await (launch.work if serve else launch.watch)(store, name, [live])
    result = await _report(store, name, picture=True)
    if as_json:
        print_json(result)
    else:
        from bascule.runtime.cli.show import show_report

        show_report(result, make_console())
    if result.status != "completed":
        raise typer.Exit(Exit.DIFFERS)


@app.command()
@on_store
async def status(
    store: Store,
    run: Annotated[str | None, typer.Argument(help="One run in full; all runs in a line each without it.")] = None,
    as_json: Json = False,
) -> int:
    """What runs there are, and how far they are; also while they run. Exit 2 if one of them cannot be read."""
    from bascule.runtime.cli.show import show_report, show_runs
    from bascule.schemas.errors import Corrupt, SchemaError

    if run is not None:
        result = await _report(store, run, picture=False)
        print_json(result) if as_json else show_report(result, make_console())
        return Exit.SAME
    results, damaged = [], []
    async for name in store.runs():
        try:
            results.append((await _reporter(store, name)).report())
        except (Corrupt, SchemaError) as e:
            damaged.append({"run": name, "error": str(e)})
    if as_json:
        print_json([*results, *damaged])
    else:
        show_runs(results, make_console())
        for one in damaged:
            typer.echo(f"{one['run']}: {one['error']}", err=True)
    return Exit.NOT_INTACT if damaged else Exit.SAME


@app.command()
def ablate(
    run: Run,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Where a completed run's gain comes from: its final harness on an engine that always answers the same, and without
    its adapter. Both are measured on the sealed split and recorded in the run's log."""
    from bascule.runtime.audit.ablation import ablation_report
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.show import show_ablation
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(
            home_folder(home), url=url, credentials=credentials, exclusive=url is None, writes=True
        ) as store:
            constant = await launch.request_ablations(store, run)
            with live_progress(as_json) as live:
                live.skip_to(await store.log.head(f"bascule.{run}.>"))
                await (launch.work if store.owner else launch.watch)(store, run, [live])
            rows = ablation_report(await store.events(run), constant)
        print_json(rows) if as_json else show_ablation(rows, make_console())

    run_async(execute())


async def _ending(store: Store, run: str, reason: str, as_json: bool, *, cancel: bool) -> None:
    from bascule.runtime.cli import launch

    await launch.end(store, run, cancel=cancel, reason=reason)
    now = "cancelled" if cancel else "paused"
    print_json({"run": run, "status": now}) if as_json else typer.echo(f"{run}: {now}")


Reason = Annotated[str, typer.Option(help="Recorded with it.")]


@app.command()
@on_store
async def pause(store: Store, run: Run, reason: Reason = "asked for", as_json: Json = False) -> None:
    """Make the services let go of a run; `bascule resume` goes on from what the log holds."""
    await _ending(store, run, reason, as_json, cancel=False)


@app.command()
@on_store
async def cancel(store: Store, run: Run, reason: Reason = "asked for", as_json: Json = False) -> None:
    """End a run for good."""
    await _ending(store, run, reason, as_json, cancel=True)


@app.command()
@on_store
async def rollback(
    store: Store,
    run: Run,
    to: Annotated[str, typer.Option("--to", help="The promoted candidate, by its generation: 2 or g02.")],
    reason: Reason = "asked for",
    as_json: Json = False,
) -> None:
    """Take promotions back: an earlier candidate is the parent again, once the generation under way is over."""
    from bascule.runtime.cli import launch
    from bascule.schemas.errors import ConfigError

    digits = to.removeprefix("g")
    if not (digits.isascii() and digits.isdigit()):
        raise ConfigError(f"--to {to!r} names no candidate.", next_step="Give its generation, for example --to 2.")
    after = await launch.roll_back(store, run, to=int(digits), reason=reason)
    line = f"{run}: candidate {int(digits)} is the parent again once generation {after} is over"
    print_json({"run": run, "to": int(digits), "after": after}) if as_json else typer.echo(line)


async def _reporter(store: Store, name: str, *listeners: Callable[[Recorded], None]) -> Reporter:
    from bascule.runtime.audit.report import Reporter

    reporter = Reporter(name)
    async for event in store.read(name):
        reporter.add(event)
        for listener in listeners:
            listener(event)
    return reporter


async def _report(store: Store, name: str, *, picture: bool) -> RunReport:
    import msgspec

    from bascule.runtime.audit.looks import looks
    from bascule.runtime.audit.repeats import Outcomes
    from bascule.runtime.audit.report import draw
    from bascule.runtime.cli.sia import HandedIn

    outcomes, handed_in = Outcomes(), HandedIn()
    reporter = await _reporter(store, name, outcomes.add, handed_in.add)
    rollouts, updates = outcomes.repeated(store.home / "runs" / name / "services.jsonl")
    started = reporter.state.started
    found = reporter.report(await _baselines(reporter.state, compute=picture))
    result = msgspec.structs.replace(
        found,
        repeated_rollouts=rollouts,
        repeated_updates=updates,
        looks=0 if started is None else sum((await looks(store.log.read, started.config.task)).values()),
        notes=(*found.notes, *(await handed_in.notes(started.config) if picture and started else ())),
    )
    if picture and result.generations:
        path = store.home / "runs" / name / "report.png"
        await asyncio.to_thread(draw, result, path)
        result = msgspec.structs.replace(result, picture=str(path))
    return result


async def _baselines(state: RunState, *, compute: bool) -> list[BaselineRow]:
    """The task's baselines on the sealed split, once the run has looked at it.

    Args:
        compute: score them if nothing is remembered, which can take a minute.
    """
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.baselines import baselines_once, remembered_baselines
    from bascule.runtime.audit.report import BaselineRow
    from bascule.runtime.world import world_of
    from bascule.schemas.events import RunCompleted

    if state.started is None or not isinstance(state.end, RunCompleted):
        return []
    world = world_of(plugins(), state.started)
    scores = await baselines_once(world, ("sealed",)) if compute else remembered_baselines(world, ("sealed",))
    return [
        BaselineRow(name=name, sealed=found.score, unscored=found.unscored, reason=found.reason)
        for name, by_split in (scores or {}).items()
        if (found := by_split.get("sealed")) is not None
    ]
