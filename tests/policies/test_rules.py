"""The policy `rules`: what it chooses, and that it says why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

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
        AlgorithmInfo(name=a.name, version=a.version, requires=tuple(sorted(a.requires)), params=a.defaults())
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
    dead = generation(0, train=msgspec.structs.replace(LAND, success_rate=0.0, informative=0.0, mean=0.0))
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


def test_every_option_has_a_reason_and_only_feasible_ones_a_score() -> None:
    decision = make({}).step(given(FIRST, edits_left=0), ())
    assert {(o.lever, o.algorithm) for o in decision.options} == {
        ("harness", None), ("weights", "best_of_n"), ("weights", "grpo"),
    }  # fmt: skip
    assert all(o.reasons for o in decision.options)
    assert all((o.score is not None) == o.feasible for o in decision.options)
    assert {e.name for e in decision.evidence} >= {"harness plateau", "train informative", "train success_rate"}


def test_a_threshold_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="informative"):
        make({"informative": 2})
    with pytest.raises(ConfigError, match="patiense"):
        make({"patiense": 2})
