"""The commands. Each imports what it needs when it runs, so that ``--help`` stays quick."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bascule.schemas.errors import BasculeError, Corrupt, SchemaError

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.runtime.cli.store import Store
    from bascule.runtime.report import BaselineRow, RunReport
    from bascule.schemas.envelope import Recorded

T = TypeVar("T")

app = typer.Typer(
    help="Agents that improve themselves on two levers, harness and weights, with a log that proves what they did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
tasks_app = typer.Typer(help="List the tasks, or look at one.", no_args_is_help=False)
app.add_typer(tasks_app, name="tasks")

Home = Annotated[
    Path | None,
    typer.Option(help="Where the log and the blobs are. Also BASCULE_HOME; the user's data folder by default."),
]
Url = Annotated[
    str | None, typer.Option(help="A NATS server, nats://[user:password@]host:port, instead of the embedded one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]
Run = Annotated[str, typer.Argument(help="The run's name; `bascule status` lists them.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class Exit:
    """Exit codes: what was asked for holds, a difference was found, the log is not intact, wrong usage or a failure."""

    SAME = 0
    DIFFERS = 1
    NOT_INTACT = 2
    USAGE = 3


def _console(*, err: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=err)
    # A pipe or a file has no width; a table cut to 80 columns helps nobody there.
    return console if console.is_terminal else Console(stderr=err, width=140)


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _execute(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; SIGINT and SIGTERM end it without waiting for what computes in threads."""
    import signal

    stopped: list[int] = []

    def stop(number: int, task: asyncio.Task[Any]) -> None:
        stopped.append(number)
        task.cancel()
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    async def drained() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number, task)
        try:
            return await work
        except asyncio.CancelledError:
            if not stopped:
                raise
            # Nothing is lost: the log holds what was done, and a training step that still computes is not part of it.
            sys.stderr.write("\nStopped. `bascule status` lists the runs, `bascule resume RUN` goes on from the log.\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + stopped[0])

    return asyncio.run(drained())


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    from bascule.runtime.cli.progress import Live

    with Live(_console(err=quiet)) as live:
        yield live


@app.command()
def run(
    task: Annotated[str, typer.Option(help="The task; `bascule tasks` lists them.")] = "arith",
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
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration value, e.g. --set gate.alpha=0.01. Repeatable.")
    ] = None,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Improve a model on a task: run the five services until the loop stops, and report.

    With --url the run is only started and followed; `bascule serve` processes do the work.
    """
    from bascule.plugins.loader import plugins
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    given: dict[str, Any] = {
        "task": {"name": task},
        "max_generations": max_gen,
        "seed": seed,
        "levers": [part.strip() for part in levers.split(",") if part.strip()] if levers is not None else None,
        "model": model,
        "engine": {"name": engine} if engine else None,
        "policy": {"name": policy} if policy else None,
        "author": {"name": author} if author else None,
    }
    config = launch.configure(given, set_ or [], plugins())
    started = launch.preflight(config, plugins())

    async def execute() -> None:
        async with open_store(home_folder(home), url=url, exclusive=url is None) as store:
            name = run_id if run_id is not None else await launch.free_run_id(store, config.task.name)
            await launch.start(store, name, started)
            await _follow(store, name, as_json, serve=url is None)

    _execute(execute())


@app.command()
def resume(run: Run, home: Home = None, url: Url = None, as_json: Json = False, debug: Debug = False) -> None:
    """Go on with a run that was killed or paused: nothing that the log holds is done again."""
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(home_folder(home), url=url, exclusive=url is None) as store:
            todo = await launch.resume(store, run)
            await _follow(store, run, as_json, serve=url is None and todo, skip=True)

    _execute(execute())


async def _follow(store: Store, name: str, as_json: bool, *, serve: bool, skip: bool = False) -> None:
    """Serve or watch a run to its end with live progress, then report it."""
    from rich.markup import escape

    from bascule.runtime.cli import launch

    with _progress(as_json) as live:
        live.say(escape(f"log: {store.home}; run: {name}"))
        if skip:
            live.skip_to(await store.log.head(f"bascule.{name}.>"))
        await (launch.work if serve else launch.watch)(store, name, [live])
    result = await _report(store, name, picture=True)
    if as_json:
        _print_json(result)
    else:
        from bascule.runtime.cli.show import show_report

        show_report(result, _console())
    if result.status != "completed":
        raise typer.Exit(Exit.DIFFERS)


async def _report(store: Store, name: str, *, picture: bool) -> RunReport:
    import msgspec

    from bascule.runtime.repeats import repeated_work
    from bascule.runtime.report import draw, report

    events = await store.events(name)
    rollouts, updates = repeated_work(store.home / "runs" / name / "services.jsonl", events)
    result = msgspec.structs.replace(
        report(events, await _baselines(events)), repeated_rollouts=rollouts, repeated_updates=updates
    )
    if picture and result.generations:
        path = store.home / "runs" / name / "report.png"
        await asyncio.to_thread(draw, result, path)
        result = msgspec.structs.replace(result, picture=str(path))
    return result


async def _baselines(events: list[Recorded]) -> list[BaselineRow]:
    """The task's baselines on the sealed split, once the run has looked at it."""
    from bascule.plugins.loader import plugins
    from bascule.runtime.baselines import score_baselines
    from bascule.runtime.report import BaselineRow
    from bascule.runtime.world import world_of
    from bascule.schemas.events import RunCompleted, RunStarted

    started = events[0].data
    if not isinstance(started, RunStarted) or not any(isinstance(e.data, RunCompleted) for e in events):
        return []
    scores = await score_baselines(world_of(plugins(), started), ("sealed",))
    return [BaselineRow(name=name, sealed=by_split["sealed"]) for name, by_split in scores.items()]


@app.command()
def broker(
    port: Annotated[int, typer.Option(help="0 lets the server choose.", min=0, max=65535)] = 0,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the embedded NATS server by itself, for `bascule serve` processes on this machine. Prints its address."""
    from bascule.runtime.cli.store import home_folder
    from bascule.runtime.log.server import EmbeddedServer

    server = EmbeddedServer.start(home_folder(home), port=port)
    url = server.url.replace("://", f"://{server.user}:{server.password}@", 1)
    if as_json:
        _print_json({"url": url, "pid": server.pid})
    else:
        typer.echo(url)
    sys.stdout.flush()
    try:
        server.wait()
    finally:
        server.stop()


@app.command()
def serve(
    service: Annotated[str, typer.Argument(help="meta, rollout, verifier, feedback or trainer.")],
    url: Annotated[str, typer.Option(help="The NATS server, nats://[user:password@]host:port.")],
    run: Annotated[str | None, typer.Option(help="Serve this run only.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Run one of the five services against a NATS server, for every run, until stopped.

    Any number of rollout and verifier processes share the work. All processes need the same blob folder (--home).
    """
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    console = _console(err=True)
    found = launch.service_named(service)

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            console.print(f"{service}: serving", highlight=False)
            await launch.serve_forever(
                store, found, run, lambda text: console.print(text, highlight=False, markup=False)
            )

    _execute(execute())


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="One run in full; all runs in a line each without it.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What runs there are, and how far they are; also while they run."""
    from bascule.runtime.cli.show import show_report, show_runs
    from bascule.runtime.cli.store import home_folder, open_store
    from bascule.runtime.report import report

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            if run is not None:
                result = await _report(store, run, picture=False)
                _print_json(result) if as_json else show_report(result, _console())
                return
            results = [report(await store.events(name)) async for name in store.runs()]
            _print_json(results) if as_json else show_runs(results, _console())

    _execute(execute())


@app.command()
def log(
    run: Run,
    type_: Annotated[
        str | None, typer.Option("--type", help="Only events whose type ends so, e.g. lever.chosen.")
    ] = None,
    home: Home = None,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="The recorded bytes, one event a line.")] = False,
    debug: Debug = False,
) -> None:
    """The events of a run, in order."""
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            for event in await store.events(run):
                if type_ is not None and not event.envelope.type.endswith(type_):
                    continue
                if as_json:
                    sys.stdout.buffer.write(event.payload + b"\n")
                else:
                    e = event.envelope
                    sys.stdout.write(
                        f"{event.seq:>7}  {e.time[:23]}  {e.producer.service:<9} {e.type:<30} {e.subject}\n"
                    )
            sys.stdout.flush()

    _execute(execute())


@app.command()
def explain(
    run: Run,
    step: Annotated[int, typer.Argument(help="The generation whose lever choice is to be explained.")],
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Why a step pulled this lever and chose this algorithm: figures, options, reasons, causes."""
    from bascule.runtime import replay as audit
    from bascule.runtime.cli.show import show_explanation
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            found = audit.explain(await store.events(run), step)
        _print_json(found) if as_json else show_explanation(found, _console())

    _execute(execute())


@app.command()
def replay(run: Run, home: Home = None, url: Url = None, as_json: Json = False, debug: Debug = False) -> None:
    """Make every decision of a run again from the log, and compare. No model, no network. Exit 1 if any differs."""
    from bascule.plugins.loader import plugins
    from bascule.runtime import replay as audit
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> int:
        from rich.markup import escape

        async with open_store(home_folder(home), url=url) as store:
            result = audit.replay(run, await store.events(run), plugins())
        if as_json:
            _print_json(result)
        else:
            console = _console()
            for d in result.differences:
                console.print(
                    f"[red]differs[/] at {d.seq or 'the end'}: {d.subject} {escape(d.path)}\n"
                    f"  recorded {escape(repr(d.recorded))}\n  replayed {escape(repr(d.replayed))}",
                    highlight=False,
                )
            console.print(
                f"{run}: {result.decisions} decisions of {result.events} events made again, "
                f"{len(result.differences)} differences, decision hash {result.decision_hash}",
                highlight=False,
            )
        return Exit.DIFFERS if result.differences else Exit.SAME

    raise typer.Exit(_execute(execute()))


@app.command()
def verify(run: Run, home: Home = None, url: Url = None, as_json: Json = False, debug: Debug = False) -> None:
    """Check a run's log: order, identities, causes, schemas, blobs. Exit 2 if it is not intact."""
    from bascule.runtime import replay as audit
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> int:
        from rich.markup import escape

        async with open_store(home_folder(home), url=url) as store:
            try:
                events = await store.events(run)
            except (Corrupt, SchemaError) as e:
                events = []
                faults: tuple[audit.Fault, ...] = (audit.Fault(seq=0, subject=f"bascule.{run}", what=str(e)),)
            else:
                faults = audit.verify(events, store.blobs(run))
        if as_json:
            _print_json({"run": run, "events": len(events), "faults": faults})
        else:
            console = _console()
            for f in faults:
                console.print(
                    f"[red]fault[/] at {f.seq} ({f.subject}): {escape(f.what)}", highlight=False, soft_wrap=True
                )
            console.print(f"{run}: {len(events)} events, {len(faults)} faults", highlight=False)
        return Exit.NOT_INTACT if faults else Exit.SAME

    raise typer.Exit(_execute(execute()))


@app.command()
def ablate(run: Run, home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """Where a completed run's gain comes from: its final harness on an engine that always answers the same, and without
    its adapter. Both are measured on the sealed split and recorded in the run's log."""
    from bascule.runtime.ablation import ablation_report
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.show import show_ablation
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(home_folder(home), exclusive=True) as store:
            constant = await launch.request_ablations(store, run)
            with _progress(as_json) as live:
                live.skip_to(await store.log.head(f"bascule.{run}.>"))
                await launch.work(store, run, [live])
            rows = ablation_report(await store.events(run), constant)
        _print_json(rows) if as_json else show_ablation(rows, _console())

    _execute(execute())


def _ending(run: str, home: Path | None, url: str | None, *, cancel: bool, reason: str) -> None:
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            await launch.end(store, run, cancel=cancel, reason=reason)

    _execute(execute())


Reason = Annotated[str, typer.Option(help="Recorded with it.")]


@app.command()
def pause(run: Run, reason: Reason = "asked for", home: Home = None, url: Url = None, debug: Debug = False) -> None:
    """Make the services let go of a run; `bascule resume` goes on from what the log holds."""
    _ending(run, home, url, cancel=False, reason=reason)


@app.command()
def cancel(run: Run, reason: Reason = "asked for", home: Home = None, url: Url = None, debug: Debug = False) -> None:
    """End a run for good."""
    _ending(run, home, url, cancel=True, reason=reason)


@tasks_app.callback(invoke_without_command=True)
def tasks(context: typer.Context, as_json: Json = False) -> None:
    """List the tasks."""
    if context.invoked_subcommand is not None:
        return
    from bascule.plugins.loader import plugins

    registry = plugins().registry
    rows = {name: registry.tasks.get(name)({}).summary for name in sorted(registry.tasks.items)}
    if as_json:
        _print_json(rows)
        return
    for name, summary in rows.items():
        typer.echo(f"{name:<20} {summary}")


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="The task.")], as_json: Json = False, debug: Debug = False
) -> None:
    """What an author would see of a task: its description, splits, licence, and some train items."""
    from bascule.plugins.loader import plugins

    public = plugins().registry.tasks.get(name)({}).public()
    sizes = {s: len(public.split(s)) for s in ("train", "dev", "sealed")}
    if as_json:
        _print_json(
            {
                "name": name,
                "version": public.version,
                "description": public.description,
                "splits": sizes,
                "source": public.source,
                "licence": public.licence,
                "train": [{"input": e.input, "answer": public.answers[e.id]} for e in public.train[:5]],
            }
        )
        return
    typer.echo(f"{name} (version {public.version})\n\n{public.description}\n")
    typer.echo("splits: " + ", ".join(f"{k} {v}" for k, v in sizes.items()))
    typer.echo(f"source: {public.source}\nlicence: {public.licence}\n\ntrain items:")
    for e in public.train[:5]:
        typer.echo(f"  {e.input.get('question', e.input)}  ->  {public.answers[e.id]}")


@tasks_app.command("baseline")
def tasks_baseline(
    name: Annotated[str, typer.Argument(help="The task.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Score a task's constant and simple-rule baselines in the scoring process."""
    from bascule.plugins.loader import plugins
    from bascule.runtime.baselines import score_baselines
    from bascule.runtime.world import World
    from bascule.schemas.run import PluginChoice, RunConfig

    world = World(plugins(), RunConfig(task=PluginChoice(name=name)))
    scores = _execute(score_baselines(world, ("dev", "sealed")))
    if as_json:
        _print_json(scores)
        return
    for baseline, by_split in scores.items():
        typer.echo(f"{baseline:<28} " + "  ".join(f"{split} {score:.3f}" for split, score in by_split.items()))


@app.command("plugins")
def plugins_command(as_json: Json = False, debug: Debug = False) -> None:
    """The plugins that were found, what they provide, and what is wrong with the broken ones."""
    from bascule.plugins.loader import plugins

    loaded = plugins().loaded
    if as_json:
        _print_json(loaded)
        return
    for p in loaded:
        typer.echo(
            f"{p.name:<12} {p.distribution} {p.version}  {'FAILED: ' + p.error if p.error else ', '.join(p.provides)}"
        )


def main() -> None:
    """Entry point: errors are one clear paragraph on standard error, never a traceback, unless --debug asks for it."""
    debug = "--debug" in sys.argv or os.environ.get("BASCULE_DEBUG") == "1"
    try:
        sys.exit(app(standalone_mode=False))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.SAME)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself is wrong
            error.show()
            sys.exit(Exit.USAGE)
        if debug:
            raise
        typer.echo(f"bascule: {_paragraph(error)}", err=True)
        sys.exit(Exit.USAGE)


def _paragraph(error: Exception) -> str:
    """What a person is told: the first failure that names its next step, else what went wrong and how to see more."""
    from bascule.runtime.cli.store import leaves

    causes = list(leaves(error))
    known = next((c for c in causes if isinstance(c, BasculeError)), None)
    if known is not None:
        return str(known)
    cause = causes[0]
    if isinstance(cause, OSError):
        return f"{cause}. Free the space or correct the path that it names; `bascule resume RUN` goes on from the log."
    return f"{type(cause).__name__}: {cause}. Nobody foresaw this: run it again with --debug, and report what it shows."
