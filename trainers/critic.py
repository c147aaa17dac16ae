"""The critic: a linear reading of the policy's last hidden states, trained by its own loss alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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


def explained_variance(values: Sequence[Floats], returns: Sequence[Floats]) -> float:
    """1 - var(returns - values) / var(returns) over tokens with a return; 0 where the returns do not vary."""
    v, r = (np.concatenate(list(x)) if x else np.zeros(0) for x in (values, returns))
    known = np.isfinite(r)
    v, r = v[known], r[known]
    spread = float(r.var()) if r.size else 0.0
    return 1.0 - float((r - v).var()) / spread if spread > 0 else 0.0
