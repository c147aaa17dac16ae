"""The policy `rules`: what it chooses, and that it says why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.plugins.algorithm import Requires
from bascule.plugins.loader import plugins
from bascule.plugins.policies.rules import make
from bascule.plugins.policy import AlgorithmInfo, Generation, PolicyInput
from bascule.schemas.errors import ConfigError
from bascule.schemas.landscape import Interval, RewardLandscape

LAND = RewardLandscape(
    groups=32, samples=256, unscored=0, score=0.4, score_interval=Interval(0.3, 0.5), mean=0.4, variance=0.24, skew=0.4,
    success_rate=0.4, pass_rates=(4, 6, 6, 6, 6, 4), informative=0.75, format_failures=0.0, errors=0.0,
    prompt_tokens=50.0, output_tokens=3.0, distinct_rewards=2,
)  # fmt: skip


def generation(number: int, **values: Any) -> Generation:
    return Generation(
        **{
            "generation": number, "parent": None, "lever": None, "algorithm": None, "edit": None, "outcome": "promoted",
            "train": LAND, "train_event": "t", "gate_event": "g", **values,
        }
    )  # fmt: skip


FIRST = generation(0)
EDIT_FAILED = generation(1, lever="harness", outcome="rejected")


def given(*history: Generation, **values: Any) -> PolicyInput:
    found = plugins().registry.algorithms.items
    algorithms = tuple(
        AlgorithmInfo(name=a.name, version=a.version, requires=a.requires, params=a.defaults())
        for _, a in sorted(found.items())
    )
    return PolicyInput(
        **{
            "generation": len(history), "max_generations": 9, "levers": ("harness", "weights"), "history": history,
            "best": max(g.generation for g in history if g.outcome == "promoted"), "algorithms": algorithms, **values,
        }
    )  # fmt: skip


def choice(*history: Generation, **values: Any) -> tuple[str, str | None]:
    decision = make({}).step(given(*history, **values), ())
    return decision.lever, decision.algorithm


def test_the_harness_comes_first() -> None:
    assert choice(FIRST) == ("harness", None)


def test_a_plateau_of_the_harness_turns_to_the_weights() -> None:
    assert choice(FIRST, EDIT_FAILED) == ("weights", "grpo")


def test_patience_is_a_parameter() -> None:
    decision = make({"patience": 2}).step(given(FIRST, EDIT_FAILED), ())
    assert decision.lever == "harness"


def test_a_cold_start_clones_its_winners() -> None:
    cold = generation(0, train=msgspec.structs.replace(LAND, success_rate=0.02, informative=0.06))
    assert choice(cold, EDIT_FAILED) == ("weights", "best_of_n")


def test_without_any_success_no_weight_update_is_feasible() -> None:
    dead = generation(0, train=msgspec.structs.replace(LAND, success_rate=0.0, informative=0.0, mean=0.0, variance=0.0))
    decision = make({}).step(given(dead, levers=("weights",)), ())
    assert decision.lever == "stop"
    reasons = {o.algorithm: o.reasons[0] for o in decision.options if o.lever == "weights"}
    assert "no verified success in 256 samples" in reasons["best_of_n"]
    assert "0 of 32 informative" in reasons["grpo"]


def test_an_engine_without_log_probabilities_leaves_only_what_needs_none() -> None:
    silent = generation(0, train=msgspec.structs.replace(LAND, output_tokens=0.0))
    assert choice(silent, EDIT_FAILED)[1] != "grpo"


def test_control_arms_pull_one_lever_only() -> None:
    assert choice(FIRST, levers=("weights",)) == ("weights", "grpo")
    assert choice(FIRST, EDIT_FAILED, levers=("harness",)) == ("harness", None)


def test_the_last_generation_goes_to_a_lever_that_was_never_tried() -> None:
    edits = [generation(n, lever="harness") for n in range(1, 4)]
    assert choice(FIRST, *edits, max_generations=4) == ("weights", "grpo")
    assert choice(FIRST, *edits, max_generations=5) == ("harness", None)


def test_a_job_that_fails_again_and_again_gives_way() -> None:
    jobs = [generation(n, lever="weights", algorithm="grpo", outcome="rejected") for n in (2, 3)]
    assert choice(FIRST, EDIT_FAILED, *jobs)[1] != "grpo"


def test_the_run_stops_when_its_generations_are_used() -> None:
    assert choice(FIRST, EDIT_FAILED, max_generations=1) == ("stop", None)


LANDSCAPES: dict[str, tuple[dict[str, Any], str]] = {
    "pass or fail, informative groups": ({}, "grpo"),
    "informative enough": ({"informative": 0.30}, "grpo"),
    "few informative groups, yet no cold start": ({"informative": 0.10, "success_rate": 0.9}, "best_of_n"),
    "a cold start": ({"informative": 0.06, "success_rate": 0.02}, "best_of_n"),
    "rewards of single calls": ({"step_rewards": 52}, "ppo"),
    "too few of them": ({"step_rewards": 51}, "grpo"),
    "few high ones among continuous rewards": ({"distinct_rewards": 40, "skew": 1.5}, "entropic"),
    "pass or fail can be as skewed and is not meant": ({"skew": 1.5}, "grpo"),
    "continuous rewards without a tail": ({"distinct_rewards": 40, "skew": 0.9}, "grpo"),
}


@pytest.mark.parametrize("shape", LANDSCAPES)
def test_the_landscape_decides_the_algorithm(shape: str) -> None:
    figures, algorithm = LANDSCAPES[shape]
    assert choice(generation(0, train=msgspec.structs.replace(LAND, **figures)), levers=("weights",))[1] == algorithm


def test_the_thresholds_of_the_landscape_are_parameters() -> None:
    land = msgspec.structs.replace(LAND, distinct_rewards=40, skew=0.5, step_rewards=26)
    asked = given(generation(0, train=land), levers=("weights",))
    assert make({"skew": 0.4}).step(asked, ()).algorithm == "entropic"
    assert make({"step_rewards": 0.1}).step(asked, ()).algorithm == "ppo"


def infeasible(requires: Requires, params: dict[str, Any], **figures: Any) -> str:
    """Why an algorithm of another plugin is no option on such a landscape; empty if it is one."""
    info = AlgorithmInfo(name="other", version="1", requires=requires, params={"num_generations": 8, **params})
    asked = given(
        generation(0, train=msgspec.structs.replace(LAND, **figures)), levers=("weights",), algorithms=(info,)
    )
    (option,) = [o for o in make({}).step(asked, ()).options if o.algorithm == "other"]
    return "" if option.feasible else option.reasons[0]


@pytest.mark.parametrize(
    ("requires", "params", "figures", "reason"),
    [
        (Requires(behaviour_logprobs=True), {}, {"output_tokens": 0.0}, "no tokens with log-probabilities"),
        (Requires(on_policy=True, group_size=3), {"num_generations": 2}, {}, "groups of 3, and they have 2 samples"),
        (Requires(group_size=9), {"num_generations": 32}, {}, "groups of 9, and they have 8 samples"),
        (Requires(reward_variance=True), {}, {"informative": 0.0}, "0 of 32 informative"),
        (Requires(winners=True), {}, {"success_rate": 0.0}, "no verified success in 256 samples"),
        (Requires(pairs=True), {}, {"informative": 0.0}, "no sample is ranked above another"),
        (Requires(step_rewards=True), {}, {}, "no model call has a reward of its own"),
        (Requires(), {}, {"variance": 0.0, "mean": 0.5}, "all rewards are 0.5"),
    ],
)
def test_each_requirement_is_held_against_the_landscape(
    requires: Requires, params: dict[str, Any], figures: dict[str, Any], reason: str
) -> None:
    assert reason in infeasible(requires, params, **figures)
    assert infeasible(requires, {"num_generations": 9}, step_rewards=128, samples=32 * 9) == ""


def test_rewards_of_single_calls_are_something_to_learn_from_where_all_final_ones_are_equal() -> None:
    assert infeasible(Requires(), {}, variance=0.0, step_rewards=128) == ""


@pytest.mark.parametrize(
    ("requires", "score"),
    [
        (Requires(winners=True), 0.35),
        (Requires(reward_variance=True), 0.8),
        (Requires(pairs=True), 0.26),
        (Requires(), 0.28),
    ],
)
def test_an_algorithm_of_another_plugin_is_judged_by_what_it_requires(requires: Requires, score: float) -> None:
    info = AlgorithmInfo(name="other", version="1", requires=requires, params={"num_generations": 8})
    decision = make({}).step(given(FIRST, levers=("weights",), algorithms=(info,)), ())
    assert decision.options[-1].score == score


def test_every_algorithm_has_its_turn_before_one_is_tried_for_the_third_time() -> None:
    jobs: list[Generation] = []
    for number in range(1, 9):
        lever, name = choice(FIRST, *jobs, levers=("weights",), max_generations=20)
        assert lever == "weights"
        jobs.append(generation(number, lever="weights", algorithm=name, outcome="rejected"))
    tried = [j.algorithm for j in jobs]
    assert tried[:3] == ["grpo", "grpo", "best_of_n"]
    assert set(tried) == {"ppo", "entropic", "grpo", "best_of_n", "reinforce", "dpo"}


def test_the_bridge_to_trl_is_taken_only_where_it_is_asked_for() -> None:
    infos = tuple(
        AlgorithmInfo(name=name, version="1", requires=Requires(), params={"num_generations": 8})
        for name in ("reinforce", "trl-grpo")
    )
    asked = given(FIRST, levers=("weights",), algorithms=infos)
    assert make({}).step(asked, ()).algorithm == "reinforce"
    assert make({"algorithm": "trl-grpo"}).step(asked, ()).algorithm == "trl-grpo"
    alone = given(FIRST, levers=("weights",), algorithms=infos[1:])
    assert make({}).step(alone, ()).lever == "stop"


def test_a_run_that_is_pinned_to_the_first_version_is_decided_as_it_was() -> None:
    """It knew two algorithms and asked of them less; the golden logs hold whole runs of it."""
    registry = plugins().registry
    first = registry.policies.get("rules", "1")({})
    infos = tuple(
        AlgorithmInfo(
            name=a.name, version=a.version, requires=a.requires, params={**a.defaults(), "num_generations": 1}
        )
        for a in (registry.algorithms.get(name, "1") for name in ("best_of_n", "grpo"))
    )
    decision = first.step(given(FIRST, EDIT_FAILED, algorithms=infos), ())
    assert (first.version, decision.algorithm) == ("1", "grpo")
    assert [o.score for o in decision.options] == [0.5, 0.35, 0.8]
    assert {e.name for e in decision.evidence} == {
        "harness plateau", "train success_rate", "train informative", "train format_failures", "train errors",
        "train mean", "train variance",
    }  # fmt: skip


def test_every_option_has_a_reason_and_only_feasible_ones_a_score() -> None:
    decision = make({}).step(given(FIRST, edits_left=0), ())
    assert {(o.lever, o.algorithm) for o in decision.options} == {
        ("harness", None), *(("weights", name) for name in plugins().registry.algorithms.items),
    }  # fmt: skip
    assert all(o.reasons for o in decision.options)
    assert all((o.score is not None) == o.feasible for o in decision.options)
    assert {e.name for e in decision.evidence} >= {"harness plateau", "train informative", "train success_rate"}


def test_a_threshold_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="informative"):
        make({"informative": 2})
    with pytest.raises(ConfigError, match="patiense"):
        make({"patiense": 2})
