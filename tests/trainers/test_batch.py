"""Training rows: the recorded tokens, each sampled one trained once, nothing else."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bascule.plugins.algorithm import Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Step, ToolCall, Trajectory, pack_floats, pack_ids
from bascule.trainers.batch import Row, batch_rows, denominators, micro_batches, trajectory_rows

POLICY = Credit(trajectory="t", component="policy", advantage=0.5)
IMITATION = Credit(trajectory="t", component="imitation", advantage=2.0)


def output(ids: list[int], logprobs: list[float] | None = None) -> Output:
    values = [-0.5] * len(ids) if logprobs is None else logprobs
    return Output(token_ids=pack_ids(ids), logprobs=pack_floats(values), text="")


def call(prompt: list[int], *outputs: Output, temperature: float = 1.0) -> ModelCall:
    sampling = Sampling(temperature=temperature)
    return ModelCall(kind="chat", asked="", prompt_ids=pack_ids(prompt), outputs=outputs, sampling=sampling)


def rows(*steps: Step, credit: Credit = POLICY) -> list[Row]:
    return trajectory_rows(credit, Trajectory(steps=steps))


def test_a_turn_that_continues_the_held_tokens_extends_the_row_and_masks_the_environment() -> None:
    tool = ToolCall(name="search", arguments="{}", result="{}")
    (row,) = rows(call([1, 2], output([3, 4], [-1.0, -2.0])), tool, call([1, 2, 3, 4, 90, 91], output([5], [-3.0])))
    assert row.tokens == (1, 2, 3, 4, 90, 91, 5)
    assert row.trained == (2, 3, 6)
    assert row.behaviour == (-1.0, -2.0, -3.0)


def test_a_turn_whose_prompt_drifts_from_the_held_tokens_starts_a_new_row() -> None:
    first, second = rows(call([1, 2], output([3, 4])), call([1, 2, 3, 9, 90], output([5])))
    assert (first.tokens, first.trained) == ((1, 2, 3, 4), (2, 3))
    assert (second.tokens, second.trained) == ((1, 2, 3, 9, 90, 5), (5,))


def test_each_output_of_a_call_is_trained_once_and_the_longest_continued_one_grows() -> None:
    first, second, third = rows(call([1], output([2]), output([3])), call([1, 3, 80], output([4]), output([5])))
    assert (first.tokens, first.trained) == ((1, 2), (1,))
    assert (second.tokens, second.trained) == ((1, 3, 80, 4), (1, 3))
    assert (third.tokens, third.trained) == ((1, 3, 80, 5), (3,))


def test_greedy_calls_are_trained_at_temperature_one_and_temperatures_never_share_a_row() -> None:
    greedy, warm = rows(call([1], output([2]), temperature=0), call([1, 2], output([3]), temperature=0.7))
    assert (greedy.temperature, warm.temperature) == (1.0, 0.7)


def test_policy_credit_needs_log_probabilities_and_imitation_does_not() -> None:
    bare = call([1], output([2, 3], []))
    with pytest.raises(TrainError, match="log-probabilities"):
        rows(bare)
    with pytest.raises(TrainError, match="not finite"):
        rows(call([1], output([2], [math.nan])))
    (row,) = rows(bare, credit=IMITATION)
    assert all(map(math.isnan, row.behaviour))


def test_empty_prompts_unknown_trajectories_and_credits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrainError, match="empty prompt"):
        rows(call([], output([1])))
    with pytest.raises(TrainError, match="not in the batch"):
        batch_rows([POLICY], {})
    for bad in (math.nan, math.inf):
        with pytest.raises(TrainError, match="has the policy credit"):
            batch_rows([Credit(trajectory="t", component="policy", advantage=bad)], {"t": Trajectory()})
    with pytest.raises(TrainError, match="has the imitation credit"):
        batch_rows([Credit(trajectory="t", component="imitation", advantage=-1.0)], {"t": Trajectory()})


def test_trajectories_without_sampled_tokens_give_no_rows() -> None:
    assert rows() == rows(call([1, 2], output([]))) == []
    assert micro_batches([], 100) == []


def test_denominators_count_policy_tokens_and_imitation_weight() -> None:
    data = rows(call([1], output([2, 3]))) + rows(call([1], output([2, 3, 4])), credit=IMITATION)
    assert denominators(data) == (2.0, 6.0)


def test_every_trained_token_is_in_exactly_one_micro_batch_after_its_own_prefix() -> None:
    r = random.Random(0)
    steps = [
        call(
            [1, 2] + [r.randrange(5) for _ in range(r.randrange(6))],
            *(output([r.randrange(5), 7]) for _ in range(3)),
            temperature=r.choice([1.0, 0.5]),
        )
        for _ in range(20)
    ]
    data = [row for i, s in enumerate(steps) for row in rows(s, credit=(POLICY, IMITATION)[i % 2])]
    wanted = sorted(
        (row.tokens[: p + 1], row.temperature, row.behaviour[i], row.advantage, row.component == "policy")
        for row in data
        for i, p in enumerate(row.trained)
    )
    for budget in (10, 40, 10_000):
        got = []
        for batch in micro_batches(data, budget):
            assert np.all(np.diff(batch.source) >= 0)
            for i, source in enumerate(batch.source):
                node, prefix = int(batch.read[source]), []
                while node >= 0:
                    prefix.append(int(batch.tree.tokens[node]))
                    node = int(batch.tree.parents[node])
                prefix = [*prefix[::-1], int(batch.target[i])]
                got.append(
                    (
                        tuple(prefix),
                        float(batch.temperature[source]),
                        float(batch.behaviour[i]),
                        float(batch.advantage[i]),
                        bool(batch.policy[i]),
                    )
                )
        assert sorted(got) == wanted


def test_the_order_of_credits_and_trajectories_does_not_matter() -> None:
    data = {f"t{i}": Trajectory(steps=(call([1, i], output([2, 3])),)) for i in range(6)}
    credit = [Credit(trajectory=t, component="policy", advantage=1.0) for t in data]
    assert batch_rows(credit[::-1], dict(reversed(data.items()))) == batch_rows(credit, data)


def test_samples_of_one_prompt_share_its_nodes() -> None:
    prompt = list(range(100, 150))
    data = rows(call(prompt, *(output([i % 3, 9]) for i in range(8))))
    (batch,) = micro_batches(data, 1000)
    assert len(batch.tree.tokens) == 50 + 3
    assert len(batch.target) == 16
