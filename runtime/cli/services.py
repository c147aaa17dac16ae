"""Commands that run one part alone. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bascule.runtime.cli.command import Debug, Home, Json, app, make_console, print_json, run_async


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
        print_json({"url": url, "pid": server.pid})
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

    console = make_console(err=True)
    found = launch.service_named(service)

    async def execute() -> None:
        async with open_store(home_folder(home), url=url) as store:
            console.print(f"{service}: serving", highlight=False)
            await launch.serve_forever(
                store, found, run, lambda text: console.print(text, highlight=False, markup=False)
            )

    run_async(execute())
