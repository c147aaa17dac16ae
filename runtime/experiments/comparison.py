"""One table of an experiment: its arms side by side, each against the arms that pull one lever alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from bascule.runtime.experiments.outcome import Outcome, Spending
from bascule.runtime.experiments.statistics import bootstrap, item_p, over_seeds, paired_t
from bascule.schemas.budget import Bounds
from bascule.schemas.landscape import Interval
from bascule.schemas.run import RunConfig

Kind = Literal["levers", "best-of-n"]
LEVERS = ("harness", "weights")


class ArmPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One arm as it was asked for.

    Attributes:
        votes: samples whose majority answers, in an arm of kind ``best-of-n``.
    """

    name: str
    config: RunConfig
    kind: Kind = "levers"
    votes: int | None = None

    @property
    def levers(self) -> tuple[str, ...]:
        """That the arm pulls."""
        return () if self.kind == "best-of-n" else tuple(sorted(self.config.levers))


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run.

    Attributes:
        status: as in ``bascule status``; ``refused`` where nothing was done, ``failed`` also where serving it raised,
            which leaves the run open.
    """

    arm: str
    seed: int
    run: str
    status: str
    reason: str = ""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over seeds and items, with 95% intervals.

    Attributes:
        seeds: the mean of each seed.
        over_seeds: by Student's t; None for one seed.
        pooled: by a bootstrap over seeds and items; None where no items are known.
    """

    mean: float
    seeds: tuple[float, ...]
    over_seeds: Interval | None
    pooled: Interval | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """An arm's sealed score minus another's, paired by seed and item.

    Attributes:
        p_seeds: of the paired t test over seeds; p_items: of the sign-flip test over items; both two-sided.
    """

    against: str
    estimate: Estimate
    p_seeds: float | None
    p_items: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One arm; means are over its completed seeds, and None or empty if there are none.

    Attributes:
        before, after: sealed scores of the first harness and of the best candidate; ``best-of-n`` has but one.
        tokens: that one sealed item takes in the end.
        spent: in the loop, which the budget bounds; ``levers`` is its part of each lever, ``sealed`` what the sealed
            split took, where ``best-of-n`` spends its budget.
        bounds: of the budget, by name.
        algorithms, promotions: how often each was chosen, and a candidate of each lever promoted, over all seeds.
        oracle: the score if one of an item's samples that is right were always found, which needs the verifier: pass@n.
    """

    arm: str
    kind: Kind
    levers: tuple[str, ...]
    votes: int | None
    asked: int
    completed: int
    dev_before: Estimate | None = None
    dev_after: Estimate | None = None
    before: Estimate | None = None
    after: Estimate | None = None
    differences: tuple[Difference, ...] = ()
    tokens: float | None = None
    spent: Spending | None = None
    levers_spent: dict[str, Spending] = {}
    sealed: Spending | None = None
    bounds: dict[str, float] = {}
    algorithms: dict[str, int] = {}
    promotions: dict[str, int] = {}
    oracle: Estimate | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bascule experiment --json`` prints.

    Attributes:
        baselines: the arms that others are held against.
        sentence: whether both levers beat either alone.
        notes: what qualifies the table, a sentence each.
        files: where the table and the picture are, if they were written.
    """

    name: str
    description: str
    quick: bool
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    rows: tuple[Row, ...]
    runs: tuple[RunLine, ...]
    sentence: str
    notes: tuple[str, ...]
    files: tuple[str, ...] = ()


def usual_baselines(arms: Sequence[ArmPlan]) -> tuple[str, ...]:
    """The first arm that pulls the harness alone, and the first that pulls the weights alone."""
    first = (next((a.name for a in arms if a.levers == (lever,)), None) for lever in LEVERS)
    return tuple(name for name in first if name is not None)


def estimate(table: Sequence[Sequence[float]]) -> Estimate:
    """Of rows, one for each seed, of items."""
    seeds = tuple(statistics.fmean(row) for row in table)
    return Estimate(mean=statistics.fmean(seeds), seeds=seeds, over_seeds=over_seeds(seeds), pooled=bootstrap(table))


def difference(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Difference | None:
    """Of the seeds that both have; None where there are none, or where they were not asked the same items."""
    other = {o.seed: o for o in theirs}
    pairs = [(o, other[o.seed]) for o in ours if o.seed in other]
    if not pairs or any(a.items != pairs[0][0].items or b.items != pairs[0][0].items for a, b in pairs):
        return None
    table = [[x - y for x, y in zip(a.after, b.after, strict=True)] for a, b in pairs]
    found = estimate(table)
    return Difference(against=theirs[0].arm, estimate=found, p_seeds=paired_t(found.seeds), p_items=item_p(table))


def compare(
    *,
    name: str,
    description: str,
    quick: bool,
    seeds: tuple[int, ...],
    baselines: tuple[str, ...],
    arms: Sequence[ArmPlan],
    runs: Sequence[RunLine],
    outcomes: Sequence[Outcome],
) -> Comparison:
    """The table of what is completed."""
    by_arm = {arm.name: [o for o in outcomes if o.arm == arm.name] for arm in arms}
    rows = tuple(_row(arm, by_arm, runs, baselines) for arm in arms)
    return Comparison(
        name=name,
        description=description,
        quick=quick,
        seeds=seeds,
        baselines=baselines,
        rows=rows,
        runs=tuple(runs),
        sentence=sentence(rows, baselines),
        notes=_notes(rows, baselines, runs, outcomes),
    )


def _row(arm: ArmPlan, by_arm: dict[str, list[Outcome]], runs: Sequence[RunLine], baselines: Sequence[str]) -> Row:
    done = by_arm[arm.name]
    budget = arm.config.budget
    bounds = {n: float(v) for n in Bounds.__struct_fields__ if (v := getattr(budget, n)) is not None}
    row = Row(
        arm=arm.name,
        kind=arm.kind,
        levers=arm.levers,
        votes=arm.votes,
        asked=sum(line.arm == arm.name for line in runs),
        completed=len(done),
        bounds=bounds,
    )
    if not done:
        return row
    against = [difference(done, by_arm[b]) for b in baselines if b != arm.name and by_arm.get(b)]
    # What was answered is one of the samples, whatever a scorer that measures time finds when it is asked again.
    oracles = [[*map(max, o.oracle, o.after)] for o in done if o.oracle is not None]
    return msgspec.structs.replace(
        row,
        dev_before=_of_means([o.dev[0] for o in done]),
        dev_after=_of_means([o.dev[1] for o in done]),
        before=estimate([o.before for o in done]) if arm.kind == "levers" else None,
        after=estimate([o.after for o in done]),
        differences=tuple(d for d in against if d is not None),
        tokens=statistics.fmean(o.tokens for o in done),
        spent=_mean_spending([o.loop for o in done]),
        levers_spent={lever: _mean_spending([o.levers[lever] for o in done]) for lever in arm.levers},
        sealed=_mean_spending([o.sealed for o in done]),
        algorithms=dict(Counter(a for o in done for a in o.algorithms)),
        promotions=dict(Counter(lever for o in done for lever in o.promoted)),
        oracle=estimate(oracles) if len(oracles) == len(done) else None,
    )


def _of_means(values: Sequence[float]) -> Estimate:
    return Estimate(mean=statistics.fmean(values), seeds=tuple(values), over_seeds=over_seeds(values))


def _mean_spending(found: Sequence[Spending]) -> Spending:
    return Spending(
        rollouts=statistics.fmean(s.rollouts for s in found),
        tokens=statistics.fmean(s.tokens for s in found),
        seconds=statistics.fmean(s.seconds for s in found),
    )


def sentence(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    """Whether each arm that pulls both levers beats the arms that pull one, by the pooled 95% intervals."""
    both = [r for r in rows if set(r.levers) == set(LEVERS)]
    single = [r.arm for r in rows if r.arm in baselines and len(r.levers) == 1]
    if not both or not single:
        return _best(rows)
    return " ".join(_verdict(row, single) for row in both)


def _verdict(row: Row, single: Sequence[str]) -> str:
    against = {d.against: d for d in row.differences}
    missing = [name for name in single if name not in against]
    if row.completed == 0 or missing:
        return f"{row.arm}: whether both levers beat {_listed(single)} alone cannot be said yet."
    parts = [_told(against[n]) for n in single]
    beaten = [n for n in single if _side(against[n]) > 0]
    lost = [n for n in single if _side(against[n]) < 0]
    if len(beaten) == len(single):
        words = f"both levers beat {'either' if len(single) == 2 else _listed(single)} alone"
    else:
        open_ = [n for n in single if n not in beaten and n not in lost]
        said = [
            *([f"beat {_listed(beaten)} alone"] if beaten else []),
            *([f"are worse than {_listed(lost)} alone"] if lost else []),
            *([f"are not told from {_listed(open_)} alone"] if open_ else []),
        ]
        words = f"both levers {', '.join(said)}: they do not beat every single one"
    return f"{row.arm}: {words} ({'; '.join(parts)}; points of the sealed score, 95% intervals)."


def _told(found: Difference) -> str:
    seeds = len(found.estimate.seeds)
    over = "the items of one seed" if seeds == 1 else f"{seeds} seeds and their items"
    return f"{_signed(found.estimate.mean)} {_interval(found.estimate.pooled)} against {found.against} over {over}"


def _best(rows: Sequence[Row]) -> str:
    done = [r for r in rows if r.after is not None]
    if not done:
        return "No run is completed."
    top = max(done, key=lambda r: r.after.mean if r.after is not None else 0.0)
    assert top.after is not None
    equal = [r.arm for r in done if r.after is not None and r.after.mean == top.after.mean]
    if len(equal) > 1:
        return f"{_listed(equal)} have the highest sealed score, {top.after.mean:.3f}."
    more = f": {'; '.join(map(_told, top.differences))}" if top.differences else ""
    return f"{top.arm} has the highest sealed score, {top.after.mean:.3f}{more}."


def _side(found: Difference) -> int:
    """1 if the interval is above 0, -1 if below, 0 if it holds 0."""
    interval = found.estimate.pooled
    assert interval is not None
    return (interval.low > 0) - (interval.high < 0)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"[{found.low:+.3f}, {found.high:+.3f}]"


def _notes(
    rows: Sequence[Row], baselines: Sequence[str], runs: Sequence[RunLine], outcomes: Sequence[Outcome]
) -> tuple[str, ...]:
    notes = []
    lacking = [line for line in runs if line.status != "completed"]
    if lacking:
        notes.append(f"{len(lacking)} of {len(runs)} runs are not completed, and not in the table")
    alone = [r.arm for r in rows if r.completed == 1]
    alone += [
        f"{r.arm} against {d.against}" for r in rows for d in r.differences if r.completed > 1 == len(d.estimate.seeds)
    ]
    if alone:
        told = f"with one seed, intervals are over items only, and say nothing of other seeds: {_listed(alone)}"
        notes.append(told)
    if len({frozenset(o.seed for o in outcomes if o.arm == r.arm) for r in rows if r.completed}) > 1:
        notes.append("the scores of arms are of different seeds; their differences are of the seeds that both have")
    lone = [r.arm for r in rows if r.completed and set(baselines) - {r.arm, *(d.against for d in r.differences)}]
    if lone:
        notes.append(f"without a difference for want of a common seed and the same items: {_listed(lone)}")
    if len({o.code for o in outcomes}) > 1:
        notes.append(f"the runs were made by {len({o.code for o in outcomes})} versions of Bascule's code")
    if any(r.oracle is not None for r in rows):
        notes.append("pass@n bounds from above and is no score of an arm: to pick the right sample needs the verifier")
    return tuple(notes)
