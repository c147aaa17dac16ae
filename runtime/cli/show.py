"""How results look to people."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from bascule.runtime.audit.ablation import AblationRow
from bascule.runtime.audit.cost import BudgetRow
from bascule.runtime.audit.explain import Explanation
from bascule.runtime.audit.report import RunReport
from bascule.runtime.cli.landscapes import landscape_lines
from bascule.runtime.services.budgets import POLICY as BUDGET
from bascule.runtime.services.budgets import amount, unit
from bascule.schemas.events import LeverChosen
from bascule.schemas.landscape import Interval

#: Links of the chain of causes that people are shown.
_CAUSES = 7


def _table(title: str | None = None) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)


def _score(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _span(interval: Interval) -> str:
    return escape(f"[{interval.low:.3f}, {interval.high:.3f}]")


def show_report(result: RunReport, console: Console) -> None:
    """The closing table, the sealed scores and the baselines."""
    regime = f" in the regime {escape(result.regime)}" if result.regime else ""
    table = _table(
        title=f"{result.run}: {escape(result.task)}{regime}, {result.arm}, seed {result.seed} ({result.status})"
    )
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
    best = next((row for row in result.generations if row.generation == result.best), None)
    if best is not None and best.landscape is not None and best.landscape.rewards is not None:
        console.print(f"train, under the candidate of generation {best.generation}:", highlight=False)
        for line in landscape_lines(best.landscape, best.rollout):
            console.print(f"  {escape(line)}", highlight=False)
    if result.sealed is not None:
        s = result.sealed
        console.print(
            f"sealed ({s.n} examples): [bold]{s.before:.3f}[/] {_span(s.before_interval)} before, "
            f"[bold]{s.after:.3f}[/] {_span(s.after_interval)} after "
            f"(generation {result.best}); {s.wins} better, {s.losses} worse, p = {s.p:.2g} ({s.test}, one-sided)",
            highlight=False,
        )
        if result.gaps is not None and result.gaps.train_dev is not None and result.gaps.dev_sealed is not None:
            console.print(
                f"gap from train to dev {result.gaps.train_dev:+.3f}, from dev to sealed {result.gaps.dev_sealed:+.3f}",
                highlight=False,
            )
        times = "once" if result.looks == 1 else f"{result.looks} times"
        if result.looks:
            console.print(
                f"the sealed split of {escape(result.task)} was looked at {times} in this log", highlight=False
            )
    if result.baselines:
        text = ", ".join(f"{b.name} {'unscored' if b.sealed is None else _score(b.sealed)}" for b in result.baselines)
        console.print(f"baselines without a model, on the same examples: {escape(text)}", highlight=False)
        for b in result.baselines:
            if b.unscored:
                console.print(f"{escape(b.name)}: {b.unscored} examples unscored: {escape(b.reason)}", highlight=False)
    for note in result.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    if result.unscored:
        console.print(f"{result.unscored} trajectories have no verdict; `bascule log` says why", highlight=False)
    if result.unsafe:
        console.print("[bold red]UNSAFE: code ran without a sandbox; no score of this run can be trusted[/]")
    for found in result.sandbox:
        held = ", ".join(found.holds) or "nothing"
        console.print(f"sandbox of {found.service} ({found.kind}): {held} held", highlight=False)
    if result.reason:
        console.print(f"{result.status}: {escape(result.reason)}", highlight=False)
    for line in budget_lines(result.budget):
        console.print(line, highlight=False)
    console.print(
        f"{result.tokens:,} tokens, {result.seconds:.0f} s, {result.events} events, "
        f"decision hash {result.decision_hash}",
        highlight=False,
    )
    if result.picture:
        console.print(f"picture: {escape(result.picture)}", highlight=False, soft_wrap=True)


def budget_lines(rows: Iterable[BudgetRow]) -> list[str]:
    """What is spent of each bound, and left, a line for the run and for each lever."""
    lines: dict[str, list[str]] = {}
    for r in rows:
        whose = "budget" if r.lever is None else f"budget of {r.lever}"
        spent, bound, left = (amount(r.name, x) for x in (r.spent, r.bound, r.left))
        lines.setdefault(whose, []).append(f"{spent} of {bound} {unit(r.name)} spent, {left} left")
    return [f"{whose}: {'; '.join(parts)}" for whose, parts in lines.items()]


def show_explanation(found: Explanation, console: Console) -> None:
    """The answer to "why?": first in sentences, then the figures, the options, the causes and the code."""
    if found.chosen is None:
        console.print(f"[bold]{found.type}[/] at sequence {found.seq}: {found.subject}", highlight=False)
        console.print_json(msgspec.json.encode(found.data).decode())
    else:
        _show_choice(found, found.chosen, console)
    tree = Tree(f"{found.type}: {found.subject} (sequence {found.seq})")
    branch = tree
    for cause in found.causes[:_CAUSES]:
        branch = branch.add(f"because of {cause.type}: {cause.subject} (sequence {cause.seq})")
    if len(found.causes) > _CAUSES:
        branch.add(f"and {len(found.causes) - _CAUSES} more, back to the start of the run; --json has all of them")
    console.print(tree)
    console.print(f"written by {found.producer} at {found.time}", highlight=False)
    console.print("the run was pinned to: " + ", ".join(found.versions), highlight=False, soft_wrap=True)


def named(lever: str, algorithm: str | None) -> str:
    """A choice in words."""
    return lever + (f" with {algorithm}" if algorithm else "")


def _show_choice(found: Explanation, c: LeverChosen, console: Console) -> None:
    chosen = next((o for o in c.options if (o.lever, o.algorithm) == (c.lever, c.algorithm)), None)
    score = f" It scored {chosen.score:.3g}." if chosen and chosen.score is not None else ""
    who = "the run's budget" if c.policy == BUDGET else f"the policy {c.policy} (version {c.policy_version})"
    console.print(
        f"At step {c.generation} {who} chose "
        f"[bold]{named(c.lever, c.algorithm)}[/]: {escape('; '.join(c.reasons))}.{score}",
        highlight=False,
    )
    others = [o for o in c.options if o is not chosen]
    ranked = sorted((o for o in others if o.feasible), key=lambda o: -(o.score or 0.0))
    if ranked:
        text = "; ".join(
            named(o.lever, o.algorithm)
            + ("" if o.score is None else f" at {o.score:.3g}")
            + (f" ({'; '.join(o.reasons)})" if o.reasons else "")
            for o in ranked
        )
        console.print(f"Also feasible, and not chosen: {escape(text)}.", highlight=False)
    out = [o for o in others if not o.feasible]
    if out:
        text = "; ".join(f"{named(o.lever, o.algorithm)} ({'; '.join(o.reasons)})" for o in out)
        console.print(f"Not feasible: {escape(text)}.", highlight=False)
    console.print(_came_of_it(found), highlight=False)
    for line in budget_lines(found.budget):
        console.print(f"Then: {line}", highlight=False)
    figures = _table(title="the figures that it saw")
    for name in ("figure", "value", "recorded in"):
        figures.add_column(name)
    for e in c.evidence:
        figures.add_row(escape(e.name), f"{e.value:.4g}", escape(e.event))
    console.print(figures)
    if found.seen is not None:
        console.print(f"the landscape over train of generation {found.seen.generation}:", highlight=False)
        for line in landscape_lines(found.seen.landscape, found.seen.measured.rollout):
            console.print(f"  {escape(line)}", highlight=False)
    options = _table(title="the options")
    for name in ("", "lever", "algorithm", "feasible", "score", "reasons"):
        options.add_column(name)
    for o in sorted(c.options, key=lambda o: (not o.feasible, -(o.score or 0.0))):
        options.add_row(
            "[green]chosen[/]" if o is chosen else "rejected",
            o.lever,
            o.algorithm or "—",
            "yes" if o.feasible else "no",
            "—" if o.score is None else f"{o.score:.3g}",
            escape("; ".join(o.reasons)),
        )
    console.print(options)


def _came_of_it(found: Explanation) -> str:
    outcome = found.outcome
    if outcome is None:
        stop = found.chosen is not None and found.chosen.lever == "stop"
        return "The run stopped there." if stop else "What came of it is not decided yet."
    if outcome.gate is None:
        return escape(f"It failed: {outcome.reason}")
    g = outcome.gate
    against = "" if g.parent_score is None else f" against {g.parent_score:.3f}"
    tested = "" if g.p is None else f", {g.wins} better and {g.losses} worse, p = {g.p:.2g} ({g.test})"
    why = f" {g.reason[0].upper()}{g.reason[1:]}." if isinstance(g.reason, str) and g.parent_score is not None else ""
    return escape(f"Its candidate was {outcome.outcome}: {g.score:.3f} on dev{against}{tested}.{why}")


def show_runs(results: list[RunReport], console: Console) -> None:
    """A line for each run."""
    table = _table()
    for name in ("run", "task", "levers", "seed", "status", "generations", "best dev", "sealed", "seconds"):
        table.add_column(name)
    for r in results:
        best = next((g.dev for g in r.generations if g.generation == r.best), None)
        sealed = f"{r.sealed.before:.3f} -> {r.sealed.after:.3f}" if r.sealed else "—"
        table.add_row(
            r.run, escape(r.task), ", ".join(r.levers), str(r.seed), r.status, str(max(0, len(r.generations) - 1)),
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
