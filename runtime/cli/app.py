"""The entry point: all commands, and what a person is told when one fails."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from bascule.runtime.cli import (
    audit,
    blobs,
    canaries,
    catalog,
    cost,
    doctor,
    experiment,
    forks,
    ops,
    own_tasks,
    runs,
    services,
    sia,
    train,
    transfer,
)
from bascule.runtime.cli.command import Exit, app
from bascule.runtime.cli.system_errors import next_step
from bascule.schemas.errors import BasculeError, Corrupt

#: In the order in which help lists them.
ORDER = [
    m.__name__
    for m in (
        runs,
        experiment,
        cost,
        audit,
        canaries,
        train,
        forks,
        transfer,
        blobs,
        services,
        ops,
        catalog,
        doctor,
        own_tasks,
        sia,
    )
]
app.registered_commands.sort(key=lambda c: ORDER.index(c.callback.__module__ if c.callback else runs.__name__))


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
            traceback.print_exception(error)
        from bascule.runtime.redaction import redact_message

        typer.echo(f"bascule: {redact_message(_paragraph(error))}", err=True)
        sys.exit(Exit.NOT_INTACT if isinstance(_cause(error), Corrupt) else Exit.USAGE)


def _cause(error: Exception) -> BaseException:
    """The first failure that names its next step, else the first."""
    from bascule.runtime.cli.store import leaves

    causes = list(leaves(error))
    return next((c for c in causes if isinstance(c, BasculeError)), causes[0])


def _paragraph(error: Exception) -> str:
    """What a person is told: what went wrong, and what to do or how to see more."""
    from bascule.plugins.loader import described

    cause = _cause(error)
    if isinstance(cause, BasculeError):
        return str(cause)
    if isinstance(cause, OSError) and (step := next_step(cause)):
        return f"{str(cause).rstrip('.')}. {step}"
    return f"{described(cause)}. Nobody foresaw this: run it again with --debug, and report what it shows."
