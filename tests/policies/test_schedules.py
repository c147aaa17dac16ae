"""The policies `fixed` and `alternate`: they keep to their schedule, record what else there was, stop with a reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.plugins.policies import alternate, fixed
from bascule.plugins.policy import Generation, PolicyStart
from bascule.schemas.decision import LeverDecision
from bascule.schemas.errors import ConfigError
from tests.policies.given import FIRST, LAND, generation, given

BOTH = ("harness", "weights")
DEAD = generation(0, train=msgspec.structs.replace(LAND, success_rate=0.0, informative=0.0, mean=0.0, variance=0.0))


def course(policy: Any, generations: int, **values: Any) -> list[tuple[str, str | None]]:
    """What is pulled if nothing is ever promoted."""
    history: list[Generation] = [FIRST]
    for number in range(1, generations + 1):
        decision: LeverDecision = policy.step(given(*history, max_generations=generations, **values), ())
        history.append(generation(number, lever=decision.lever, algorithm=decision.algorithm, outcome="rejected"))
    return [(str(g.lever), g.algorithm) for g in history[1:]]


H: tuple[str, None] = ("harness", None)


@pytest.mark.parametrize(
    ("params", "levers", "pulled"),
    [
        ({"algorithm": "dpo"}, BOTH, [H, ("weights", "dpo"), ("weights", "dpo")]),
        ({"algorithm": "dpo"}, ("weights",), [("weights", "dpo")] * 3),
        ({}, ("harness",), [H] * 3),
        ({"preset": "lawbench"}, ("weights",), [("weights", "ppo")] * 3),
        ({"preset": "trimul"}, ("weights",), [("weights", "entropic")] * 3),
        ({"preset": "denoising", "algorithm": "grpo"}, ("weights",), [("weights", "grpo")] * 3),
        (
            {"algorithm": "grpo", "schedule": ["weights", "harness"]},
            BOTH,
            [("weights", "grpo"), H, H],
        ),
    ],
)
def test_fixed_pulls_what_its_schedule_says(params: dict[str, Any], levers: Any, pulled: list[Any]) -> None:
    policy = fixed.make(params)
    policy.check(PolicyStart(levers=levers, algorithms=given(FIRST).algorithms, train_samples=8))
    assert course(policy, 3, levers=levers) == pulled


@pytest.mark.parametrize(
    ("params", "pulled"),
    [
        ({}, [H, ("weights", "grpo"), H, ("weights", "grpo")]),
        ({"algorithm": "reinforce"}, [H, ("weights", "reinforce"), H, ("weights", "reinforce")]),
        ({"harness_steps": 2, "weights_steps": 1}, [H, H, ("weights", "grpo"), H]),
        ({"harness_steps": 1, "weights_steps": 2}, [H, ("weights", "grpo"), ("weights", "grpo"), H]),
    ],
)
def test_alternate_pulls_the_levers_by_turns(params: dict[str, Any], pulled: list[Any]) -> None:
    assert course(alternate.make(params), 4) == pulled


POLICIES = [
    pytest.param(
        fixed.make({"algorithm": "grpo", "schedule": ["weights"]}), given(FIRST, max_generations=1), id="fixed"
    ),
    pytest.param(alternate.make({}), given(FIRST, generation(1, lever="harness", outcome="rejected")), id="alternate"),
]


@pytest.mark.parametrize(("policy", "asked"), POLICIES)
def test_what_else_there_was_is_recorded_with_reasons_and_evidence(policy: Any, asked: Any) -> None:
    decision = policy.step(asked, ())
    assert decision.algorithm == "grpo"
    assert {(o.lever, o.algorithm) for o in decision.options} == {
        ("harness", None), *(("weights", a.name) for a in asked.algorithms),
    }  # fmt: skip
    assert all(o.reasons for o in decision.options)
    assert all((o.score is not None) == o.feasible for o in decision.options)
    top = max(o.score for o in decision.options if o.feasible)
    assert [o.algorithm for o in decision.options if o.score == top] == ["grpo"]
    assert not any("never tried" in r for o in decision.options for r in o.reasons)
    (harness,) = [o for o in decision.options if o.lever == "harness"]
    assert harness.score == 0.0
    assert "the turn of the weights" in harness.reasons[-1]
    assert {e.name for e in decision.evidence} >= {"harness plateau", "train informative", "train mean"}


@pytest.mark.parametrize(
    ("policy", "history", "values", "reason"),
    [
        (fixed.make({"algorithm": "grpo"}), [DEAD], {"levers": ("weights",)}, "grpo: no group has differing rewards"),
        (alternate.make({"algorithm": "best_of_n"}), [DEAD, generation(1, outcome="rejected")], {}, "no verified succ"),
        (alternate.make({}), [DEAD, generation(1, outcome="rejected")], {}, "no verified success"),
        (alternate.make({}), [FIRST], {"edits_left": 0}, "no untried edit"),
        (fixed.make({"algorithm": "grpo"}), [FIRST], {"edits_left": 0}, "no untried edit"),
        (fixed.make({"algorithm": "grpo"}), [FIRST], {"max_generations": 0}, "all 0 generations are used"),
    ],
)
def test_a_turn_that_cannot_be_taken_ends_the_run_with_the_reason(
    policy: Any, history: list[Generation], values: dict[str, Any], reason: str
) -> None:
    decision = policy.step(given(*history, **{"best": 0, **values}), ())
    assert (decision.lever, decision.algorithm) == ("stop", None)
    assert reason in "; ".join(decision.reasons)
    assert decision.options


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (fixed.make, {"algoritm": "grpo"}, "algoritm"),
        (fixed.make, {"preset": "gpqa"}, "preset"),
        (fixed.make, {"preset": "lawbench", "algorithm": "grpo"}, "lawbench of the policy fixed is ppo"),
        (fixed.make, {"schedule": ["both"]}, "schedule"),
        (alternate.make, {"harness_steps": 0}, "harness_steps"),
        (alternate.make, {"steps": 2}, "steps"),
    ],
)
def test_parameters_that_say_nothing_are_refused_by_name(make: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(params)


@pytest.mark.parametrize(
    ("policy", "levers", "message"),
    [
        (fixed.make({}), BOTH, "told no algorithm"),
        (fixed.make({"algorithm": "grpo", "schedule": ["weights"]}), ("harness",), "leaves the weights alone"),
        (fixed.make({"algorithm": "grpo", "schedule": ["harness"]}), ("weights",), "leaves the harness alone"),
        (alternate.make({}), ("harness",), "leaves the weights alone"),
    ],
)
def test_a_run_that_does_not_allow_the_schedule_is_refused_before_it_starts(
    policy: Any, levers: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        policy.check(PolicyStart(levers=levers, algorithms=given(FIRST).algorithms, train_samples=8))
