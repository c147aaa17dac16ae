"""The command that runs an experiment, and how its table looks to people."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import (
    Debug,
    Exit,
    Home,
    Json,
    app,
    live_progress,
    make_console,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bascule.runtime.experiments.comparison import Comparison, Difference, Estimate, Row
    from bascule.schemas.landscape import Interval


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The experiment; ops/experiments/ holds some.")],
    quick: Annotated[bool, typer.Option("--quick", help="With what its table \\[quick] says.")] = False,
    only: Annotated[str | None, typer.Option(metavar="ARM,..", help="These arms alone.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="1,2", help="These seeds instead of the file's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where table and picture go; experiments/NAME in the home by default.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run arms at one budget over seeds, and compare them with intervals. Again after an end of any kind, it goes on.

    Exit 1 if a run is not completed. A table that is there gives way only to one with all of its completed runs, and to
    none where a run is refused.
    """
    from functools import partial

    from rich.markup import escape

    from bascule.plugins.loader import plugins
    from bascule.runtime.cli.experiment_file import read_experiment
    from bascule.runtime.cli.experiment_runs import comparison_of, make_runs
    from bascule.runtime.cli.store import home_folder, open_store
    from bascule.runtime.experiments.output import check_folder, write_files
    from bascule.schemas.errors import ConfigError

    for option, text in (("--only", only), ("--seeds", seeds)):
        if text is not None and not _parts(text):
            raise ConfigError(f"{option} names none.", next_step=f"Leave {option} out for all.")
    asked = read_experiment(file, plugins(), quick=quick, only=_parts(only), seeds=_seeds(seeds))
    console = make_console(err=as_json)

    def say(text: str) -> None:
        console.print(f"[bold]{escape(text)}[/]", highlight=False, soft_wrap=True)

    async def execute() -> Comparison:
        async with open_store(home_folder(home), exclusive=True, writes=True) as store:
            folder = out.expanduser() if out is not None else store.home / "experiments" / asked.name
            check_folder(folder)
            lines = await make_runs(store, asked, say, partial(live_progress, as_json))
            found = await comparison_of(store, asked, lines, say)
            return await asyncio.to_thread(write_files, found, folder)

    found = run_async(execute())
    print_json(found) if as_json else show_comparison(found, make_console())
    if any(line.status != "completed" for line in found.runs):
        raise typer.Exit(Exit.DIFFERS)


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _seeds(text: str | None) -> list[int]:
    from bascule.schemas.errors import ConfigError

    parts = _parts(text)
    odd = [p for p in parts if not (p.isascii() and p.isdigit() and int(p) < 2**31)]
    if odd:
        raise ConfigError(f"--seeds has {odd[0]!r}, which is no seed.", next_step="Give numbers, as in --seeds 1,2.")
    return [int(part) for part in parts]


def show_comparison(found: Comparison, console: Console) -> None:
    """The scores, the differences, what was spent, the verdict, and what qualifies it."""
    from rich.markup import escape

    if found.description:
        console.print(escape(found.description), highlight=False, soft_wrap=True)
    _show_scores(found, console)
    if any(row.differences for row in found.rows):
        _show_differences(found, console)
    _show_spending(found, console)
    console.print(f"[bold]{escape(found.sentence)}[/]", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    for line in found.runs:
        if line.status != "completed":
            console.print(escape(f"{line.run}: {line.status}: {line.reason}"), highlight=False, soft_wrap=True)
    for path in found.files:
        console.print(escape(path), highlight=False, soft_wrap=True)


def _show_scores(found: Comparison, console: Console) -> None:
    seeds = f"seed{'s' if len(found.seeds) > 1 else ''} {', '.join(map(str, found.seeds))}"
    table = _table(
        f"{found.name}: {seeds}",
        ("arm", "levers", "runs"),
        ("dev", "sealed before", "sealed after", "over seeds", "seeds and items", "tokens an item", "pass@n"),
    )
    for row in found.rows:
        table.add_row(
            row.arm,
            _levers(row),
            f"{row.completed}/{row.asked}",
            f"{_mean(row.dev_before)} -> {_mean(row.dev_after)}",
            _mean(row.before),
            f"[bold]{_mean(row.after)}[/]",
            _span(row.after.over_seeds if row.after else None),
            _span(row.after.pooled if row.after else None),
            "—" if row.tokens is None else f"{row.tokens:,.0f}",
            _mean(row.oracle) if row.oracle else "",
        )
    console.print(table)


def _levers(row: Row) -> str:
    if row.kind == "best-of-n":
        return f"none, {row.votes} votes"
    return " + ".join(row.levers)


def _show_differences(found: Comparison, console: Console) -> None:
    table = _table(
        "differences of sealed scores, paired by seed and item; p is two-sided",
        ("arm", "against"),
        ("difference", "over seeds", "p (seeds)", "seeds and items", "p (items)"),
    )
    for row in found.rows:
        for d in row.differences:
            table.add_row(row.arm, d.against, *_difference(d))
    console.print(table)


def _difference(d: Difference) -> tuple[str, ...]:
    return (
        f"[bold]{d.estimate.mean:+.3f}[/]",
        _span(d.estimate.over_seeds, "+.3f"),
        "—" if d.p_seeds is None else f"{d.p_seeds:.2g}",
        _span(d.estimate.pooled, "+.3f"),
        f"{d.p_items:.2g}",
    )


def _show_spending(found: Comparison, console: Console) -> None:
    from rich.markup import escape

    from bascule.runtime.experiments.output import counted
    from bascule.runtime.services.budgets import amount, unit

    bounds = {name: value for row in found.rows for name, value in row.bounds.items()}
    told = " and ".join(f"{amount(name, value)} {unit(name)}" for name, value in bounds.items())
    table = _table(
        f"mean spending of a run in its loop, of at most {told} (rollouts also by lever); and on the sealed split",
        ("arm",),
        ("rollouts", "tokens", "seconds", "for harness", "for weights", "sealed tokens", "algorithms", "promoted"),
    )
    for row in found.rows:
        s = row.spent
        table.add_row(
            row.arm,
            *(("—", "—", "—") if s is None else (f"{s.rollouts:,.0f}", f"{s.tokens:,.0f}", f"{s.seconds:,.0f}")),
            *(f"{part.rollouts:,.0f}" if (part := row.levers_spent.get(x)) else "" for x in ("harness", "weights")),
            f"{row.sealed.tokens:,.0f}" if row.sealed else "—",
            escape(counted(row.algorithms)),
            counted(row.promotions),
        )
    console.print(table)


def _mean(found: Estimate | None) -> str:
    return "—" if found is None else f"{found.mean:.3f}"


def _span(found: Interval | None, form: str = ".3f") -> str:
    from rich.markup import escape

    return "—" if found is None else escape(f"[{found.low:{form}}, {found.high:{form}}]")


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table
