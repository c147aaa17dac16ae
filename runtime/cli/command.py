"""What all commands share: the application, their common options, how they run and print."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from rich.console import Console

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
dlq_app = typer.Typer(help="Events that a service gave up on.", no_args_is_help=True)
app.add_typer(dlq_app, name="dlq")

Home = Annotated[
    Path | None,
    typer.Option(help="Where the log and the blobs are. Also BASCULE_HOME; the user's data folder by default."),
]
Url = Annotated[
    str | None,
    typer.Option(help="A NATS server instead of the embedded one: nats://[user:password@]host:port, or tls://."),
]
Credentials = Annotated[
    Path | None, typer.Option(help="A file with what each user logs in with at --url. Also BASCULE_CREDENTIALS.")
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


def make_console(*, err: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=err)
    # A pipe or a file has no width; a table cut to 80 columns helps nobody there.
    return console if console.is_terminal else Console(stderr=err, width=140)


def print_json(value: object) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def run_async(work: Coroutine[Any, Any, T]) -> T:
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


def on_store(work: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """A command on the open store: the parameters of ``work`` after the first, and where the store is.

    ``work`` is given the store, which stays open until it is done; it returns an exit code, or None for 0.
    """
    hints = get_type_hints(work, localns={"Store": Any}, include_extras=True)
    _, *own = inspect.signature(work).parameters.values()
    options = {"home": Home, "url": Url, "credentials": Credentials, "debug": Debug}

    def command(*, home: Path | None, url: str | None, credentials: Path | None, debug: bool, **given: Any) -> None:
        del debug  # the entry point looks at it
        from bascule.runtime.cli.store import home_folder, open_store

        async def opened() -> int | None:
            async with open_store(home_folder(home), url=url, credentials=credentials) as store:
                return await work(store, **given)

        code = run_async(opened())
        if code:
            raise typer.Exit(code)

    command.__name__, command.__doc__, command.__module__ = work.__name__, work.__doc__, work.__module__
    command.__annotations__ = {p.name: hints[p.name] for p in own} | options | {"return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
        + [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "debug" else None, annotation=hint
            )
            for name, hint in options.items()
        ]
    )
    return command


@contextmanager
def live_progress(quiet: bool) -> Iterator[Any]:
    from bascule.runtime.cli.progress import Live

    with Live(make_console(err=quiet)) as live:
        yield live
