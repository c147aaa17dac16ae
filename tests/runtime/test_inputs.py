"""What levers see of dev: once a candidate was rejected, nothing that they could adapt to."""

from __future__ import annotations

import msgspec
import pytest

from bascule.plugins.policy import Generation
from bascule.runtime.services.inputs import shown
from bascule.schemas.events import GateFigures
from bascule.schemas.run import EvaluationConfig, GateConfig, PluginChoice, RunConfig
from bascule.verifiers.gate import NOT_CONFIRMED, gate, reported_score

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


NOT_ENOUGH = judged([0.0, 1.0] * 48 + [1.0] * 4)
#: Rejected in four ways, and how a lever is told; dev has other rewards each time.
REJECTED = [
    ("not better on dev by enough", NOT_ENOUGH),
    (NOT_CONFIRMED, judged([1.0] * 100, perturbed=(PARENT, PARENT))),
    (NOT_CONFIRMED, judged([1.0] * 100, second=(PARENT, PARENT))),
    (
        "worse on the regression set: 20 worse and 0 better, p = 9.5e-07",
        judged([1.0] * 100, regression=([0.0] * 20, [1.0] * 20)),
    ),
]


@pytest.mark.parametrize(("why", "judgement"), REJECTED)
def test_a_rejected_candidate_shows_nothing_of_dev(why: str, judgement: tuple[bool, GateFigures]) -> None:
    promoted, figures = judgement
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


def test_a_promoted_candidate_whose_score_the_guard_does_not_report_shows_what_it_reports() -> None:
    config = msgspec.structs.replace(CONFIG, gate=GateConfig(guard="thresholdout", noise=1.0))
    promoted, figures = gate([1.0] * 100, PARENT, config=config.gate, seed=1, reported=0.5)
    assert promoted
    assert figures.score == 1.0
    assert reported_score(figures) != 1.0
    (seen,) = shown([generation(promoted, figures)], config)
    assert seen.gate is not None
    assert (seen.dev, seen.dev_event) == (None, None)
    assert (seen.gate.score, seen.gate.guard) == (reported_score(figures), msgspec.UNSET)
    assert figures.reason not in (msgspec.UNSET, seen.gate.reason)


OPEN = [
    msgspec.structs.replace(CONFIG, gate=GateConfig(version=1)),
    msgspec.structs.replace(CONFIG, gate=GateConfig(guard="none")),
    msgspec.structs.replace(CONFIG, evaluation=EvaluationConfig(fresh_dev=50)),
]


@pytest.mark.parametrize("config", OPEN)
def test_where_nothing_is_guarded_all_of_dev_is_shown(config: RunConfig) -> None:
    given = generation(*NOT_ENOUGH)
    assert shown([given], config) == (given,)


@pytest.mark.parametrize("config", [CONFIG, *OPEN])
@pytest.mark.parametrize("second", [(PARENT, PARENT), ([1.0] * 100, PARENT), ([0.0] * 100, PARENT)])
def test_nothing_is_shown_of_the_second_verifier(config: RunConfig, second: tuple[list[float], list[float]]) -> None:
    promoted, figures = judged([1.0] * 100, second=second)
    (seen,) = shown([generation(promoted, figures)], config)
    assert seen.gate is not None
    assert seen.gate.second is msgspec.UNSET
    assert "second" not in str(seen.gate.reason)
