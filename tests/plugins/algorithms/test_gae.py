"""Generalised advantage estimation against two libraries, and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.algorithms.gae import gae, turn_discounts
from tests.oracles import within

NUMBER = st.floats(-5, 5, width=16)
UNIT = st.floats(0, 1, width=16)
STEPS = st.lists(st.tuples(NUMBER, NUMBER, st.booleans()), min_size=1, max_size=12)
SETTINGS = [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)]


def episodes(seed: int, count: int = 4) -> list[tuple[list[float], list[float]]]:
    """Rewards and values of episodes of different lengths, exact in float32."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 20, count)
    return [tuple(draw.normal(size=n).astype(np.float32).tolist() for _ in range(2)) for n in lengths]  # type: ignore[misc]


def deviation(ours: list[float], theirs: list[float]) -> float:
    """The largest difference, relative to the largest figure."""
    return float(np.abs(np.subtract(ours, theirs)).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_advantages_and_returns_are_torchrls(gamma: float, lam: float) -> None:
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    for rewards, values in episodes(1):
        done = torch.zeros(len(rewards), 1, dtype=torch.bool)
        done[-1] = True
        value = torch.tensor(values, dtype=torch.float64)[:, None]
        reward = torch.tensor(rewards, dtype=torch.float64)[:, None]
        following = torch.cat([value[1:], torch.full((1, 1), 7.0, dtype=torch.float64)])
        theirs = generalized_advantage_estimate(gamma, lam, value, following, reward, done)
        ours = gae(rewards, values, [gamma] * len(rewards), lam)
        within("GAE: advantages", "torchrl", deviation(ours[0], theirs[0][:, 0].tolist()), 1e-6)
        within("GAE: returns", "torchrl", deviation(ours[1], theirs[1][:, 0].tolist()), 1e-6)


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_advantages_and_returns_are_stable_baselines(gamma: float, lam: float) -> None:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    played = episodes(2)
    box = spaces.Box(-1, 1, (1,))
    size = sum(len(rewards) for rewards, _ in played)
    buffer = RolloutBuffer(size, box, box, device="cpu", gae_lambda=lam, gamma=gamma)
    nothing = np.zeros((1, 1), dtype=np.float32)
    for rewards, values in played:
        for t, (r, v) in enumerate(zip(rewards, values, strict=True)):
            starts = np.array([t == 0], dtype=np.float32)
            buffer.add(nothing, nothing, np.array([r]), starts, torch.tensor([v]), torch.zeros(1))
    buffer.compute_returns_and_advantage(torch.tensor([7.0]), np.array([True]))
    ours = [gae(rewards, values, [gamma] * len(rewards), lam) for rewards, values in played]
    advantages, returns = ([x for one in ours for x in one[k]] for k in (0, 1))
    within("GAE: advantages", "stable-baselines3", deviation(advantages, buffer.advantages[:, 0].tolist()), 1e-6)
    within("GAE: returns", "stable-baselines3", deviation(returns, buffer.returns[:, 0].tolist()), 1e-6)


@given(STEPS, UNIT, UNIT)
def test_values_carried_across_masked_tokens_are_the_compacted_sequence(
    steps: list[tuple[float, float, bool]], gamma: float, lam: float
) -> None:
    """verl's form: a masked token leaves next value and advantage as they are, whatever stands there."""
    carried = [0.0] * len(steps)
    next_value = advantage = 0.0
    for t in reversed(range(len(steps))):
        reward, value, action = steps[t]
        if action:
            advantage = reward + gamma * next_value - value + gamma * lam * advantage
            next_value = value
            carried[t] = advantage
    actions = [t for t, (*_, action) in enumerate(steps) if action]
    ours, _ = gae([steps[t][0] for t in actions], [steps[t][1] for t in actions], [gamma] * len(actions), lam)
    assert ours == pytest.approx([carried[t] for t in actions])


@given(st.lists(NUMBER, min_size=1, max_size=10), NUMBER)
def test_undiscounted_monte_carlo_advantages_of_a_terminal_reward_are_reward_minus_value(
    values: list[float], reward: float
) -> None:
    n = len(values)
    advantages, returns = gae([0.0] * (n - 1) + [reward], values, [1.0] * n, 1.0)
    assert advantages == pytest.approx([reward - v for v in values])
    assert returns == pytest.approx([reward] * n)


@given(st.lists(st.integers(0, 4), max_size=6), UNIT)
def test_turn_discounts_count_turns_and_not_tokens(lengths: list[int], gamma: float) -> None:
    turns = [n for n in lengths if n]
    discounts = turn_discounts(lengths, gamma)
    assert len(discounts) == sum(turns)
    for first in range(len(turns)):
        assert math.prod(discounts[sum(turns[:first]) :]) == pytest.approx(gamma ** (len(turns) - first))


def test_an_empty_trajectory_has_no_advantages() -> None:
    assert gae([], [], [], 1.0) == ([], [])
