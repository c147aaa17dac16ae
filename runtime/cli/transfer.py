"""Commands that carry a run elsewhere and compare what there is of it. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

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
    print_json,
    run_async,
)
from bascule.schemas.errors import ConfigError, LogError

if TYPE_CHECKING:
    from bascule.runtime.audit.diff import Comparison
    from bascule.runtime.audit.fold import Folded
    from bascule.runtime.exports.reader import Export
    from bascule.runtime.exports.writer import Sink
    from bascule.schemas.envelope import Recorded

RunOrExport = Annotated[
    str,
    typer.Argument(help="A run's name, or the path of an export: a tar, a folder with a / or . in it, - for stdin."),
]


@app.command()
def export(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A tar file; standard output by default.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="A new folder, instead of a tar.")] = None,
    blobs: Annotated[bool, typer.Option("--blobs/--no-blobs", help="With large trajectories and adapters.")] = True,
    restricted: Annotated[
        bool, typer.Option("--restricted", help="With items that their authors ask not to publish (gpqa).")
    ] = False,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    debug: Debug = False,
) -> None:
    """Write a run as one file: events, hash chain, blobs. Signed if BASCULE_SIGNING_KEY names a key."""
    from bascule.runtime.cli.store import home_folder, open_store
    from bascule.runtime.exports.writer import write_export
    from bascule.runtime.signing import signer_from_environment

    if output is not None and to is not None:
        raise ConfigError("An export is a file or a folder, not both.", next_step="Give -o or --to.")
    if output is None and to is None and sys.stdout.isatty():
        raise ConfigError("An export is not for a terminal.", next_step="Give -o FILE or --to DIR, or a pipe.")
    signer = signer_from_environment()

    async def execute() -> None:
        async with open_store(home_folder(home), url=url, credentials=credentials) as store:
            with _sink(output, to) as sink:
                written = await write_export(
                    run,
                    lambda: store.read(run),
                    store.blobs(run),
                    sink,
                    with_blobs=blobs,
                    restricted=restricted,
                    signer=signer,
                )
        left_out = sum(blob.omitted for blob in written.blobs) if blobs else 0
        what = f"{run}: {written.events} events, {len(written.blobs)} blobs, head {written.head}"
        if left_out:
            what += f"; {left_out} blobs left out, since they hold items that must not be published (--restricted)"
        make_console(err=True).print(what, highlight=False, soft_wrap=True)

    run_async(execute())


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="An export: a tar, an unpacked folder, or - for standard input.")],
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring an exported run into this home, after checking all of it. Exit 2, and nothing written, if it is not intact.

    An import that was cut short is finished by doing it again.
    """
    from bascule.runtime.cli.store import home_folder, open_store
    from bascule.runtime.exports.importing import import_export

    async def execute() -> None:
        with _open_export(source) as found:
            async with open_store(home_folder(home), exclusive=True) as store:
                blobs = store.blobs(found.manifest.run)
                done = await import_export(found, store.admin(), blobs, home=store.home, anchor=store.anchor)
        if as_json:
            print_json(done)
        else:
            make_console().print(
                f"{done.run}: {done.events} events, {done.added} of them new, {done.blobs} blobs, head {done.head}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    run_async(execute())


@app.command()
def diff(
    a: RunOrExport,
    b: RunOrExport,
    other_home: Annotated[Path | None, typer.Option(help="Where the run B is, if not in --home.")] = None,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two runs, by name or as exports. Exit 1, and the first difference, if their decisions differ."""
    from bascule.runtime.audit.diff import brief, compare

    async def execute() -> int:
        async with opened(a, home, url, credentials) as (run, events):
            first = await brief(run, events)
        async with opened(b, other_home or home, None if other_home else url, credentials) as (run, events):
            found = compare(first, await brief(run, events))
        print_json(found) if as_json else _show_comparison(found)
        return Exit.DIFFERS if found.decisions_differ else Exit.SAME

    raise typer.Exit(run_async(execute()))


@app.command()
def fold(
    run: RunOrExport,
    at: Annotated[int | None, typer.Option(help="After this many events of the run.", min=1)] = None,
    step: Annotated[int | None, typer.Option(help="Right after the lever choice of this generation.", min=0)] = None,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The state of a run after some of its events (all, by default), and its hash."""
    from bascule.runtime.audit import fold as folding

    if at is not None and step is not None:
        raise ConfigError("A fold ends at a count or at a step, not both.", next_step="Give --at or --step.")

    async def execute() -> None:
        async with opened(run, home, url, credentials) as (name, events):
            found = await folding.fold(name, events, at=at, step=step)
        print_json(found) if as_json else _show_fold(found)

    run_async(execute())


def _open_export(source: str) -> Export:
    from bascule.runtime.exports.reader import open_export

    if source == "-":
        if sys.stdin.isatty():
            raise ConfigError("There is no export on standard input.", next_step="Pipe one in, or name a file.")
        return open_export(sys.stdin.buffer)
    return open_export(Path(source))


@asynccontextmanager
async def opened(
    what: str, home: Path | None, url: str | None, credentials: Path | None
) -> AsyncIterator[tuple[str, AsyncIterator[Recorded]]]:
    """The name and the events of a run in a store, or of an export."""
    from bascule.runtime.cli.store import home_folder, open_store

    if what != "-" and re.fullmatch(r"[a-z0-9_-]{1,64}", what):
        async with open_store(home_folder(home), url=url, credentials=credentials) as store:
            yield what, store.read(what)
    else:
        with _open_export(what) as found:
            yield found.manifest.run, _walk(found)


async def _walk(found: Export) -> AsyncIterator[Recorded]:
    for event in found.events():
        yield event


@contextmanager
def _sink(output: Path | None, to: Path | None) -> Iterator[Sink]:
    """Where an export goes: a file or folder that appears only when it is whole, or standard output.

    Raises:
        ConfigError: the path cannot be written, or the folder is there.
        LogError: the reader of standard output has gone.
    """
    from bascule.runtime.exports.writer import FolderSink, TarSink

    path = to or output
    if path is None:
        try:
            with open(os.dup(sys.stdout.fileno()), "wb") as out:
                yield TarSink(out)
        except BrokenPipeError as e:
            raise LogError("Whoever was to read the export has gone.", next_step="See what it says.") from e
        return
    if to is not None and os.path.lexists(to):
        raise ConfigError(f"{to} is there already.", next_step="Choose a new folder.")
    if output is not None and output.is_dir():
        raise ConfigError(f"{output} is a folder.", next_step="Name a file, or use --to with a new folder.")
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        if to is not None:
            yield FolderSink(tmp)
        else:
            with _private_file(tmp) as out:
                yield TarSink(out)
                out.flush()
                os.fsync(out.fileno())
        tmp.rename(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}.", next_step="Choose another place.") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with suppress(OSError):
            tmp.unlink()


def _private_file(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _show_comparison(found: Comparison) -> None:
    from rich.markup import escape

    console = make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if found.equal:
        say(f"equal: {found.events[0]} events, byte for byte")
        return
    rest = f"{found.measured_differ} events differ in time or measurement" + (
        f", {found.outcomes_differ} other events in what they record" if found.outcomes_differ else ""
    )
    if not found.decisions_differ:
        say(f"same decisions ({found.decisions[0]}), {rest}")
        return
    first = found.first
    assert first is not None
    say(
        f"[red]{found.decisions_differ} decisions differ[/] (of {found.decisions[0]} in {found.a} and "
        f"{found.decisions[1]} in {found.b}); {rest}\nfirst: {first.subject} {escape(first.path)}\n"
        f"  {found.a}: {escape(_short(first.a))}\n  {found.b}: {escape(_short(first.b))}"
    )


def _short(value: object) -> str:
    import msgspec

    text = "nothing" if value is None else msgspec.json.encode(value).decode()
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text)} characters)"


def _show_fold(found: Folded) -> None:
    from rich.markup import escape

    console = make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"{found.run} after {found.count} of {found.events} events ({found.subject}, {found.time}): {found.status}")
    for g in found.generations:
        lever = escape(" with ".join(x for x in (g.lever, g.algorithm) if x) or "start")
        candidate = f"{g.harness[:8]} + {escape(g.adapter or 'base')}" if g.harness else "no candidate"
        say(f"  generation {g.generation}: {lever}; {candidate}; {g.outcome}")
    say(f"best: {'none yet' if found.best is None else f'generation {found.best}'}")
    say("open evaluations: " + (", ".join(f"{n} ({d} of {a})" for n, (d, a) in found.open.items()) or "none"))
    say("adapters: " + (escape(", ".join(found.adapters)) or "none"))
    say(f"state {found.hash}")
