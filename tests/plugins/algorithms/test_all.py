"""What holds for every built-in algorithm."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithm import Algorithm
from bascule.plugins.loader import load_plugins
from bascule.schemas.errors import ConfigError
from bascule.trainers.params import TrainParams, train_params
from tests.plugins.algorithms.samples import group, without_unscored

REGISTRY = load_plugins().registry.algorithms
ALGORITHMS = [REGISTRY.get(name) for name in ("best_of_n", "dpo", "entropic", "grpo", "ppo", "reinforce")]
EARLIER = [REGISTRY.get("grpo", "1"), REGISTRY.get("best_of_n", "1")]
BATCH = st.lists(st.lists(st.none() | st.floats(-5, 5, width=16), max_size=6), max_size=4)

#: Where credit in one group depends on others by default, the parameters under which it does not.
LOCAL: dict[str, dict[str, Any]] = {"ppo": {"whiten_advantages": False}, "entropic": {"kl_coef": 0.0}}

#: Whatever weighs a loss by a probability ratio, and what goes with it.
RATIO = {"importance_cap", "max_ratio", "loss_type"}

every = pytest.mark.parametrize("algorithm", [*ALGORITHMS, *EARLIER], ids=lambda a: f"{a.name}-{a.version}")
present = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)


@every
@given(batch=BATCH)
def test_an_unscored_sample_is_as_if_it_were_not_there(algorithm: Algorithm, batch: list[list[float | None]]) -> None:
    groups = [group(*row, name=f"g{i}") for i, row in enumerate(batch)]
    assert algorithm.credit(groups, {}) == algorithm.credit(without_unscored(groups), {})


@every
@given(batch=BATCH)
def test_groups_do_not_mix(algorithm: Algorithm, batch: list[list[float | None]]) -> None:
    groups = [group(*row, name=f"g{i}") for i, row in enumerate(batch)]
    params = LOCAL.get(algorithm.name, {})
    assert algorithm.credit(groups, params) == [c for g in groups for c in algorithm.credit([g], params)]


@every
@given(batch=BATCH)
def test_credit_is_pure_and_for_scored_trajectories_once(algorithm: Algorithm, batch: list[list[float | None]]) -> None:
    groups = [group(*row, name=f"g{i}") for i, row in enumerate(batch)]
    credit = algorithm.credit(groups, algorithm.defaults())
    assert credit == algorithm.credit(groups, algorithm.defaults()) == algorithm.credit(groups, {})
    scored = {s.trajectory for g in groups for s in g.samples if s.reward is not None}
    names = [c.trajectory for c in credit]
    assert len(set(names)) == len(names)
    assert set(names) | {c.rejected for c in credit if c.rejected is not None} <= scored


@every
def test_no_groups_and_empty_groups_give_no_credit(algorithm: Algorithm) -> None:
    assert algorithm.credit([], {}) == []
    assert algorithm.credit([group(), group(None, None, name="f")], {}) == []


@every
def test_a_group_of_mixed_rewards_gives_credit(algorithm: Algorithm) -> None:
    assert algorithm.credit([group(1.0, 0.5, 0.0, passed=(True, False, False))], {})


@every
def test_defaults_are_fresh_plain_json_and_usable(algorithm: Algorithm) -> None:
    defaults = algorithm.defaults()
    assert json.loads(json.dumps(defaults)) == defaults
    assert msgspec.json.decode(msgspec.json.encode(defaults)) == defaults
    train_params(defaults)
    before = copy.deepcopy(defaults)
    for value in defaults.values():
        if isinstance(value, list):
            value.append("x")
    defaults["steps"] = -1
    assert algorithm.defaults() == before
    assert algorithm.credit([group(1.0, 0.5, 0.0)], algorithm.defaults()) == algorithm.credit(
        [group(1.0, 0.5, 0.0)], {}
    )


@present
def test_defaults_name_what_the_algorithm_can_be_told(algorithm: Algorithm) -> None:
    defaults = algorithm.defaults()
    assert {"start_from", "steps", "groups", "num_generations", "num_mini_batches", "warmup_steps"} <= set(defaults)
    assert defaults["max_kl"] == 0.5
    assert (defaults["lora_r"], defaults["lora_alpha"], defaults["start_from"]) == (32, 64, "promoted")
    assert bool(set(defaults) & RATIO) == algorithm.requires.behaviour_logprobs
    assert set(defaults) >= RATIO or not algorithm.requires.behaviour_logprobs
    assert ("vf_coef" in defaults) == ("values" in algorithm.streams)
    assert set(defaults) - set(TrainParams.__struct_fields__) <= set(_own(algorithm))


@present
def test_a_parameter_that_is_not_usable_is_refused_before_there_is_anything_to_credit(algorithm: Algorithm) -> None:
    for name in _own(algorithm):
        with pytest.raises(ConfigError, match=name):
            algorithm.credit([], {name: "nonsense"})


def test_recorded_runs_keep_their_version() -> None:
    assert {a.name: a.version for a in ALGORITHMS} == {
        "best_of_n": "2", "dpo": "1", "entropic": "1", "grpo": "2", "ppo": "1", "reinforce": "1",
    }  # fmt: skip
    assert [(a.name, a.version, a.defaults()["lora_r"]) for a in EARLIER] == [("grpo", "1", 16), ("best_of_n", "1", 16)]


def test_the_algorithms_import_no_library_of_numbers() -> None:
    code = "import sys, bascule.plugins.algorithms; print({'torch', 'numpy', 'trl', 'peft'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def _own(algorithm: Algorithm) -> list[str]:
    """The names in the algorithm's own struct of parameters, beside it in its module."""
    module = sys.modules[type(algorithm).__module__]
    kinds = [v for k, v in vars(module).items() if k.endswith("Params")]
    return [name for kind in kinds for name in cast("type[msgspec.Struct]", kind).__struct_fields__]
