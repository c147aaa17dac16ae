"""The command that searches a run for what only the scoring process may hold. Imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import Exit, Json, Run, app, make_console, on_store, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.plugins.canary import Canaries
    from bascule.runtime.audit.canaries import CanaryReport
    from bascule.runtime.cli.store import Store
    from bascule.schemas.run import RunConfig

_LEAKS = 50


@app.command()
@on_store
async def canaries(
    store: Store,
    run: Run,
    exports: Annotated[
        list[Path] | None, typer.Argument(help="Exports, pages or other files of it, or folders of them.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Search a run (events, blobs, prompts, logs, pages) and its exports for the canaries that stand beside the dev
    and sealed answers. Exit 1 if one is found."""
    from bascule.runtime.audit.canaries import scan
    from bascule.runtime.cli.launch import state_of

    state = await state_of(store, run)
    config = state.config
    folder = store.home / "runs" / run
    report = await scan(
        run,
        store.read(run),
        store.blobs(run),
        canaries=known_canaries(config),
        letters=await store.log.letters.list(run),
        paths=[*([folder] if folder.is_dir() else []), *(exports or ())],
        decode=decoder(config),
    )
    print_json(report) if as_json else _show(report, make_console())
    return Exit.DIFFERS if report.leaks else Exit.SAME


def known_canaries(config: RunConfig) -> Canaries:
    """The canaries of a run's task, by this machine's key.

    Raises:
        BasculeError: the task or its data is not here.
    """
    from bascule.plugins.canary import Canaries, canary_key
    from bascule.plugins.loader import plugins
    from bascule.runtime.world import World

    public = World(plugins(), config).public
    return Canaries.of(canary_key(), config.task.name, public, ("train", "dev", "sealed", "regression"))


def decoder(config: RunConfig) -> Callable[[Sequence[int]], str] | None:
    """The text of the model's token ids; None if its tokenizer is not here or the engine has none."""
    from bascule.schemas.errors import BasculeError

    if config.engine.name not in ("transformers", "cassette"):
        return None
    try:
        from bascule.trainers.base_model import load_tokenizer, resolve_model

        tokenizer = load_tokenizer(resolve_model(config.model))
    except (BasculeError, ImportError):
        return None
    return lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _show(report: CanaryReport, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for leak in report.leaks[:_LEAKS]:
        beside = f"{leak.split} {leak.example} of {leak.task}" if leak.task else "nothing that this machine knows"
        say(f"{leak.where}: {leak.token} ({leak.form}), which stands beside {beside}")
    if len(report.leaks) > _LEAKS:
        say(f"and {len(report.leaks) - _LEAKS} more; --json has all")
    say(f"searched {report.events} events ({report.event_bytes:,} bytes) and {report.letters} dead letters")
    say(f"searched {report.blobs} blobs ({report.blob_bytes:,} bytes); {report.absent} are not here")
    say(f"searched the text of {report.prompts} model calls; of {report.undecoded} there is no tokenizer here")
    say(f"searched {report.files} files ({report.file_bytes:,} bytes)")
    if report.unread:
        say(f"{report.unread} blobs that no event names could not be read")
    say(f"{report.run}: {len(report.leaks)} places with a canary; {report.known} canaries are known")
