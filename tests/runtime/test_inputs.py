"""What levers see of dev: once a candidate was rejected, nothing that they could adapt to."""

from __future__ import annotations

import msgspec
import pytest

from bascule.plugins.policy import Generation
from bascule.runtime.services.inputs import shown
from bascule.schemas.events import GateFigures
from bascule.schemas.run import EvaluationConfig, GateConfig, PluginChoice, RunConfig
from bascule.verifiers.gate import gate

CONFIG = RunConfig(task=PluginChoice(name="arith"))
PARENT = [0.0, 1.0] * 50


def judged(candidate: list[float], **more: object) -> tuple[bool, GateFigures]:
    return gate(candidate, PARENT, config=CONFIG.gate, seed=1, reported=0.5, **more)  # type: ignore[arg-type]


def generation(promoted: bool, figures: GateFigures) -> Generation:
    return Generation(
        generation=1,
        parent=0,
        lever="harness",
        algorithm=None,
        edit="brief",
        outcome="promoted" if promoted else "rejected",
        gate=figures,
        dev_event="eval.g01-dev.completed",
    )


#: Rejected in four ways; dev has other rewards each time.
REJECTED = {
    "not better on dev by enough": judged([0.0, 1.0] * 48 + [1.0] * 4),
    "brittle: the gain is gone when the same questions come in another form": judged(
        [1.0] * 100, perturbed=(PARENT, PARENT)
    ),
    "the second verifier does not confirm the gain": judged([1.0] * 100, second=(PARENT, PARENT)),
    "worse on the regression set: 20 worse and 0 better, p = 9.5e-07": judged(
        [1.0] * 100, regression=([0.0] * 20, [1.0] * 20)
    ),
}


@pytest.mark.parametrize("why", REJECTED)
def test_a_rejected_candidate_shows_nothing_of_dev(why: str) -> None:
    promoted, figures = REJECTED[why]
    assert not promoted
    (seen,) = shown([generation(promoted, figures)], CONFIG)
    assert seen.gate is not None
    assert (seen.gate.reason, seen.gate.score, seen.dev, seen.dev_event) == (why, 0.5, None, None)
    assert (seen.gate.wins, seen.gate.losses, seen.gate.p, seen.gate.parent_score) == (0, 0, None, None)
    assert seen.gate.guard is seen.gate.perturbed is seen.gate.second is msgspec.UNSET
    assert seen.gate.regression == figures.regression


def test_a_promoted_candidate_is_shown_as_it_is() -> None:
    promoted, figures = judged([1.0] * 100)
    assert promoted
    given = generation(promoted, figures)
    assert shown([given], CONFIG) == (given,)


@pytest.mark.parametrize(
    "config",
    [
        msgspec.structs.replace(CONFIG, gate=GateConfig(version=1)),
        msgspec.structs.replace(CONFIG, gate=GateConfig(guard="none")),
        msgspec.structs.replace(CONFIG, evaluation=EvaluationConfig(fresh_dev=50)),
    ],
)
def test_where_nothing_is_guarded_all_is_shown(config: RunConfig) -> None:
    given = generation(*REJECTED["not better on dev by enough"])
    assert shown([given], config) == (given,)
