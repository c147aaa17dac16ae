"""What policies look at: counts over the history, and the figures that a decision names as its evidence."""

from __future__ import annotations

from collections.abc import Sequence

from bascule.plugins.policy import Generation, PolicyInput
from bascule.schemas.decision import Evidence
from bascule.schemas.events import PairedFigures

#: Of the landscape over train, by the version of ``rules`` that first looked at them.
FIRST = ("success_rate", "informative", "format_failures", "errors", "mean", "variance")
SECOND = (*FIRST, "skew", "distinct_rewards", "step_rewards")
THIRD = (*SECOND, "density", "step_density", "ess", "kl_to_base")


def promoted(given: PolicyInput) -> Generation:
    """The generation whose candidate is the parent of what comes next."""
    return next(g for g in given.history if g.generation == given.best)


def plateau(history: Sequence[Generation]) -> int:
    """Harness edits since the last promoted one: generations in a row whose edit was not promoted."""
    count = 0
    for g in reversed(history):
        if g.lever == "harness":
            if g.outcome == "promoted":
                break
            count += 1
    return count


def failures(history: Sequence[Generation], algorithm: str) -> int:
    """Jobs of an algorithm since its last promoted one."""
    count = 0
    for g in reversed(history):
        if g.lever == "weights" and g.algorithm == algorithm:
            if g.outcome == "promoted":
                break
            count += 1
    return count


def jobs_in_a_row(history: Sequence[Generation]) -> tuple[str | None, int]:
    """The algorithm of the newest job, and how many jobs in a row were its; None and 0 without a job.

    A job that left no adapter ends the row: its algorithm has nothing under way that would be worth keeping on.
    """
    jobs = [g for g in history if g.lever == "weights"]
    if not jobs or jobs[-1].outcome == "failed":
        return None, 0
    algorithm = jobs[-1].algorithm
    count = 0
    for job in reversed(jobs):
        if job.algorithm != algorithm or job.outcome == "failed":
            break
        count += 1
    return algorithm, count


def on_regression_set(history: Sequence[Generation]) -> tuple[Generation, PairedFigures] | None:
    """The newest job whose candidate the gate held against its parent on the regression set, and what came of it."""
    for g in reversed(history):
        if g.lever == "weights" and g.gate is not None and isinstance(g.gate.regression, PairedFigures):
            return g, g.gate.regression
    return None


def evidence(given: PolicyInput, figures: Sequence[str] = THIRD) -> tuple[Evidence, ...]:
    """The harness plateau, ``figures`` of the promoted candidate's landscape over train, and its score on dev.

    With the figures of version 3 also what the newest job did to the regression set. Figures that were not computed or
    measured are left out.
    """
    best = promoted(given)
    found = [Evidence(name="harness plateau", value=plateau(given.history), event=best.gate_event or "")]
    if best.train is not None and best.train_event:
        values = ((name, getattr(best.train, name)) for name in figures)
        found += [
            Evidence(name=f"train {name}", value=float(value), event=best.train_event)
            for name, value in values
            if value is not None
        ]
    if best.dev is not None and best.dev_event:
        found.append(Evidence(name="dev score", value=best.dev.score, event=best.dev_event))
    tested = on_regression_set(given.history) if figures is THIRD else None
    if tested is not None:
        found.append(
            Evidence(name="regression difference", value=tested[1].difference, event=tested[0].gate_event or "")
        )
    return tuple(found)
