"""Commands that a launcher starts as several processes: the first carries it out, the others compute with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from bascule.runtime.cli.command import app
from bascule.schemas.errors import ConfigError


@app.callback()
def refuse_launched(context: typer.Context) -> None:
    """Let a launcher start several processes of those commands only that know of it."""
    if context.invoked_subcommand not in ("train", "serve"):
        refuse_several(str(context.invoked_subcommand))


def refuse_several(command: str) -> None:
    """Refuse to be one of several processes.

    Raises:
        ConfigError: it is.
    """
    if _several():
        raise ConfigError(
            f"`bascule {command}` is one process, and a launcher started {os.environ['WORLD_SIZE']} (WORLD_SIZE).",
            next_step="Launch `train` or `serve trainer` so, and start the rest without a launcher.",
        )


def led(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose updates all processes of a launch compute; only the first opens a store and prints."""

    @wraps(command)
    def launched(**given: Any) -> None:
        if not _several():
            command(**given)
            return
        from bascule.runtime.training.backend import follow
        from bascule.trainers.distributed import leading, ranks

        if ranks().rank > 0:
            # It waits where Python would not see that somebody stops it. Nothing of it is to be kept.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            follow()
            return
        with leading():
            command(**given)

    return launched


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
