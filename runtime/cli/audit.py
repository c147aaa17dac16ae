"""Commands that read a run's log. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import (
    Credentials,
    Debug,
    Exit,
    Home,
    Json,
    Run,
    Url,
    app,
    make_console,
    on_store,
    print_json,
    run_async,
)
from bascule.schemas.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from bascule.runtime.cli.store import Store


@app.command()
@on_store
async def log(
    store: Store,
    run: Run,
    type_: Annotated[
        str | None, typer.Option("--type", help="Only events whose type ends so, e.g. lever.chosen.")
    ] = None,
    telemetry: Annotated[
        bool, typer.Option("--telemetry", help="How its training went on, step by step, instead; kept for a week.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The recorded bytes, one event a line.")] = False,
) -> None:
    """The events of a run, in order."""
    if telemetry:
        await _telemetry(store, run, as_json)
        return
    async for event in store.read(run):
        if type_ is not None and not event.envelope.type.endswith(type_):
            continue
        if as_json:
            sys.stdout.buffer.write(event.payload + b"\n")
        else:
            e = event.envelope
            sys.stdout.write(f"{event.seq:>7}  {e.time[:23]}  {e.producer.service:<9} {e.type:<30} {e.subject}\n")
    sys.stdout.flush()


async def _telemetry(store: Store, run: str, as_json: bool) -> None:
    import msgspec

    async for line in store.log.telemetry.read(run):
        if as_json:
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        else:
            figures = " ".join(f"{name}={value:.4g}" for name, value in line.figures.items())
            what = line.subject.split(".", 2)[2]
            sys.stdout.write(f"{line.time[:23]}  {what} attempt {line.attempt} update {line.iteration}  {figures}\n")
    sys.stdout.flush()


@app.command()
@on_store
async def explain(
    store: Store,
    run: Run,
    what: Annotated[
        str,
        typer.Argument(
            metavar="STEP|EVENT",
            help="A generation, for its choice of lever; or an event's subject (candidate.g02.gate) or id.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Why: for a step its lever and algorithm, the figures, what else was feasible; for any event its causes."""
    from bascule.runtime.audit.explain import Explainer
    from bascule.runtime.cli.show import show_explanation

    explainer = Explainer(run, what)
    async for event in store.read(run):
        explainer.add(event)
    found = explainer.result()
    print_json(found) if as_json else show_explanation(found, make_console())


@app.command()
@on_store
async def replay(store: Store, run: Run, as_json: Json = False) -> int:
    """Make every decision of a run again from the log, and compare. No model, no network. Exit 1 if any differs."""
    from rich.markup import escape

    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.replay import Replayer

    replayer = Replayer(run, plugins())
    async for event in store.read(run):
        replayer.add(event)
    result = replayer.result()
    if as_json:
        print_json(result)
    else:
        console = make_console()
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


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="The run's name, or the path of an export.")],
    accept: Annotated[
        str | None, typer.Option(help="Take a damaged run for what it is now, for this reason, which the anchor keeps.")
    ] = None,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a run: chain, anchor, identities, causes, writers, schemas, blobs. Exit 2 if it is not intact."""
    import re

    if not re.fullmatch("[a-z0-9_-]{1,64}", run):
        if accept is not None:
            raise ConfigError("An export cannot be accepted.", next_step="Import it, or get it again.")
        raise typer.Exit(_verify_export(Path(run), as_json))

    from bascule.runtime.audit import verify as audit
    from bascule.runtime.cli.store import home_folder, open_store
    from bascule.runtime.cli.verdict import show_verification
    from bascule.runtime.log.rescue import where_copied
    from bascule.runtime.redaction import process_redaction

    async def execute() -> int:
        async with open_store(home_folder(home), url=url, credentials=credentials, guarded=False) as store:
            try:
                found = await audit.verify(run, store.log, store.blobs(run), store.anchor)
            except NotFound as e:
                if Path(run).exists():
                    raise NotFound(e.message, next_step=f"For the export of that name give ./{run}.") from e
                raise
            if accept is not None:
                if not found.faults:
                    raise ConfigError(f"The run {run} is intact.", next_step="There is nothing to accept.")
                await audit.accept(found, store.log, store.anchor, process_redaction().text(accept))
            copied = where_copied(store.home, store.not_copied) if found.faults else ""
        print_json(found) if as_json else show_verification(found, make_console())
        if copied and not as_json:
            make_console().print(copied, highlight=False, markup=False, soft_wrap=True)
        if accept is None:
            return Exit.NOT_INTACT if found.faults else Exit.SAME
        if not as_json:
            make_console().print(f"{run}: accepted as it is, with {found.events} events", highlight=False)
        return Exit.SAME

    raise typer.Exit(run_async(execute()))


def _verify_export(path: Path, as_json: bool) -> int:
    from bascule.runtime.cli.verdict import show_faults
    from bascule.runtime.exports.check import verify_export
    from bascule.runtime.exports.reader import open_export

    with open_export(path) as export:
        faults, manifest = verify_export(export), export.manifest
    if as_json:
        found = {"run": manifest.run, "events": manifest.events, "head": manifest.head, "faults": faults}
        print_json({**found, "signed_by": manifest.public_key})
    else:
        signed = f", signed by {manifest.public_key}" if manifest.public_key else ", not signed"
        show_faults(faults, make_console())
        make_console().print(f"{path}: {manifest.events} events of {manifest.run}{signed}", highlight=False)
    return Exit.NOT_INTACT if faults else Exit.SAME
