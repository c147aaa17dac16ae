"""The report of a run, folded from its log: a table, one JSON object, a picture."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import msgspec

from bascule.runtime.audit.cost import BudgetRow, budget_rows
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas.codec import DecisionHash
from bascule.schemas.decision import Lever
from bascule.schemas.envelope import Recorded
from bascule.schemas.landscape import Interval, RewardLandscape, Spread
from bascule.schemas.run import task_label
from bascule.schemas.trajectory import Unscored
from bascule.verifiers.gate import reported_score


class GenerationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the closing table; scores are fractions, tokens include prompts, seconds are wall-clock.

    Attributes:
        landscape: over train; ``rollout`` is what one of its episodes took, in seconds.
        dev: as measured; ``reported`` is what the gate's guard lets the run say of it after this generation.
        why: the gate's verdict in words.
    """

    generation: int
    lever: Lever | None
    algorithm: str | None
    edit: str | None
    harness: str | None
    adapter: str | None
    train: float | None
    dev: float | None
    dev_interval: Interval | None
    wins: int
    losses: int
    p: float | None
    promoted: bool
    outcome: str
    tokens: int
    seconds: float
    landscape: RewardLandscape | None = None
    rollout: Spread | None = None
    reported: float | None = None
    why: str = ""


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """How much better the best candidate does on what the levers saw than on what they did not; high is overfitting.

    Attributes:
        train_dev: score on train (sampled) minus the reported one on dev (greedy).
        dev_sealed: the reported score on dev minus that on sealed; None before the end.
    """

    train_dev: float | None
    dev_sealed: float | None


class BaselineRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a constant or a simple rule scores on the sealed split.

    Attributes:
        sealed: the score; None if no example has a verdict.
        unscored: examples without a verdict; ``reason`` is that of the first.
    """

    name: str
    sealed: float | None
    unscored: int = 0
    reason: str = ""


class SandboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """What confined the code that a service ran for others, as it found out by trying."""

    service: str
    kind: str
    holds: tuple[str, ...]
    mechanisms: tuple[str, ...]
    missing: tuple[str, ...]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bascule run --json`` prints.

    Attributes:
        task: its name, or that of the user's file or folder that it is.
        seconds: from the first event to the last, time in which no service ran included.
        repeated_rollouts, repeated_updates: started although the log already held their outcome; 0 if all is well.
            Counted from the services' own log, which is a diagnosis and not evidence.
        regime: the rules that the task was played under, where it has several; scores of two do not compare.
        unsafe: harnesses and candidates ran without a sandbox: no score of this run can be trusted.
        sandbox: what confined them, by service.
        unscored: trajectories without a verdict.
        budget: what is spent and left of each bound that the run has.
        looks: how many times the sealed split of this task has been looked at in this log, this run included.
        notes: what is to be said of the task's own scoring, and of episodes that ended in errors, a sentence each.
    """

    run: str
    status: str
    task: str
    model: str
    engine: str
    levers: tuple[str, ...]
    arm: str
    seed: int
    generations: tuple[GenerationRow, ...]
    best: int | None
    sealed: ev.SealedReport | None
    baselines: tuple[BaselineRow, ...]
    reason: str
    tokens: int
    seconds: float
    events: int
    decision_hash: str
    repeated_rollouts: int = 0
    repeated_updates: int = 0
    picture: str | None = None
    regime: str = ""
    unsafe: bool = False
    sandbox: tuple[SandboxRow, ...] = ()
    unscored: int = 0
    looks: int = 0
    notes: tuple[str, ...] = ()
    budget: tuple[BudgetRow, ...] = ()
    gaps: Gaps | None = None


#: A generation lasts from its lever (or the run's start) to its gate or failure.
IN_THE_LOOP = (
    *(ev.RunStarted, ev.LeverChosen, ev.AdapterCheckpointed),
    *(ev.CandidatePromoted, ev.CandidateRejected, ev.AuthorFailed, ev.TrainFailed),
)
ARMS = {
    ("harness",): "harness only (control arm)",
    ("weights",): "weights only (control arm)",
    ("harness", "weights"): "harness and weights",
}


def _widened(span: tuple[str, str] | None, time: str) -> tuple[str, str]:
    return (time, time) if span is None else (min(span[0], time), max(span[1], time))


def _seconds(span: tuple[str, str] | None) -> float:
    if span is None:
        return 0.0
    first, last = map(datetime.fromisoformat, span)
    return (last - first).total_seconds()


def _weaker(known: SandboxRow | None, found: SandboxRow) -> SandboxRow:
    """Of two workers of a service, the one whose sandbox holds less: the run is as safe as that."""
    return found if known is None or len(found.holds) <= len(known.holds) else known


_MOST_ERRORS = 0.5


def _reason(state: RunState) -> str:
    return state.end.reason if state.end is not None else state.paused or ""


class Reporter:
    """Folds a run's events, one by one, into its report."""

    def __init__(self, run: str) -> None:
        self.state = RunState(run=run)
        self._hash = DecisionHash()
        self._tokens: dict[int, int] = {}
        self._sealed_tokens = 0
        self._span: tuple[str, str] | None = None
        self._loops: dict[int, tuple[str, str]] = {}
        self._sandbox: dict[str, SandboxRow] = {}
        self._unscored = 0

    def add(self, event: Recorded) -> None:
        """Take the run's next event."""
        self.state.apply(event)
        self._hash.add(event)
        data, time, step = event.data, event.envelope.time, event.envelope.step
        if _of_the_run(event):
            self._span = _widened(self._span, time)
            if isinstance(data, ev.TrajectoryLogged):
                self._count(data)
        if isinstance(data, ev.TrajectoryScored) and isinstance(data.verdict, Unscored):
            self._unscored += 1
        if isinstance(data, ev.SandboxProbed):
            r = data.report
            row = SandboxRow(
                service=data.service, kind=r.kind, holds=r.holds, mechanisms=r.mechanisms, missing=r.missing
            )
            self._sandbox[data.service] = _weaker(self._sandbox.get(data.service), row)
        if isinstance(data, IN_THE_LOOP):
            self._loops[step] = _widened(self._loops.get(step), time)

    def _count(self, data: ev.TrajectoryLogged) -> None:
        spent = data.prompt_tokens + data.output_tokens
        evaluation = self.state.evaluations.get(data.evaluation)
        if evaluation is None or evaluation.completed is not None:
            return  # nobody asked for it
        request = evaluation.request
        if request.purpose == "report":
            self._sealed_tokens += spent
        else:
            self._tokens[request.generation] = self._tokens.get(request.generation, 0) + spent

    def report(self, baselines: Iterable[BaselineRow] = ()) -> RunReport:
        """The report of what was taken so far."""
        state = self.state
        config = state.config
        rows = self._rows()
        sealed = state.end.sealed if isinstance(state.end, ev.RunCompleted) else None
        return RunReport(
            run=state.run,
            status=state.status,
            task=task_label(config.task),
            model=config.model,
            engine=config.engine.name,
            levers=config.levers,
            arm=ARMS.get(tuple(sorted(config.levers)), " and ".join(config.levers)),
            seed=config.seed,
            generations=rows,
            best=state.best,
            sealed=sealed,
            baselines=tuple(baselines),
            reason=_reason(state),
            tokens=sum(self._tokens.values()) + self._sealed_tokens,
            seconds=_seconds(self._span),
            events=state.events,
            decision_hash=self._hash.hexdigest(),
            regime=str(config.task.params.get("regime", "")),
            unsafe=config.sandbox.unsafe or any(row.kind == "unsafe" for row in self._sandbox.values()),
            sandbox=tuple(self._sandbox.values()),
            unscored=self._unscored,
            budget=budget_rows(state),
            gaps=_gaps(next((row for row in rows if row.generation == state.best), None), sealed),
            notes=_broken(state),
        )

    def _rows(self) -> tuple[GenerationRow, ...]:
        rows = []
        history = {g.generation: g for g in self.state.history()}
        for number, step in sorted(self.state.steps.items()):
            if step.lever is not None and step.lever.lever == "stop":
                continue
            known = history.get(number)
            train = self.state.evaluations.get(f"g{number:02d}-train")
            figures = known.gate if known else None
            rows.append(
                GenerationRow(
                    generation=number,
                    lever=step.lever.lever if step.lever else None,
                    algorithm=step.lever.algorithm if step.lever else None,
                    edit=step.harness.edit if step.harness else None,
                    harness=step.candidate.harness if step.candidate else None,
                    adapter=step.candidate.adapter if step.candidate else None,
                    train=known.train.score if known and known.train else None,
                    dev=figures.score if figures else None,
                    dev_interval=figures.score_interval if figures else None,
                    wins=figures.wins if figures else 0,
                    losses=figures.losses if figures else 0,
                    p=figures.p if figures else None,
                    promoted=known is not None and known.outcome == "promoted",
                    outcome=known.outcome if known else "open",
                    reported=reported_score(figures) if figures else None,
                    why=figures.reason if figures and isinstance(figures.reason, str) else "",
                    tokens=self._tokens.get(number, 0),
                    seconds=_seconds(self._loops.get(number)),
                    landscape=known.train if known else None,
                    rollout=train.completed.measured.rollout if known and train and train.completed else None,
                )
            )
        return tuple(rows)


def _broken(state: RunState) -> tuple[str, ...]:
    """A sentence on each evaluation of which most episodes ended in an error."""
    found = []
    for name, evaluation in state.evaluations.items():
        if evaluation.completed is None or evaluation.request.purpose == "training":
            continue
        figures = evaluation.completed.landscape
        if figures.errors > _MOST_ERRORS:
            found.append(
                f"{name}: {figures.errors:.0%} of {figures.samples} episodes ended in an error; "
                f"`bascule log {state.run} --type trajectory.logged --json` has them."
            )
    return tuple(found)


def _gaps(best: GenerationRow | None, sealed: ev.SealedReport | None) -> Gaps | None:
    if best is None or best.reported is None:
        return None
    return Gaps(
        train_dev=None if best.train is None else best.train - best.reported,
        dev_sealed=None if sealed is None else best.reported - sealed.after,
    )


def report(events: Iterable[Recorded], baselines: Iterable[BaselineRow] = ()) -> RunReport:
    """The report of a run's events, of which there is at least the first."""
    events = iter(events)
    first = next(events)
    reporter = Reporter(first.envelope.run)
    reporter.add(first)
    for event in events:
        reporter.add(event)
    return reporter.report(baselines)


def _of_the_run(event: Recorded) -> bool:
    """Whether an event belongs to the run itself, not to an ablation that was asked for afterwards."""
    _, _, aggregate, name, _ = event.subject.split(".")
    return aggregate != "ablation" and not name.startswith("abl-")


def draw(result: RunReport, path: Path) -> None:
    """Draw scores by generation, and sealed before and after, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in result.generations if r.dev is not None]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(3, 1.2), sharey=True, layout="constrained"
    )
    xs = [r.generation for r in rows]
    dev = [r.dev or 0.0 for r in rows]
    low = [d - (r.dev_interval.low if r.dev_interval else d) for d, r in zip(dev, rows, strict=True)]
    high = [(r.dev_interval.high if r.dev_interval else d) - d for d, r in zip(dev, rows, strict=True)]
    left.errorbar(xs, dev, yerr=[low, high], fmt="none", ecolor="#9aa7b4", capsize=3, zorder=1)
    for promoted, label, colour in ((True, "dev, promoted", "#1b7f5c"), (False, "dev, rejected", "#c0392b")):
        chosen = [r for r in rows if r.promoted == promoted]
        if chosen:
            left.scatter([r.generation for r in chosen], [r.dev for r in chosen], c=colour, label=label, zorder=3)
    train = [r for r in rows if r.train is not None]
    left.plot(
        [r.generation for r in train], [r.train for r in train], ":", c="#4a6fa5", label="train (sampled)", zorder=2
    )
    names = [f"{r.generation}\n{r.algorithm or r.edit or r.lever or ''}"[:22].replace("$", r"\$") for r in rows]
    left.set_xticks(xs, names, fontsize=8)
    left.set(xlabel="generation", ylabel="score", title=f"{result.run}: {result.arm}")
    left.legend(fontsize=8, loc="upper left")
    if result.sealed is not None:
        s = result.sealed
        scores = (s.before, s.after)
        spread = [
            [s.before - s.before_interval.low, s.after - s.after_interval.low],
            [s.before_interval.high - s.before, s.after_interval.high - s.after],
        ]
        right.bar((0, 1), scores, color=("#9aa7b4", "#1b7f5c"), yerr=spread, capsize=4)
        right.set_xticks((0, 1), (f"before\n{s.before:.3f}", f"after\n{s.after:.3f}"))
        right.set_title(f"sealed, n={s.n}, p={s.p:.2g}", fontsize=10)
    for baseline in result.baselines:
        if baseline.sealed is not None:
            label = f"{baseline.name} {baseline.sealed:.3f}"
            right.axhline(baseline.sealed, ls="--", lw=0.8, c="#444444", label=label)
    if any(baseline.sealed is not None for baseline in result.baselines):
        right.legend(fontsize=7, loc="upper left")
    bottom, top = left.get_ylim()  # of both: they share it, and rewards need not be shares
    left.set_ylim(min(0.0, bottom), max(1.0, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
