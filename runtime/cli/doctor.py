"""The command that says what will and will not work, before anything is spent. It imports what it needs."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bascule.runtime.cli.command import Debug, Exit, Home, Json, Profile, Set, app, make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.runtime.doctor.finding import Finding

_AS_RUN = "As `bascule run` has it."
_MARKS = {"ok": "ok", "warns": "warns", "fails": "FAILS", "skipped": "-"}


@app.command()
def doctor(
    profile: Profile = None,
    task: Annotated[str | None, typer.Option("--task", "--task-file", help=_AS_RUN)] = None,
    task_dir: Annotated[Path | None, typer.Option("--task-dir", "--task_dir", help=_AS_RUN)] = None,
    max_gen: Annotated[int | None, typer.Option("--max-gen", "--max_gen", help=_AS_RUN)] = None,
    seed: Annotated[int | None, typer.Option(help=_AS_RUN)] = None,
    levers: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    model: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    engine: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    policy: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    author: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    harness: Annotated[Path | None, typer.Option(help=_AS_RUN)] = None,
    regime: Annotated[str | None, typer.Option(help=_AS_RUN)] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe-no-sandbox", help=_AS_RUN)] = False,
    set_: Set = None,
    online: Annotated[
        bool, typer.Option("--online", help="Also ask the endpoints that the configuration names for their models.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, max=86400, help="Most that all of it may take.")] = 15.0,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine, and at what a run would need of it: packages, plugins, task, model, GPU, memory, disk,
    sandbox, log, keys, endpoints. Nothing is fetched or spent. Exit 1 if something that the run needs fails."""
    from bascule.runtime.cli.harness_folder import harness_in
    from bascule.runtime.cli.sia import directory_named
    from bascule.runtime.cli.store import home_folder
    from bascule.runtime.doctor.finding import Asked
    from bascule.runtime.doctor.report import examine

    if math.isnan(seconds):
        raise typer.BadParameter("It is no number.", param_hint="--seconds")
    values = {
        "max_generations": max_gen,
        "seed": seed,
        "levers": [part.strip() for part in levers.split(",") if part.strip()] if levers is not None else None,
        "model": model,
        "task.regime": regime,
        "sandbox.unsafe": unsafe or None,
        "harness": harness_in(harness) if harness is not None else None,
    }
    asked = Asked(
        home=str(home_folder(home)),
        profile=str(profile) if profile is not None else None,
        task=task if task_dir is None else directory_named(task_dir),
        engine=engine,
        policy=policy,
        author=author,
        overrides=(*_settings(values), *(set_ or ())),
        online=online,
        patience=seconds / 3,
    )
    begin = time.perf_counter()
    console = make_console()
    if as_json or not console.is_terminal:
        findings = examine(asked, seconds=seconds)
    else:
        with console.status("") as status:
            findings = examine(asked, seconds=seconds, told=lambda name: status.update(f"{name} is looked at"))
    took = time.perf_counter() - begin
    counts = Counter(finding.outcome for finding in findings)
    if as_json:
        print_json({"ok": not counts["fails"], "seconds": took, "findings": findings})
    else:
        for finding in findings:
            _show(finding, console)
        line = f"{counts['ok']} ok, {counts['warns']} warn, {counts['fails']} fail, {counts['skipped']} skipped"
        console.print(f"{line}, in {took:.1f} s", markup=False, highlight=False)
    if counts["fails"]:
        raise typer.Exit(Exit.DIFFERS)


def _settings(values: dict[str, Any]) -> list[str]:
    """Values of a configuration as --set has them, those that are given."""
    import msgspec

    return [f"{key}={msgspec.json.encode(value).decode()}" for key, value in values.items() if value is not None]


def _show(finding: Finding, console: Console) -> None:
    line = f"{_MARKS[finding.outcome]:<7}{finding.about:<22} {finding.found}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if finding.next_step:
        console.print(f"{'':<30}{finding.next_step}", markup=False, highlight=False, soft_wrap=True)
