"""Commands for who runs a NATS server of their own. Each imports what it needs when it runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bascule.runtime.cli.command import Credentials, Debug, Json, app, print_json, run_async
from bascule.schemas.errors import ConfigError

ops_app = typer.Typer(help="Set up a NATS server that somebody else runs.", no_args_is_help=True)
app.add_typer(ops_app, name="ops")


class Auth(StrEnum):
    nkeys = "nkeys"
    password = "password"  # noqa: S105


@ops_app.command("nats-config")
def nats_config(
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    auth: Annotated[Auth, typer.Option(help="How new users prove who they are.")] = Auth.nkeys,
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="The certificate of the authority that signed it, PEM.")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT.")] = "127.0.0.1:4222",
    store: Annotated[
        Path | None, typer.Option(help="The server's folder for the streams; OUT/store by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write nats.conf and credentials.json: one user a service, each with the least that it needs.

    Credentials that are there already are kept. A nats.conf that is there already is not touched.
    """
    from bascule.runtime.log.access import read_credentials, written
    from bascule.runtime.log.config import configuration
    from bascule.runtime.log.credentials import identities, new_credentials
    from bascule.runtime.log.home import unwritable, write_private

    out = out.absolute()
    conf, file = out / "nats.conf", out / "credentials.json"
    if conf.exists():
        raise ConfigError(f"There is a {conf} already.", next_step="Move it away, or choose another folder with --out.")
    _check_listen(listen)
    tls = _tls(tls_cert, tls_key, tls_ca)
    credentials = read_credentials(file) if file.exists() else new_credentials(auth.value)
    text = configuration(
        (store or out / "store").absolute(),
        name="bascule",
        listen=listen,
        identities=identities(credentials),
        tls=tls,
    )
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            write_private(file, written(credentials))
        write_private(conf, text)
    except OSError as e:
        raise unwritable(out, e) from e
    url = f"{'tls' if tls else 'nats'}://{listen}"
    if as_json:
        print_json({"config": str(conf), "credentials": str(file), "url": url})
        return
    typer.echo(f"Wrote {conf} and {file}. Next:")
    if tls is None and not listen.startswith(("127.", "localhost:", "[::1]")):
        typer.echo(
            "  0. Without --tls-cert and --tls-key everybody on the network can read what is sent. Consider them."
        )
    typer.echo(f"  1. nats-server -c {conf}")
    if tls_ca is not None:
        typer.echo(f"  2. export BASCULE_TLS_CA={tls_ca.absolute()}    (on every host)")
    typer.echo(f"  3. bascule ops init --url {url} --credentials {file}")
    typer.echo(f"  4. Give each host the part of {file} that its services need; then, for each service,")
    typer.echo(f"     bascule serve SERVICE --url {url} --credentials FILE")


@ops_app.command()
def init(
    url: Annotated[str, typer.Option(help="The NATS server, nats:// or tls://host:port.")],
    credentials: Credentials = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Bytes that the log may take; 32 GiB by default.", min=1)
    ] = None,
    replicas: Annotated[int, typer.Option(help="Servers of a cluster that keep the log.", min=1, max=5)] = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the streams as the user admin. Harmless when repeated: what is there is checked, not changed."""
    from bascule.runtime.log.access import remote_access
    from bascule.runtime.log.permissions import ADMIN
    from bascule.runtime.log.streams import BLOB_STREAM, DEAD_LETTERS, STREAM

    access = remote_access(url, credentials)

    async def execute() -> None:
        await (await access.connect(ADMIN, max_bytes=max_bytes, replicas=replicas)).close()

    run_async(execute())
    streams = (STREAM, DEAD_LETTERS, BLOB_STREAM)
    if as_json:
        print_json({"url": access.url, "streams": streams})
    else:
        typer.echo(f"{access.url} has the streams {', '.join(streams)}.")


def _check_listen(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--listen {listen!r} is not HOST:PORT.", next_step="For example 0.0.0.0:4222.")


def _tls(cert: Path | None, key: Path | None, ca: Path | None) -> dict[str, str] | None:
    """The server's ``tls`` block, None without TLS."""
    if (cert is None) != (key is None) or (ca is not None and cert is None):
        raise ConfigError(
            "A certificate and its key belong together.", next_step="Give --tls-cert and --tls-key, or neither."
        )
    if cert is None or key is None:
        return None
    for path in (cert, key, ca):
        if path is not None and not path.is_file():
            raise ConfigError(f"There is no file {path}.", next_step="Name a PEM file.")
    files = {"cert_file": cert, "key_file": key, **({"ca_file": ca} if ca is not None else {})}
    return {name: str(path.absolute()) for name, path in files.items()}
