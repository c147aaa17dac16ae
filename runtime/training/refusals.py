"""What fails a training job, and what is none of its doing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bascule.plugins.algorithm import Algorithm, Group, OwnTraining
from bascule.runtime.training.backend import OtherInstallation
from bascule.schemas.errors import LogError, OutOfStep, TrainError
from bascule.schemas.events import TrainRequested
from bascule.trainers.credit import credit_of
from bascule.trainers.feasible import unmet

if TYPE_CHECKING:
    from bascule.trainers.jobs import Update


def refuse_infeasible(algorithm: Algorithm, request: TrainRequested, groups: Sequence[Group]) -> None:
    """Refuse a job whose first data do not meet what the algorithm requires, before anything is computed.

    Raises:
        TrainError: says which requirement failed on which data; or the algorithm gives no sampled token credit, as far
            as it can say so without a model; or the job would train from the same logged data again and again.
    """
    if request.logged is not None and request.iterations > 1:
        raise TrainError(
            f"{request.iterations} iterations are asked for on the logged samples of {request.logged}, which would be "
            "the same ones each time.",
            next_step="Ask for one iteration, with more num_iterations to pass over the samples again.",
        )
    reasons = unmet(algorithm.requires, groups)
    if reasons:
        raise _infeasible(algorithm, groups, ". ".join(reasons))
    if algorithm.streams or isinstance(algorithm, OwnTraining):
        return
    tokens = {s.trajectory: s.tokens for g in groups for s in g.samples}
    trained = [{c.trajectory, c.rejected} - {None} for c in credit_of(algorithm, groups, request.params)]
    if not any(all(tokens.get(t or "", 0) for t in unit) for unit in trained):
        raise _infeasible(algorithm, groups, _no_credit(groups))


def refuse_unmoved(algorithm: Algorithm, groups: Sequence[Group], update: Update) -> None:
    """Refuse the adapter of a job's first update if that took no optimiser step, and so has changed nothing.

    Raises:
        TrainError: it took none.
    """
    if 0 in (update.metrics.get("optimizer_steps"), update.metrics.get("trained_tokens")):
        raise _infeasible(algorithm, groups, _no_credit(groups))


def _no_credit(groups: Sequence[Group]) -> str:
    """That no sample got credit, with what often keeps algorithms from giving any."""
    rows = [[s for s in g.samples if s.reward is not None] for g in groups]
    cut = sum(any(t.truncated for t in s.turns) for row in rows for s in row)
    equal = sum(len({s.reward for s in row}) < 2 for row in rows)
    alike = sum(len({tuple(t.token_ids for t in s.turns) for s in row}) < 2 for row in rows)
    return (
        f"No sample got credit: of {sum(map(len, rows))} scored samples {cut} were cut at a token limit; of "
        f"{len(rows)} groups {equal} have no two different rewards, {alike} no two different answers"
    )


def _infeasible(algorithm: Algorithm, groups: Sequence[Group], why: str) -> TrainError:
    samples = [s for g in groups for s in g.samples]
    scored = [s for s in samples if s.reward is not None]
    return TrainError(
        f"The algorithm {algorithm.name} cannot train from these data. {why}.",
        next_step="Choose another algorithm, or other samples.",
        figures={"groups": len(groups), "samples": len(samples), "scored": len(scored)},
    )


@contextmanager
def blamed_on(algorithm: Algorithm) -> Iterator[None]:
    """Let whatever goes wrong in opening or updating a job fail the job, and not the service.

    Raises:
        TrainError: names the algorithm, and an error that is none of ours by its type.
        LogError: as it is; nothing is wrong with the job.
        OutOfStep: as it is.
        OtherInstallation: as it is.
    """
    try:
        yield
    except (TrainError, LogError, OutOfStep, OtherInstallation):
        raise
    except (Exception, SystemExit) as e:
        raise TrainError(
            f"The algorithm {algorithm.name} {algorithm.version} failed with {type(e).__name__}: {_text(e)}.",
            next_step="The trainer's own log has the traceback.",
        ) from e


def _text(error: BaseException) -> str:
    """What an error says, as far as it is recorded."""
    return str(error)[:2000].rstrip(".")
