"""Generalised advantage estimation (arXiv 1506.02438, equation 16) over the sampled tokens of one trajectory."""

from __future__ import annotations

from collections.abc import Sequence


def gae(
    rewards: Sequence[float], values: Sequence[float], discounts: Sequence[float], lam: float
) -> tuple[list[float], list[float]]:
    """A_t = delta_t + gamma_t lam A_(t+1), delta_t = r_t + gamma_t V_(t+1) - V_t; V and A are 0 after the last token.

    Tokens of tools and environment are no actions: they are not in the sequence, which is the same as to carry values
    and advantages across them. A trajectory is judged as it ended, also one that was cut, so nothing is bootstrapped.

    Args:
        rewards: [T].
        values: [T] the critic's estimate from before each token.
        discounts: [T] gamma from each token to the next; the last is not used.
        lam: 1 for Monte Carlo returns, 0 for the one-step error.

    Returns:
        [T] advantages, and [T] returns, A_t + V_t, for the critic to predict.
    """
    advantages = [0.0] * len(rewards)
    next_value = advantage = 0.0
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + discounts[t] * next_value - values[t] + discounts[t] * lam * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def turn_discounts(lengths: Sequence[int], gamma: float) -> list[float]:
    """[T] discounts that are 1 inside a turn and ``gamma`` from one turn to the next, however long turns are.

    Args:
        lengths: tokens of each turn.
        gamma: discount of a turn.
    """
    return [gamma if t == length - 1 else 1.0 for length in lengths for t in range(length)]
