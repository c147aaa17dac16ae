"""Log-probabilities of a micro-batch's trained tokens: one pass over its tree, the head only where it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bascule.trainers.batch import MicroBatch

HEAD_ROWS = 256  # rows of logits alive at once: 50 MB at a vocabulary of 49,152


@dataclass(frozen=True)
class Piece:
    """Some trained tokens of a micro-batch.

    Attributes:
        tokens: which, as a slice of the micro-batch's flat tokens.
        logprobs: [m] at the tokens' temperatures, with gradient where there is one.
        entropy: sum over the m tokens of the next-token distribution's entropy, in nats.
    """

    tokens: slice
    logprobs: Tensor
    entropy: float


def hidden_states(base: Any, batch: MicroBatch) -> Tensor:
    """[U, hidden] last hidden states at the nodes that are read.

    Args:
        base: a causal language model of transformers; each node attends to its ancestors only.
        batch: its tree stands in one sequence.
    """
    device = base.device
    tree = batch.tree
    ancestors = torch.from_numpy(tree.ancestors()).to(device)
    mask = torch.zeros(ancestors.shape, dtype=base.dtype, device=device)
    mask.masked_fill_(~ancestors, torch.finfo(base.dtype).min)
    states = base.get_decoder()(
        input_ids=torch.from_numpy(tree.tokens)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    return torch.index_select(states, 0, torch.from_numpy(batch.read).to(device))


def pieces(base: Any, batch: MicroBatch, hidden: Tensor) -> Iterator[Piece]:
    """The trained tokens in their order, by at most :data:`HEAD_ROWS` rows of logits."""
    head = base.get_output_embeddings()
    for first in range(0, len(batch.read), HEAD_ROWS):
        rows = slice(first, min(first + HEAD_ROWS, len(batch.read)))
        begin, end = np.searchsorted(batch.source, (rows.start, rows.stop))
        tokens = slice(int(begin), int(end))
        temperature = torch.from_numpy(batch.temperature[rows]).to(hidden.device, torch.float32)
        logprobs = torch.log_softmax(head(hidden[rows]).float() / temperature[:, None], dim=-1)
        source = torch.from_numpy(batch.source[tokens] - first).to(hidden.device)
        target = torch.from_numpy(batch.target[tokens]).to(hidden.device)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)[source].sum()
        yield Piece(tokens, logprobs[source, target], float(entropy))


@torch.no_grad()
def token_logprobs(base: Any, batch: MicroBatch) -> Tensor:
    """[M] log-probabilities of a micro-batch's trained tokens, without gradient."""
    hidden = hidden_states(base, batch)
    return torch.cat([piece.logprobs for piece in pieces(base, batch, hidden)])
