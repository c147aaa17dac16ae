"""Commands for a task of your own: write one that works, and check any task. Each imports what it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bascule.runtime.cli.command import Debug, Exit, Json, make_console, print_json, run_async, tasks_app

if TYPE_CHECKING:
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
    path = task.params.get("path") if task.name in ("own", "sia-dir") else None
    stem = Path(path).name.removesuffix(".py") if isinstance(path, str) else task.name
    return _STEM.sub("-", stem.lower()).strip("-") or "own"


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
    checks = run_async(conformance(plugins(), chosen["name"], chosen.get("params", {}), unsafe=unsafe))
    broken = [check for check in checks if check.outcome == "broken"]
    if as_json:
        print_json({"task": task, "ok": not broken, "checks": checks})
    else:
        console = make_console()
        for check in checks:
            mark = {"held": "held", "broken": "BROKEN", "does not apply": "-"}[check.outcome]
            line = f"{mark:<7}{check.name:<22}{check.promise}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            for more in (check.found, check.next_step):
                if more:
                    console.print(f"{'':<29}{more}", markup=False, highlight=False, soft_wrap=True)
        held = sum(check.outcome == "held" for check in checks)
        rest = len(checks) - held - len(broken)
        console.print(f"{held} hold, {len(broken)} are broken, {rest} do not apply", markup=False, highlight=False)
    if broken:
        raise typer.Exit(Exit.DIFFERS)
