"""Which token is sampled: a pure function of the logits, the seed and the position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 64  # rows whose distributions are held in float64 at once


def uniform(seed: int, sample: int, token: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: 52 bits of a BLAKE2b hash.

    Counter-based, so that what one sample draws does not depend on which others are drawn, nor on their order.
    """
    digest = hashlib.blake2b(f"{seed}:{sample}:{token}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def pick(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """One token for each row, by the inverse of the cumulative distribution.

    Args:
        logits: [R, V].
        temperatures: [R]; 0 takes the likeliest token.
        uniforms: [R] numbers in [0, 1); not read where the temperature is 0.

    Returns:
        Token ids and their log-probabilities at the row's temperature (at 1 where it is 0), both [R].
    """
    tokens: list[int] = []
    logprobs: list[float] = []
    for start in range(0, len(temperatures), _CHUNK):
        heat = temperatures[start : start + _CHUNK]
        scaled = logits[start : start + _CHUNK].float()
        if any(t not in (0, 1) for t in heat):
            scaled = scaled / torch.tensor([t or 1.0 for t in heat], device=logits.device)[:, None]
        chosen = scaled.argmax(-1)
        hot = [i for i, t in enumerate(heat) if t > 0]
        logs = scaled.log_softmax(-1)
        if hot:
            below = logs[hot].double().exp_().cumsum(-1)
            target = torch.tensor([uniforms[start + i] for i in hot], dtype=torch.float64, device=logits.device)
            # right=True: the first token whose cumulative probability exceeds the number, never one of probability 0.
            drawn = torch.searchsorted(below, (target * below[:, -1])[:, None], right=True)[:, 0]
            chosen[hot] = drawn
        tokens += chosen.tolist()
        logprobs += logs.gather(1, chosen[:, None])[:, 0].tolist()
    return tokens, logprobs
