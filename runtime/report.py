"""The report of a run, folded from its log: a table, one JSON object, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas.codec import decision_hash
from bascule.schemas.decision import Lever
from bascule.schemas.envelope import Recorded
from bascule.schemas.landscape import Interval


class GenerationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the closing table; scores are fractions, tokens include prompts, seconds are wall-clock."""

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


class BaselineRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a constant or a simple rule scores on the sealed split."""

    name: str
    sealed: float


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bascule run --json`` prints.

    Attributes:
        seconds: from the first event to the last, time in which no service ran included.
        repeated_rollouts, repeated_updates: started although the log already held their outcome; 0 if all is well.
            Counted from the services' own log, which is a diagnosis and not evidence.
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


def _seconds(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def _status(state: RunState) -> str:
    match state.end:
        case ev.RunCompleted():
            return "completed"
        case ev.RunFailed():
            return "failed"
        case ev.RunCancelled():
            return "cancelled"
        case _:
            return "paused" if state.paused is not None else "open"


def _reason(state: RunState) -> str:
    return state.end.reason if state.end is not None else state.paused or ""


def report(events: Sequence[Recorded], baselines: Iterable[BaselineRow] = ()) -> RunReport:
    """Fold a run's events into its report."""
    state = RunState.of(events[0].envelope.run, events)
    tokens: dict[int, int] = {}
    for evaluation in state.evaluations.values():
        spent = sum(logged.prompt_tokens + logged.output_tokens for logged in evaluation.logged.values())
        if evaluation.request.purpose not in ("report", "ablation"):
            generation = evaluation.request.generation
            tokens[generation] = tokens.get(generation, 0) + spent
    reported = [e for e in state.evaluations.values() if e.request.purpose != "ablation"]
    total = sum(x.prompt_tokens + x.output_tokens for e in reported for x in e.logged.values())
    rows = []
    history = {g.generation: g for g in state.history()}
    for number, step in sorted(state.steps.items()):
        if step.lever is not None and step.lever.lever == "stop":
            continue
        known = history.get(number)
        figures = known.gate if known else None
        marks = [e.envelope.time for e in events if e.envelope.step == number and isinstance(e.data, IN_THE_LOOP)]
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
                tokens=tokens.get(number, 0),
                seconds=_seconds(min(marks), max(marks)) if marks else 0.0,
            )
        )
    config = state.config
    times = [e.envelope.time for e in events if _of_the_run(e)]
    return RunReport(
        run=state.run,
        status=_status(state),
        task=config.task.name,
        model=config.model,
        engine=config.engine.name,
        levers=config.levers,
        arm=ARMS.get(tuple(sorted(config.levers)), " and ".join(config.levers)),
        seed=config.seed,
        generations=tuple(rows),
        best=state.best,
        sealed=state.end.sealed if isinstance(state.end, ev.RunCompleted) else None,
        baselines=tuple(baselines),
        reason=_reason(state),
        tokens=total,
        seconds=_seconds(min(times), max(times)),
        events=state.events,
        decision_hash=decision_hash(events),
    )


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
    names = [f"{r.generation}\n{r.algorithm or r.edit or r.lever or ''}"[:22] for r in rows]
    left.set_xticks(xs, names, fontsize=8)
    left.set(xlabel="generation", ylabel="score", ylim=(0, 1), title=f"{result.run}: {result.arm}")
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
        right.axhline(baseline.sealed, ls="--", lw=0.8, c="#444444", label=f"{baseline.name} {baseline.sealed:.3f}")
    if result.baselines:
        right.legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
