"""How results look to people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from bascule.runtime.ablation import AblationRow
from bascule.runtime.replay import Explanation
from bascule.runtime.report import RunReport
from bascule.schemas.landscape import Interval


def _table(title: str | None = None) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)


def _score(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _span(interval: Interval) -> str:
    return escape(f"[{interval.low:.3f}, {interval.high:.3f}]")


def show_report(result: RunReport, console: Console) -> None:
    """The closing table, the sealed scores and the baselines."""
    table = _table(title=f"{result.run}: {escape(result.task)}, {result.arm}, seed {result.seed} ({result.status})")
    for name in ("gen", "lever", "algorithm / edit", "candidate"):
        table.add_column(name)
    for name in ("train", "dev [95%]", "p", "promoted", "tokens", "seconds"):
        table.add_column(name, justify="right")
    for row in result.generations:
        interval = f" [{row.dev_interval.low:.2f}, {row.dev_interval.high:.2f}]" if row.dev_interval else ""
        candidate = f"{(row.harness or '—')[:8]} + {row.adapter or 'base'}" if row.harness else "—"
        table.add_row(
            str(row.generation),
            row.lever or "—",
            escape(row.algorithm or row.edit or "—"),
            candidate,
            _score(row.train),
            escape(f"{_score(row.dev)}{interval}"),
            "—" if row.p is None else f"{row.p:.2g}",
            "yes" if row.promoted else ("no" if row.outcome != "open" else "—"),
            f"{row.tokens:,}",
            f"{row.seconds:.1f}",
        )
    console.print(table)
    if result.sealed is not None:
        s = result.sealed
        console.print(
            f"sealed ({s.n} examples): [bold]{s.before:.3f}[/] {_span(s.before_interval)} before, "
            f"[bold]{s.after:.3f}[/] {_span(s.after_interval)} after "
            f"(generation {result.best}); {s.wins} better, {s.losses} worse, p = {s.p:.2g} ({s.test}, one-sided)",
            highlight=False,
        )
    if result.baselines:
        text = ", ".join(f"{b.name} {b.sealed:.3f}" for b in result.baselines)
        console.print(f"baselines without a model, on the same examples: {text}", highlight=False)
    if result.reason:
        console.print(f"{result.status}: {escape(result.reason)}", highlight=False)
    console.print(
        f"{result.tokens:,} tokens, {result.seconds:.0f} s, {result.events} events, "
        f"decision hash {result.decision_hash}",
        highlight=False,
    )
    if result.picture:
        console.print(f"picture: {escape(result.picture)}", highlight=False, soft_wrap=True)


def show_explanation(found: Explanation, console: Console) -> None:
    """What was chosen, on which figures, and what else could have been."""
    c = found.chosen
    what = f"{c.lever}" + (f" with {c.algorithm}" if c.algorithm else "")
    console.print(f"Step {c.generation}: the policy {c.policy} (version {c.policy_version}) chose [bold]{what}[/].")
    console.print(f"Because: {escape('; '.join(c.reasons))}.", highlight=False)
    figures = _table(title="the figures that it saw")
    for name in ("figure", "value", "recorded in"):
        figures.add_column(name)
    for name, value, subject in found.evidence:
        figures.add_row(escape(name), f"{value:.4g}", escape(subject))
    console.print(figures)
    options = _table(title="the options")
    for name in ("", "lever", "algorithm", "feasible", "score", "reasons"):
        options.add_column(name)
    for o in sorted(c.options, key=lambda o: (not o.feasible, -(o.score or 0.0))):
        chosen = o.lever == c.lever and o.algorithm == c.algorithm
        options.add_row(
            "[green]chosen[/]" if chosen else "rejected",
            o.lever,
            o.algorithm or "—",
            "yes" if o.feasible else "no",
            "—" if o.score is None else f"{o.score:.3g}",
            escape("; ".join(o.reasons)),
        )
    console.print(options)
    tree = Tree(f"{found.chosen_id} bascule.lever.chosen (sequence {found.seq})")
    branch = tree
    for subject, type_ in found.causes:
        branch = branch.add(f"because of {type_}: {subject}")
    console.print(tree)
    console.print(f"decided by {found.producer}", highlight=False)


def show_runs(results: list[RunReport], console: Console) -> None:
    """A line for each run."""
    table = _table()
    for name in ("run", "task", "levers", "seed", "status", "generations", "best dev", "sealed", "seconds"):
        table.add_column(name)
    for r in results:
        best = next((g.dev for g in r.generations if g.generation == r.best), None)
        sealed = f"{r.sealed.before:.3f} -> {r.sealed.after:.3f}" if r.sealed else "—"
        table.add_row(
            r.run, r.task, ", ".join(r.levers), str(r.seed), r.status, str(max(0, len(r.generations) - 1)),
            _score(best), sealed, f"{r.seconds:.0f}",
        )  # fmt: skip
    console.print(table)


def show_ablation(rows: list[AblationRow], console: Console) -> None:
    """Where the gain comes from."""
    table = _table(title="ablations, on the sealed split")
    for name in ("arm", "", "score [95%]", "drop", "p", "constant baseline"):
        table.add_column(name)
    for r in rows:
        table.add_row(
            r.arm,
            r.what,
            f"{r.score:.3f} {_span(r.interval)}",
            "—" if r.arm == "whole" else f"{r.drop:.3f}",
            "—" if r.arm == "whole" else f"{r.p:.2g}",
            _score(r.baseline) if r.baseline is not None else "",
        )
    console.print(table)
