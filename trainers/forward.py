"""Log-probabilities of a micro-batch's sampled tokens: one pass over its tree, the head only where it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bascule.schemas.errors import ConfigError
from bascule.trainers.batch import MicroBatch

HEAD_ROWS = 256  # rows of logits alive at once: 50 MB at a vocabulary of 49,152
_ATTENTION = {"full_attention", "sliding_attention"}
_OTHERWISE = {"bloom", "gpt_neo", "mpt", "recurrent_gemma", "rwkv"}  # do not name their kind of layers
_HEAD_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class TokenFigures:
    """What a pass says of a micro-batch's M sampled tokens.

    Attributes:
        logprobs: [M] at the tokens' temperatures.
        entropy: [M] of the next-token distribution, in nats.
        hidden: [M, H] last hidden states before the tokens, detached.
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def check_base(base: Any) -> None:
    """Refuse base models that the tree pass would compute otherwise than they compute themselves.

    Raises:
        ConfigError: a layer is not attention over earlier tokens, or the logits are not a linear map.
    """
    config = base.config
    odd = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    scaled = [name for name in _HEAD_SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    if config.model_type in _OTHERWISE or getattr(config, "alibi", False):
        odd.add("another kind of attention or none")
    if odd or scaled:
        what = f"layers of {', '.join(sorted(odd))}" if odd else f"logits under {scaled[0]}"
        raise ConfigError(
            f"The model type {config.model_type!r} has {what}, which the trainer does not compute.",
            next_step="Train a model of plain or sliding-window attention.",
        )


def vocabulary(base: Any) -> int:
    """Number of tokens that a base model embeds and predicts."""
    return min(len(e.weight) for e in (base.get_input_embeddings(), base.get_output_embeddings()))


def token_figures(base: Any, batch: MicroBatch, *, entropy_gradient: bool = False) -> TokenFigures:
    """Compute a micro-batch, with gradient where gradients are enabled.

    Args:
        base: a causal language model of transformers; each node attends to its ancestors only.
        batch: its tree stands in one sequence.
        entropy_gradient: whether the entropy has a gradient too, which costs one more product with the vocabulary.
    """
    states = hidden_states(base, batch)
    head = base.get_output_embeddings()
    device = states.device
    source = torch.from_numpy(batch.source).to(device)
    head_of: Any = _Head.apply
    logprobs, entropy = head_of(
        states,
        head.weight,
        getattr(head, "bias", None),
        source,
        torch.from_numpy(batch.target).to(device),
        torch.from_numpy(batch.temperature).to(device, torch.float32),
        entropy_gradient,
    )
    return TokenFigures(logprobs, entropy[source], states.detach()[source])


def hidden_states(base: Any, batch: MicroBatch) -> Tensor:
    """[U, H] last hidden states at the nodes that are read."""
    device, tree = base.device, batch.tree
    ancestors = tree.ancestors()
    kinds = set(getattr(base.config, "layer_types", None) or ())
    window = getattr(base.config, "sliding_window", None) or np.inf
    near = ancestors & (tree.positions[:, None] - tree.positions[None] < window)
    mask: Any
    if "sliding_attention" in kinds:
        mask = {"full_attention": _bias(ancestors, base), "sliding_attention": _bias(near, base)}
    else:  # a model without layer types has the window, if any, in all of its layers
        mask = _bias(ancestors if kinds else near, base)
    states = base.get_decoder()(
        input_ids=torch.from_numpy(tree.tokens)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[0]
    return torch.index_select(states, 0, torch.from_numpy(batch.read).to(device))


def _bias(allowed: npt.NDArray[np.bool_], base: Any) -> Tensor:
    """[1, 1, N, N] additive mask."""
    mask = torch.zeros(allowed.shape, dtype=base.dtype, device=base.device)
    mask.masked_fill_(~torch.from_numpy(allowed).to(base.device), torch.finfo(base.dtype).min)
    return mask[None, None]


class _Head(torch.autograd.Function):
    """The output embedding and log-softmax in chunks of rows; the logits of one chunk only are ever alive.

    The gradient of a log-probability with respect to its hidden state is ``(W[target] - p W) / T`` with ``p`` the
    distribution, that of the entropy ``-(p * (log p + entropy)) W / T``; both products with ``W`` are made while the
    chunk's logits are there, so that the backward pass needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: Tensor,
        target: Tensor,
        heat: Tensor,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and [U] entropies of hidden [U, H], weight [V, H], source and target [M], heat [U]."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        like: Any = {"dtype": wide, "device": hidden.device}
        logprobs, entropy, heat = torch.empty(len(target), **like), torch.empty(len(hidden), **like), heat.to(wide)
        expected = torch.empty(hidden.shape, **like) if ctx.needs_input_grad[0] else None
        slope = torch.empty(hidden.shape, **like) if expected is not None and entropy_gradient else None
        for first in range(0, len(hidden), HEAD_ROWS):
            rows = slice(first, min(first + HEAD_ROWS, len(hidden)))
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).to(wide).div_(heat[rows, None])
            logp = torch.log_softmax(logits, dim=-1)
            p = torch.softmax(logits, dim=-1)  # exp(logp) sums to 1 +- 2e-6, times what the rows of W have in common
            del logits
            begin, end = torch.searchsorted(source, torch.tensor([rows.start, rows.stop], device=source.device))
            logprobs[begin:end] = logp[source[begin:end] - first, target[begin:end]]
            logp.mul_(p)
            entropy[rows] = -logp.sum(dim=-1)
            if expected is not None:
                expected[rows] = p.to(weight.dtype) @ weight
            if slope is not None:
                logp.add_(p * entropy[rows, None])
                slope[rows] = logp.to(weight.dtype) @ weight
        ctx.save_for_backward(weight, source, target, heat, expected, slope)
        ctx.dtype = hidden.dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        weight, source, target, heat, expected, slope = ctx.saved_tensors
        grad = torch.zeros_like(expected)
        grad.index_add_(0, source, of_logprobs[:, None] * weight[target].to(grad.dtype))
        total = torch.zeros_like(heat).index_add_(0, source, of_logprobs)
        grad -= total[:, None] * expected
        if slope is not None:
            grad -= of_entropy[:, None] * slope
        return (grad / heat[:, None]).to(ctx.dtype), None, None, None, None, None, None
