"""The policy `rules`: what it chooses, and that it says why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.plugins.algorithm import Requires
from bascule.plugins.loader import plugins
from bascule.plugins.policies.rules import make
from bascule.plugins.policy import AlgorithmInfo, ChecksStart, Generation, PolicyStart
from bascule.schemas.decision import LeverDecision
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import GateFigures, PairedFigures
from bascule.schemas.landscape import Interval
from tests.policies.given import FIRST, LAND, generation, given

EDIT_FAILED = generation(1, lever="harness", outcome="rejected")


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
    "few high ones among continuous rewards": ({"distinct_rewards": 32, "skew": 1.5}, "reinforce"),
    "few high ones among some marks": ({"distinct_rewards": 31, "skew": 1.5}, "entropic"),
    "pass or fail can be as skewed and is not meant": ({"skew": 1.5}, "grpo"),
    "continuous rewards without a tail": ({"distinct_rewards": 40, "skew": 0.9}, "grpo"),
}


@pytest.mark.parametrize("shape", LANDSCAPES)
def test_the_landscape_decides_the_algorithm(shape: str) -> None:
    figures, algorithm = LANDSCAPES[shape]
    assert choice(generation(0, train=msgspec.structs.replace(LAND, **figures)), levers=("weights",))[1] == algorithm


def test_the_thresholds_of_the_landscape_are_parameters() -> None:
    land = msgspec.structs.replace(LAND, distinct_rewards=20, skew=0.5, step_rewards=26)
    asked = given(generation(0, train=land), levers=("weights",))
    assert make({"skew": 0.4}).step(asked, ()).algorithm == "entropic"
    assert make({"skew": 0.4, "continuous": 20}).step(asked, ()).algorithm == "reinforce"
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


def sequence(version: str, jobs: int = 8) -> list[str | None]:
    """What is tried if no job is ever promoted."""
    policy = plugins().registry.policies.get("rules", version)({})
    tried: list[Generation] = []
    for number in range(1, jobs + 1):
        decision = policy.step(given(FIRST, *tried, levers=("weights",), max_generations=20), ())
        assert isinstance(decision, LeverDecision)
        assert decision.lever == "weights"
        tried.append(generation(number, lever="weights", algorithm=decision.algorithm, outcome="rejected"))
    return [j.algorithm for j in tried]


def test_every_algorithm_has_its_turn_before_one_is_tried_for_the_third_time() -> None:
    tried = sequence("3", 12)
    assert tried == [a for a in ("grpo", "best_of_n", "reinforce", "dpo", "ppo", "entropic") for _ in range(2)]


def test_a_run_that_is_pinned_to_the_second_version_keeps_no_algorithm() -> None:
    tried = sequence("2")
    assert tried[:3] == ["grpo", "grpo", "best_of_n"]
    assert tried[3] != "best_of_n"
    assert set(tried) == {"ppo", "entropic", "grpo", "best_of_n", "reinforce", "dpo"}


def job(number: int, algorithm: str, outcome: str = "promoted", **figures: Any) -> Generation:
    land = msgspec.structs.replace(LAND, **figures)
    return generation(number, lever="weights", algorithm=algorithm, outcome=outcome, train=land)


SKEWED = {"distinct_rewards": 20, "skew": 1.5}  # entropic 0.85, grpo 0.8


def test_an_algorithm_is_kept_for_its_updates_and_while_it_helps_and_until_another_is_better_by_the_margin() -> None:
    helped = [job(1, "grpo"), job(2, "grpo", step_rewards=200)]  # ppo 0.9
    once = [job(1, "grpo", "rejected")]  # grpo 0.4, best_of_n 0.35
    twice = [*once, job(2, "grpo", "rejected")]
    weights = {"levers": ("weights",)}
    for history, params, expected in [
        (helped, {}, "grpo"),
        (helped, {"min_updates": 1, "margin": 0.0}, "grpo"),
        ([*helped, job(3, "grpo", "rejected")], {}, "ppo"),
        (once, {}, "grpo"),
        (twice, {"min_updates": 3}, "grpo"),
        (twice, {}, "best_of_n"),
        (twice, {"margin": 0.2}, "grpo"),
    ]:
        decision = make(params).step(given(FIRST, *history, **weights), ())
        assert decision.algorithm == expected, (params, len(history))
        assert any("kept: " in r for r in decision.reasons) == (expected == "grpo")
        scores = {o.algorithm: o.score for o in decision.options if o.feasible}
        assert scores[decision.algorithm] == max(s for s in scores.values() if s is not None)


def test_what_is_not_feasible_any_more_or_left_no_adapter_is_not_kept() -> None:
    weights = {"levers": ("weights",)}
    flat = job(1, "grpo", informative=0.0)
    assert make({}).step(given(FIRST, flat, **weights), ()).algorithm != "grpo"
    failed = [job(1, "grpo", "failed"), job(2, "grpo", "failed")]
    assert make({}).step(given(FIRST, *failed, **weights), ()).algorithm == "best_of_n"
    lost = [job(1, "grpo", "rejected"), job(2, "best_of_n", "failed")]
    assert make({"patience": 3}).step(given(FIRST, *lost, **weights), ()).algorithm == "grpo"


def test_keeping_an_algorithm_does_not_change_which_lever_is_pulled() -> None:
    """A rejected job leaves grpo 0.4, and a plateau the harness 0.5."""
    history = (FIRST, EDIT_FAILED, generation(2, lever="weights", algorithm="grpo", outcome="rejected"))
    assert choice(*history) == ("harness", None)


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"kl_to_base": 1.5}, "the KL divergence to the base is 1.50 nats a token"),
        ({"kl_to_base": 1.5, "step_rewards": 256, **SKEWED}, "over 1"),
    ],
)
def test_where_a_regression_is_to_be_feared_the_divergence_is_held_down(figures: dict[str, Any], reason: str) -> None:
    land = msgspec.structs.replace(LAND, **figures)
    asked = given(generation(0, train=land), levers=("weights",))
    decision = make({}).step(asked, ())
    assert decision.algorithm == "reinforce"
    assert reason in decision.reasons[0]
    assert "train kl_to_base" in {e.name for e in decision.evidence}
    assert make({"max_base_kl": 2.0}).step(asked, ()).algorithm != "reinforce"
    second = plugins().registry.policies.get("rules", "2")({}).step(asked, ())
    assert isinstance(second, LeverDecision)
    assert second.algorithm != "reinforce"


@pytest.mark.parametrize(
    ("difference", "p_worse", "algorithm"), [(-0.1, 0.01, "reinforce"), (-0.1, 0.4, "grpo"), (-0.01, 0.01, "grpo")]
)
def test_a_job_that_cost_more_than_noise_on_the_regression_set_is_followed_by_a_careful_one(
    difference: float, p_worse: float, algorithm: str
) -> None:
    tested = PairedFigures(pairs=50, difference=difference, wins=1, losses=6, p_better=1 - p_worse, p_worse=p_worse)
    gate = GateFigures(test="mcnemar-exact", score=0.5, score_interval=Interval(0.4, 0.6), regression=tested)
    job_ = generation(1, lever="weights", algorithm="grpo", outcome="rejected", gate=gate)
    edit = generation(2, lever="harness", outcome="rejected")
    decision = make({}).step(given(FIRST, job_, edit, levers=("weights",)), ())
    assert decision.algorithm == algorithm
    assert [e.value for e in decision.evidence if e.name == "regression difference"] == [difference]
    calm = msgspec.structs.replace(gate, regression=msgspec.structs.replace(tested, difference=0.0, p_worse=0.5))
    careful = generation(3, lever="weights", algorithm="reinforce", outcome="rejected", gate=calm)
    assert make({"min_updates": 1}).step(given(FIRST, job_, careful, levers=("weights",)), ()).algorithm == "grpo"


def test_no_measured_risk_is_no_risk() -> None:
    calm = msgspec.structs.replace(LAND, kl_to_base=0.5)
    assert choice(generation(0, train=calm), levers=("weights",))[1] == "grpo"


def test_an_algorithm_of_another_plugin_is_not_trusted_to_hold_the_divergence_down() -> None:
    info = AlgorithmInfo(name="other", version="1", requires=Requires(), params={"num_generations": 8})
    risky = generation(0, train=msgspec.structs.replace(LAND, kl_to_base=9.0))
    decision = make({}).step(given(risky, levers=("weights",), algorithms=(info,)), ())
    assert decision.options[-1].score == 0.28


def test_where_the_task_says_that_rewards_are_ranks_their_skew_says_nothing_and_pairs_come_after_groups() -> None:
    ranks = generation(0, train=msgspec.structs.replace(LAND, **SKEWED))
    assert choice(ranks, levers=("weights",), ordinal=True)[1] == "grpo"
    many = generation(0, train=msgspec.structs.replace(LAND, distinct_rewards=40, skew=1.5))
    assert choice(many, levers=("weights",), ordinal=True)[1] == "grpo"
    few = generation(0, train=msgspec.structs.replace(LAND, informative=0.29))
    assert choice(few, levers=("weights",), ordinal=True)[1] == "dpo"
    lost = [job(n, "grpo", "rejected") for n in (1, 2)]
    assert choice(FIRST, *lost, levers=("weights",), ordinal=True)[1] == "dpo"
    tied = generation(0, train=msgspec.structs.replace(LAND, informative=0.0))
    assert choice(tied, levers=("weights",), ordinal=True)[1] != "dpo"
    second = plugins().registry.policies.get("rules", "2")({}).step(given(FIRST, levers=("weights",), ordinal=True), ())
    assert isinstance(second, LeverDecision)
    assert second.algorithm == "grpo"


def test_step_rewards_that_are_almost_all_nothing_leave_a_critic_little() -> None:
    land = msgspec.structs.replace(LAND, step_rewards=256, step_calls=2000, step_density=0.05)
    assert choice(generation(0, train=land), levers=("weights",))[1] == "grpo"
    dense = msgspec.structs.replace(land, step_density=0.5)
    assert choice(generation(0, train=dense), levers=("weights",))[1] == "ppo"


def test_a_fraction_that_was_compared_is_shown_with_its_interval() -> None:
    land = msgspec.structs.replace(LAND, informative_interval=Interval(0.58, 0.87))
    decision = make({}).step(given(generation(0, train=land), levers=("weights",)), ())
    assert "(95% interval of the informative share 0.58 to 0.87)" in decision.reasons[0]


@pytest.mark.parametrize(
    ("algorithm", "train_samples", "params", "requirement"),
    [
        ("grpo", 8, {"num_generations": 1}, "group_size"),
        ("grpo", 1, {}, "reward_variance"),
        ("dpo", 1, {}, "pairs"),
        ("nope", 8, {}, "there is none"),
    ],
)
def test_an_algorithm_that_a_run_can_never_use_is_refused_by_name_before_it_starts(
    algorithm: str, train_samples: int, params: dict[str, Any], requirement: str
) -> None:
    infos = tuple(msgspec.structs.replace(a, params={**a.params, **params}) for a in given(FIRST).algorithms)
    levers = ("harness", "weights")
    start = PolicyStart(levers=levers, algorithms=infos, train_samples=train_samples)
    for name in ("rules", "fixed", "alternate"):
        policy = plugins().registry.policies.get(name)({"algorithm": algorithm})
        assert isinstance(policy, ChecksStart)
        with pytest.raises(ConfigError, match=requirement):
            policy.check(start)
        fitting = plugins().registry.policies.get(name)({"algorithm": "best_of_n"})
        assert isinstance(fitting, ChecksStart)
        fitting.check(start)


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
