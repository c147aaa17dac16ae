"""Commands that read a run's log. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bascule.runtime.cli.command import Debug, Exit, Home, Json, Run, Url, app, make_console, print_json, run_async
from bascule.schemas.errors import Corrupt, SchemaError


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

    run_async(execute())


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
        print_json(found) if as_json else show_explanation(found, make_console())

    run_async(execute())


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

    raise typer.Exit(run_async(execute()))


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
            print_json({"run": run, "events": len(events), "faults": faults})
        else:
            console = make_console()
            for f in faults:
                console.print(
                    f"[red]fault[/] at {f.seq} ({f.subject}): {escape(f.what)}", highlight=False, soft_wrap=True
                )
            console.print(f"{run}: {len(events)} events, {len(faults)} faults", highlight=False)
        return Exit.NOT_INTACT if faults else Exit.SAME

    raise typer.Exit(run_async(execute()))
