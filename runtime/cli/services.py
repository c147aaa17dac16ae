"""Commands that run one part alone. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from bascule.runtime.cli.command import (
    Credentials,
    Debug,
    Home,
    Json,
    Url,
    app,
    make_console,
    print_json,
    run_async,
)
from bascule.runtime.cli.processes import led, refuse_several


@app.command()
def broker(
    port: Annotated[int, typer.Option(help="0 lets the server choose.", min=0, max=65535)] = 0,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the embedded NATS server by itself, for `bascule serve` processes on this machine. Prints its address.

    What each user logs in with is in credentials.json in the home; --json prints its path.
    """
    from bascule.runtime.cli.store import Store, home_folder
    from bascule.runtime.log.access import embedded_access, written
    from bascule.runtime.log.home import write_private
    from bascule.runtime.log.permissions import ADMIN
    from bascule.runtime.log.server import EmbeddedServer
    from bascule.schemas.errors import Corrupt

    server = EmbeddedServer.start(home_folder(home), port=port)
    credentials = server.home / "credentials.json"
    access = embedded_access(server.connection)

    async def prepare() -> None:
        log = await access.connect(ADMIN)  # makes the streams
        try:
            # Whoever reads is told of damage; a log that is whole needs no copy any more.
            with suppress(Corrupt):
                await Store(server.home, log, owner=True, writers={}).guard()
        finally:
            await log.close()

    try:
        run_async(prepare())
        write_private(credentials, written(access.credentials or {}))
        if as_json:
            print_json({"url": server.url, "pid": server.pid, "credentials": str(credentials)})
        else:
            typer.echo(server.url)
        sys.stdout.flush()
        server.wait()
    finally:
        credentials.unlink(missing_ok=True)
        server.stop()


@app.command()
def serve(
    service: Annotated[str, typer.Argument(help="meta, rollout, verifier, feedback or trainer.")],
    url: Url = None,
    credentials: Credentials = None,
    run: Annotated[str | None, typer.Option(help="Serve this run only.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Run one of the five services for every run, until stopped: at --url, or on the `bascule broker` of --home.

    Any number of rollout and verifier processes share the work. All processes need the same --home, where the blobs
    are, or BASCULE_BLOBS=nats, which keeps them on the server. A launcher may start several processes of one trainer.
    """
    from bascule.runtime.cli import serving
    from bascule.runtime.cli.store import home_folder, open_store

    console = make_console(err=True)
    found = serving.service_named(service)
    if service != "trainer":
        refuse_several(f"serve {service}")

    async def execute() -> None:
        opened = open_store(home_folder(home), url=url, credentials=credentials, user=service, start=False, writes=True)
        async with opened as store:
            console.print(f"{service}: serving", highlight=False)
            await serving.serve_forever(
                store, found, run, lambda text: console.print(text, highlight=False, markup=False)
            )

    led(lambda: run_async(execute()))()
