"""Training rows: the recorded tokens, each sampled one trained once, nothing else."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bascule.plugins.algorithm import Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Step, ToolCall, Trajectory, pack_floats, pack_ids
from bascule.trainers.batch import (
    COMPONENTS,
    Row,
    gathered,
    micro_batches,
    probes,
    scattered,
    split,
    trajectory_rows,
    units_of,
    weighed,
)
from bascule.trainers.params import TrainParams

POLICY = Credit(trajectory="t", component="policy", advantage=0.5)
IMITATION = Credit(trajectory="t", component="imitation", advantage=2.0)


def output(ids: list[int], logprobs: list[float] | None = None) -> Output:
    values = [-0.5] * len(ids) if logprobs is None else logprobs
    return Output(token_ids=pack_ids(ids), logprobs=pack_floats(values), text="")


def call(prompt: list[int], *outputs: Output, temperature: float = 1.0) -> ModelCall:
    sampling = Sampling(temperature=temperature)
    return ModelCall(kind="chat", asked="", prompt_ids=pack_ids(prompt), outputs=outputs, sampling=sampling)


def rows(*steps: Step) -> list[Row]:
    return list(trajectory_rows("t", Trajectory(steps=steps)))


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


def test_losses_with_a_ratio_need_log_probabilities_and_the_others_do_not() -> None:
    for logprobs in ([], [-0.5], [math.nan, -1.0]):
        data = {"t": Trajectory(steps=(call([1], output([2, 3], logprobs)),))}
        for component in ("policy", "reinforce", "own"):
            with pytest.raises(TrainError, match="log-probabilities"):
                units_of([Credit(trajectory="t", component=component, advantage=1.0)], data)
        ((share,),) = units_of([IMITATION], data)
        assert all(map(math.isnan, share.rows[0].behaviour))


def test_empty_prompts_unknown_trajectories_and_credits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrainError, match="empty prompt"):
        rows(call([], output([1])))
    with pytest.raises(TrainError, match="not in the batch"):
        units_of([POLICY], {})
    data = {"t": Trajectory(steps=(call([1], output([2, 3])),)), "u": Trajectory(steps=(call([1], output([4])),))}
    for bad in (math.nan, math.inf, (1.0, math.nan)):
        with pytest.raises(TrainError, match="has the policy credit"):
            units_of([Credit(trajectory="t", component="policy", advantage=bad)], data)
    for component, rejected in (("imitation", None), ("pair", "u")):
        with pytest.raises(TrainError, match=f"has the {component} credit"):
            units_of([Credit(trajectory="t", component=component, advantage=-1.0, rejected=rejected)], data)
    for component, rejected in (("imitation", "u"), ("pair", None)):
        with pytest.raises(TrainError, match=f"of the form {component}"):
            units_of([Credit(trajectory="t", component=component, advantage=1.0, rejected=rejected)], data)
    with pytest.raises(TrainError, match="3 numbers in advantage for 2"):
        units_of([Credit(trajectory="t", component="policy", advantage=(1.0, 2.0, 3.0))], data)
    with pytest.raises(TrainError, match="returns that are not finite"):
        units_of([Credit(trajectory="t", component="policy", advantage=1.0, returns=(1.0, math.nan))], data)


def test_trajectories_without_sampled_tokens_give_no_rows() -> None:
    assert rows() == rows(call([1, 2], output([]))) == []
    assert units_of([POLICY], {"t": Trajectory()}) == []
    assert micro_batches([], 100) == []
    assert probes({"t": Trajectory()}) == []


def test_weights_share_one_denominator_a_component() -> None:
    data = {f"t{n}": Trajectory(steps=(call([1], output(list(range(2, 2 + n)))),)) for n in (1, 2, 3, 4)}
    credit = [
        Credit(trajectory="t1", component="policy", advantage=1.0, returns=(1.0,)),
        Credit(trajectory="t2", component="policy", advantage=1.0),
        Credit(trajectory="t3", component="imitation", advantage=2.0),
        Credit(trajectory="t4", component="pair", advantage=1.0, rejected="t1"),
    ]

    def weights(loss_type: str) -> list[float]:
        found = weighed(units_of(credit, data), TrainParams(loss_type=loss_type, max_completion_length=10))
        assert {s.value_weight for u in found for s in u} == {1.0}
        return [u[0].weight for u in found]

    assert weights("dapo") == [1 / 3, 1 / 3, 1 / 6, 1.0]
    assert weights("grpo") == [1 / 2, 1 / 4, 1 / 6, 1.0]
    assert weights("dr_grpo") == [1 / 20, 1 / 20, 1 / 6, 1.0]


def test_per_token_advantages_go_to_their_tokens_also_where_turns_fork() -> None:
    steps = (call([1, 2], output([3, 4])), call([9], output([5])), call([1, 2, 3, 4, 6], output([7])))
    data = {"t": Trajectory(steps=steps)}
    (unit,) = units_of([Credit(trajectory="t", component="policy", advantage=(1.0, 2.0, 3.0, 4.0))], data)
    (batch,) = micro_batches([unit], 100)
    assert dict(zip(batch.target.tolist(), batch.advantage.tolist(), strict=True)) == {3: 1.0, 4: 2.0, 5: 3.0, 7: 4.0}
    flat = {"t": np.asarray([10.0, 20.0, 30.0, 40.0])}
    assert dict(zip(batch.target.tolist(), gathered(flat, batch).tolist(), strict=True)) == {3: 10, 4: 20, 5: 30, 7: 40}
    assert scattered([batch], [gathered(flat, batch)])["t"].tolist() == [10.0, 20.0, 30.0, 40.0]


def test_a_pair_stays_in_one_micro_batch_with_its_sides_in_order() -> None:
    data = {f"t{n}": Trajectory(steps=(call([1], output([n, 9])),)) for n in range(2, 8)}
    credit = [Credit(trajectory=f"t{n}", component="pair", advantage=1.0, rejected=f"t{n + 3}") for n in (2, 3, 4)]
    batches = micro_batches(weighed(units_of(credit, data), TrainParams()), 1)
    assert [b.trajectories for b in batches] == [("t2", "t5"), ("t3", "t6"), ("t4", "t7")]
    for batch in batches:
        sides = {int(t): int(s) for t, s in zip(batch.target, batch.sequence, strict=True) if t != 9}
        assert sorted(sides.values()) == [0, 1]
        assert sides[min(sides)] == 0


def test_mini_batches_keep_groups_whole_and_take_every_unit_once() -> None:
    data = {f"g{g}-s{s}": Trajectory(steps=(call([1, g], output([5 + s])),)) for g in range(5) for s in range(3)}
    units = units_of([Credit(trajectory=t, component="policy", advantage=1.0) for t in data], data)
    group_of = {t: t.partition("-")[0] for t in data}
    for parts in (1, 2, 5, 9):
        found = split(units, parts, group_of)
        assert len(found) == min(parts, 5)
        assert sorted(u[0].trajectory for p in found for u in p) == sorted(data)
        assert sum(len({group_of[u[0].trajectory] for u in p}) for p in found) == 5
    assert split([], 3, {}) == []


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
    given = {f"t{i:02d}": Trajectory(steps=(s,)) for i, s in enumerate(steps)}
    credit = [
        Credit(trajectory=t, component=("imitation", "policy")[i % 2], advantage=1.0 + i) for i, t in enumerate(given)
    ]
    data = units_of(credit, given)
    wanted = sorted(
        (row.tokens[: p + 1], row.temperature, row.behaviour[i], share.advantage[0], share.component)
        for (share,) in data
        for row in share.rows
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
                        COMPONENTS[batch.component[i]],
                    )
                )
        assert sorted(got) == wanted


def test_the_order_of_credits_and_trajectories_does_not_matter() -> None:
    data = {f"t{i}": Trajectory(steps=(call([1, i], output([2, 3])),)) for i in range(6)}
    credit = [Credit(trajectory=t, component="policy", advantage=1.0) for t in data]
    one, other = units_of(credit[::-1], dict(reversed(data.items()))), units_of(credit, data)
    assert [[s.rows for s in u] for u in one] == [[s.rows for s in u] for u in other]


def test_samples_of_one_prompt_share_its_nodes() -> None:
    prompt = list(range(100, 150))
    data = {f"t{i}": Trajectory(steps=(call(prompt, output([i % 3, 9])),)) for i in range(8)}
    (batch,) = micro_batches(probes(data), 1000)
    assert len(batch.tree.tokens) == 50 + 3
    assert len(batch.target) == 16
