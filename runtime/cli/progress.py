"""Live progress: a line for each event that a person follows, and a bar for the evaluation that is under way."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.run import task_label


class Live:
    """Listens to a run's events and tells them to a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[str, object] = {}
        self._state: RunState | None = None
        self._quiet_until = 0

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def skip_to(self, seq: int) -> None:
        """Tell nothing of events up to ``seq``: they are history."""
        self._quiet_until = seq

    def __call__(self, event: Recorded) -> None:
        if self._state is None:
            self._state = RunState(run=event.envelope.run)
        self._state.apply(event)
        self._bar(event)
        if event.seq > self._quiet_until and (line := self._line(event)):
            self.say(line)

    def _bar(self, event: Recorded) -> None:
        assert self._state is not None
        data = event.data
        if isinstance(data, ev.EpisodesRequested) and data.shard == 0:
            self._bars[data.evaluation] = self._progress.add_task(f"  {data.evaluation}", total=None)
        name = getattr(data, "evaluation", None)
        if name in self._bars:
            evaluation = self._state.evaluations[name]
            bar = self._bars[name]
            self._progress.update(bar, total=evaluation.size, completed=len(evaluation.verdicts))  # type: ignore[arg-type]
            if evaluation.completed is not None:
                self._progress.remove_task(bar)  # type: ignore[arg-type]
                del self._bars[name]

    def _line(self, event: Recorded) -> str | None:
        match event.data:
            case ev.RunStarted() as d:
                with_ = "the constant engine" if d.config.engine.name == "constant" else d.config.model
                return (
                    f"[bold]{event.envelope.run}[/]: {escape(task_label(d.config.task))} with {escape(with_)}, "
                    f"levers {' and '.join(d.config.levers)}, seed {d.config.seed}; "
                    f"{d.train} train, {d.dev} dev, {d.sealed} sealed"
                )
            case ev.LeverChosen(lever="stop") as d:
                return f"[bold]stop[/]: {escape('; '.join(d.reasons))}; scoring the sealed split"
            case ev.LeverChosen() as d:
                what = d.algorithm or "edit"
                return f"[bold]generation {d.generation}[/]: {d.lever} ({what}): {escape('; '.join(d.reasons))}"
            case ev.HarnessProposed() as d:
                return f"  harness {d.digest[:8]} by {escape(d.author)}: {escape(d.edit)}"
            case ev.AuthorFailed() as d:
                return f"  the author {escape(d.author)} proposes nothing: {escape(d.reason)}"
            case ev.EvaluationCompleted(purpose="training"):
                return None
            case ev.EvaluationCompleted() as d:
                s = d.landscape
                return (
                    f"  {d.evaluation}: {s.score:.3f} [{s.score_interval.low:.3f}, {s.score_interval.high:.3f}] "
                    f"over {s.groups} examples"
                    + (f", {s.unscored} unscored" if s.unscored else "")
                    + (f", {s.errors:.0%} of the episodes ended in an error" if s.errors else "")
                )
            case ev.AdapterCheckpointed() as d:
                m = d.metrics
                return f"  update {d.iteration + 1}: " + ", ".join(
                    f"{k} {m[k]:.3g}" for k in ("reward", "loss", "entropy", "ess", "grad_norm") if k in m
                ) + f", {d.measured.seconds:.1f} s"  # fmt: skip
            case ev.TrainFailed() as d:
                return f"  the training failed: {escape(d.reason)}"
            case ev.CandidatePromoted() | ev.CandidateRejected() as d:
                return f"  {gate_line(d)}"
            case ev.RunCompleted() as d:
                r = d.sealed
                return f"sealed: {r.before:.3f} before, {r.after:.3f} after, p = {r.p:.2g}, n = {r.n}"
            case ev.RunRolledBack() as d:
                return f"[bold]rolled back[/] to candidate {d.generation}: {escape(d.reason)}"
            case ev.RunFailed() | ev.RunCancelled() | ev.RunPaused() as d:
                return f"[bold]{type(d).__name__}[/]: {escape(d.reason)}"
            case _:
                return None


def gate_line(data: ev.CandidatePromoted | ev.CandidateRejected) -> str:
    """The gate's verdict with its figures."""
    f = data.figures
    if f.test == "first":
        return f"[green]promoted[/] as the first: dev {f.score:.3f}"
    word = "[green]promoted[/]" if isinstance(data, ev.CandidatePromoted) else "[red]rejected[/]"
    return (
        f"{word}: dev {f.score:.3f} against {f.parent_score:.3f} (generation {data.over}), "
        f"{f.wins} better, {f.losses} worse, p = {f.p:.2g} ({f.test}, alpha {f.alpha})"
        + (f"; {escape(f.reason)}" if isinstance(f.reason, str) else "")
    )
