"""What all commands share: the application, their common options, how they run and print."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_type_hints

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
    typer.Option(help="A NATS server instead of the embedded one: nats://\\[user:password@]host:port, or tls://."),
]
Credentials = Annotated[
    Path | None, typer.Option(help="A file with what each user logs in with at --url. Also BASCULE_CREDENTIALS.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]
Profile = Annotated[
    Path | None, typer.Option(help="A TOML file that names everything of a run; options and --set go before it.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any configuration value, e.g. --set gate.alpha=0.01. Repeatable.")
]
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


#: Seconds that the event loop has to take up a signal; a task's own code, which is called in it, may hang.
TAKEN_UP = 5.0


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; SIGINT and SIGTERM end it without waiting for what computes in threads.

    They do so too while the loop is busy, with a task's own code that hangs for instance: what is under way is finished
    if the loop takes the signal up, and the process ends if it does not. A second signal ends it at once.
    """
    import signal

    stopped: list[int] = []

    async def drained() -> T:
        task = asyncio.current_task()
        assert task is not None
        numbers = (signal.SIGINT, signal.SIGTERM)
        # The numbers of signals come through a pipe, whichever thread got them and whatever the main one does.
        arrived, arrive = os.pipe()
        os.set_blocking(arrive, False)
        before = signal.set_wakeup_fd(arrive, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        watching = threading.Thread(target=_watch, args=(arrived, task, stopped), name="signals", daemon=True)
        watching.start()
        try:
            return await work
        except asyncio.CancelledError:
            if not stopped:
                raise
            _end(stopped[0])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(arrive)
            watching.join()

    return asyncio.run(drained())


def _watch(arrived: int, task: asyncio.Task[Any], stopped: list[int]) -> None:
    """Cancel the task at the first SIGINT or SIGTERM, and end the process if the loop is not free for that.

    Args:
        arrived: a pipe with the numbers of signals; closed here once the other end is.
        stopped: gets the number of the signal.
    """
    import select
    import signal

    loop, taken = task.get_loop(), threading.Event()

    def take_up() -> None:
        taken.set()
        task.cancel()

    while True:
        ready, _, _ = select.select([arrived], [], [], TAKEN_UP if stopped and not taken.is_set() else None)
        if not ready and not taken.is_set():
            _end(stopped[0])
        data = os.read(arrived, 1) if ready else None
        if data == b"":
            os.close(arrived)
            return
        if data and data[0] in (signal.SIGINT, signal.SIGTERM):
            if stopped:
                os._exit(128 + data[0])
            stopped.append(data[0])
            loop.call_soon_threadsafe(take_up)


def _end(number: int) -> NoReturn:
    # Nothing is lost: the log holds what was done, and a training step that still computes is not part of it.
    sys.stderr.write("\nStopped. `bascule status` lists the runs, `bascule resume RUN` goes on from the log.\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


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
