"""What a completed run's gain is made of: the report of its ablations."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bascule.runtime.state import RunState
from bascule.runtime.world import seed_of
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.landscape import Interval
from bascule.verifiers.gate import paired_test


class AblationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One arm on the sealed split.

    Attributes:
        drop: how much lower than the whole candidate; ``p`` is one-sided for "the whole candidate is better".
        baseline: for the constant engine, what the same constant scores without any harness.
    """

    arm: str
    what: str
    score: float
    interval: Interval
    drop: float
    p: float
    baseline: float | None = None


def ablation_report(events: Sequence[Recorded], constant: float) -> list[AblationRow]:
    """Compare each completed ablation with the best candidate's sealed score.

    Args:
        constant: what the constant answer scores without any harness.
    """
    state = RunState.of(events[0].envelope.run, events)
    assert isinstance(state.end, ev.RunCompleted)
    best = state.evaluations[f"g{state.end.best:02d}-sealed"]
    whole = [r[0] for r in best.rewards().values()]
    assert best.completed is not None
    landscape = best.completed.landscape
    rows = [
        AblationRow(
            arm="whole",
            what=f"generation {state.end.best}",
            score=landscape.score,
            interval=landscape.score_interval,
            drop=0.0,
            p=1.0,
        )
    ]
    for name, request in state.ablations.items():
        evaluation = state.evaluations[f"abl-{name}"]
        assert evaluation.completed is not None
        found = evaluation.completed.landscape
        test = paired_test(
            whole, [r[0] for r in evaluation.rewards().values()], seed=seed_of(state.config.seed, "ablation", name)
        )
        always = request.arm == "constant-engine"
        rows.append(
            AblationRow(
                arm=request.arm,
                what=f"every model answer is {request.answer!r}" if always else "the base model under the same harness",
                score=found.score,
                interval=found.score_interval,
                drop=landscape.score - found.score,
                p=test.p,
                baseline=constant if always else None,
            )
        )
    return rows
