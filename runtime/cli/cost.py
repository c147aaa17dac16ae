"""The command that says what a run cost, and how that looks to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bascule.runtime.cli.command import Credentials, Debug, Home, Json, Url, app, make_console, print_json, run_async
from bascule.runtime.cli.transfer import RunOrExport, opened

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.runtime.audit.cost import CostReport, CostRow

_PARTS = {"stop": "sealed split", "ablation": "ablations"}


@app.command()
def cost(
    run: RunOrExport,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a run has cost, by generation, lever and service, and what is left of its budgets; also while it runs."""
    from bascule.runtime.audit.cost import cost_report
    from bascule.runtime.state import RunState

    async def execute() -> None:
        async with opened(run, home, url, credentials) as (name, events):
            state = RunState(run=name)
            async for event in events:
                state.apply(event)
        found = cost_report(state)
        print_json(found) if as_json else show_cost(found, make_console())

    run_async(execute())


def show_cost(found: CostReport, console: Console) -> None:
    """The table, the sums, the budgets, and what the log does not say."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from bascule.runtime.cli.show import budget_lines

    table = Table(title=f"{found.run} ({found.status})", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("gen", "for", "service"):
        table.add_column(name)
    for name in ("rollouts", "prompt", "output", "calls", "input", "cached", "answer", "seconds", "GPU s", "dollars"):
        table.add_column(name, justify="right")
    for row in found.rows:
        table.add_row(str(row.generation), _part(row), row.service, *_figures(row))
    table.add_section()
    for row in found.services:
        table.add_row("all", "", row.service, *_figures(row))
    table.add_row("all", "", "[bold]all[/]", *_figures(found.total))
    console.print(table)
    console.print(
        "prompt and output are tokens of episodes; input (cached: read + written) and answer those of the policy's and "
        "the author's own calls",
        highlight=False,
    )
    own, seconds = found.feedback, _seconds(found.feedback.seconds)
    console.print(
        f"the feedback agent itself: {own.calls:,} model calls, {own.rollouts:,} rollouts of trials, {seconds} s, "
        f"{_dollars(own.dollars)} dollars",
        highlight=False,
    )
    for line in budget_lines(found.budget):
        console.print(line, highlight=False)
    for line in (*_without_price(found), *found.lacks):
        console.print(line, highlight=False)


def _part(row: CostRow) -> str:
    if row.part is None:
        return "choice" if row.generation else "first harness"
    return _PARTS.get(row.part, row.part)


def _without_price(found: CostReport) -> list[str]:
    if not found.unpriced:
        return []
    if found.total.dollars is None:
        return ["no prices are given; a run takes them from --set prices and --set machine"]
    return [f"without a price, and so not among the dollars: {', '.join(found.unpriced)}"]


def _figures(row: CostRow) -> tuple[str, ...]:
    cached = f"{row.cache_read_tokens:,} + {row.cache_write_tokens:,}"
    return (
        _count(row.rollouts),
        _count(row.prompt_tokens),
        _count(row.output_tokens),
        _count(row.calls),
        _count(row.input_tokens),
        cached if row.cache_read_tokens or row.cache_write_tokens else "",
        _count(row.answer_tokens),
        _seconds(row.seconds, row.partial),
        _seconds(row.gpu_seconds, row.partial),
        _dollars(row.dollars),
    )


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def _seconds(value: float | None, partial: bool = False) -> str:
    return "not recorded" if value is None else f"{'at least ' if partial else ''}{value:,.1f}"


def _dollars(value: float | None) -> str:
    return "—" if value is None else f"{value:,.4f}"
