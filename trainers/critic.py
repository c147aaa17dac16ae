"""The critic: a linear reading of the policy's last hidden states, trained by its own loss alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bascule.plugins.algorithm import Credit
from bascule.trainers.batch import Floats


class Critic(torch.nn.Module):
    """V = w h + b in float32, 0 at first.

    It stands beside the adapter, not in it: hidden states come in detached, so the adapter is moved by the policy's
    loss only, and an engine that serves the adapter never meets the critic.

    Args:
        width: size of the hidden states.
        device: where they are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.value = torch.nn.Linear(width, 1, device=device, dtype=torch.float32)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[M] values of [M, H] hidden states."""
        return self.value(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]


def explained_variance(credit: Sequence[Credit], values: Mapping[str, Floats]) -> float:
    """1 - var(returns - values) / var(returns) over the tokens of credit with returns; 0 where these do not vary.

    Args:
        credit: returns [T] of some trajectories.
        values: [T] the critic's estimates for each trajectory's sampled tokens, by its id.
    """
    known = [c for c in credit if c.returns is not None and c.trajectory in values]
    if not known:
        return 0.0
    returns = np.concatenate([np.asarray(c.returns) for c in known])
    error = returns - np.concatenate([values[c.trajectory] for c in known])
    spread = float(returns.var())
    return 1.0 - float(error.var()) / spread if spread > 0 else 0.0
