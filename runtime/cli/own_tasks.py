"""Commands for a task of your own: write one that works, and check any task. Each imports what it needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bascule.runtime.cli.command import Debug, Exit, Json, make_console, print_json, run_async, tasks_app

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.plugins.kit import Check
    from bascule.schemas.run import PluginChoice

_STEM = re.compile(r"[^a-z0-9_-]+")


def chosen_task(text: str, params: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a task that is named, or whose file or folder is, a SIA task directory included.

    Raises:
        ConfigError: it is a path, and there is no task.
    """
    from bascule.plugins.tasks import own, sia_dir

    # A name alone is a task's, also where a folder of that name lies in the working folder.
    found = sia_dir.named(text) if "/" in text else None
    chosen = found or own.named(text) or {"name": text}
    given = {**chosen.get("params", {}), **params}
    return {**chosen, "params": given} if given else chosen


def stem_of(task: PluginChoice) -> str:
    """What runs of a task are called by default: its name, or that of its file."""
    from bascule.schemas.run import task_label

    return _STEM.sub("-", task_label(task).removesuffix(".py").lower()).strip("-") or "own"


@tasks_app.command("new")
def tasks_new(
    path: Annotated[Path, typer.Argument(help="The file to write, or the folder with --folder.")],
    folder: Annotated[bool, typer.Option("--folder", help="A folder, with its harness in files of its own.")] = False,
    debug: Debug = False,
) -> None:
    """Write a task of your own that works as it stands, with comments that say what to change."""
    from bascule.plugins.tasks.own_new import write_file, write_folder

    written = write_folder(path) if folder else write_file(path)
    typer.echo(
        f"{written}: written. `bascule tasks check {written}` checks it, `bascule run --task {written}` runs it."
    )


@tasks_app.command("check")
def tasks_check(
    task: Annotated[str, typer.Argument(help="A task's name, or the file or folder of one's own.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the task, e.g. --set split_seed=1. Repeatable.")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run the harness and the candidates unconfined.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check what a task promises, cheats included. Exit 1 if something does not hold; each line says what to do."""
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.conformance import conformance
    from bascule.runtime.cli.configuration import override
    from bascule.runtime.world import merged

    params: dict[str, Any] = {}
    for item in set_ or []:
        params = merged(params, override(item))
    chosen = chosen_task(task, params)
    console = make_console()

    async def checked() -> list[Check]:
        checks = []
        with _under_way(console, quiet=as_json) as told:
            given = conformance(plugins(), chosen["name"], chosen.get("params", {}), unsafe=unsafe, told=told)
            async with aclosing(given) as found:
                async for one in found:
                    checks.append(one)
                    if not as_json:
                        _show(one, console)
        return checks

    checks = run_async(checked())
    counts = Counter(check.outcome for check in checks)
    if as_json:
        print_json({"task": task, "ok": not counts["broken"], "checks": checks})
    else:
        warn = f", {counts['warns']} warn" if counts["warns"] else ""
        line = f"{counts['held']} hold, {counts['broken']} are broken{warn}, {counts['does not apply']} do not apply"
        console.print(line, markup=False, highlight=False)
    if counts["broken"]:
        raise typer.Exit(Exit.DIFFERS)


def _show(check: Check, console: Console) -> None:
    """A check's line, at once, also into a pipe."""
    mark = {"held": "held", "broken": "BROKEN", "warns": "warns", "does not apply": "-"}[check.outcome]
    line = f"{mark:<7}{check.name:<22}{check.promise}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    for more in (check.found, check.next_step):
        if more:
            console.print(f"{'':<29}{more}", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


@contextmanager
def _under_way(console: Console, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What tells a person at a terminal what is under way; elsewhere it tells nobody."""
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update
