"""Attention over keys and values that many rows share.

The tokens of a batch stand packed in one row of the model's input, so that its linear layers compute no padding. The
attention alone knows which token belongs to which sequence. Keys and values are held in three parts, each once: a
prefix that many prompts share, the own part of a prompt that its samples share, and what each sample generated.

transformers hands the object that knows this through the model to the attention function as the argument ``rows``.
Shapes: H query heads, K key heads, G = H / K, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bascule.schemas.errors import EngineError
from bascule.trainers.base_model import IMPORTS

IMPLEMENTATION = "bascule_shared_rows"

KeysValues = tuple[Tensor, Tensor]


class Rows(Protocol):
    """What a forward pass attends to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of packed tokens: q [H, T, D], k and v [K, T, D] to [T, H, D]."""
        ...


@dataclass(frozen=True)
class Prefix:
    """Token ids and, for each layer, their keys and values [K, P, D]."""

    ids: tuple[int, ...]
    layers: tuple[KeysValues, ...]


def register(model: Any) -> None:
    """Make ``model`` attend through the ``rows`` argument of its forward pass.

    Raises:
        EngineError: the model has layers that are not plain full attention.
    """
    with IMPORTS:
        from transformers import AttentionInterface

    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        raise EngineError(
            f"The model type {config.model_type!r} has layers other than full attention: {', '.join(sorted(kinds))}.",
            next_step="Use a model with full attention, or serve this one with another engine.",
        )
    AttentionInterface.register(IMPLEMENTATION, _attention)
    model.set_attn_implementation(IMPLEMENTATION)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    for unsupported in ("softcap", "s_aux", "sliding_window"):
        if options.get(unsupported) is not None:
            raise EngineError(
                f"The model's attention asks for {unsupported!r}, which this engine does not compute.",
                next_step="Serve this model with another engine.",
            )
    rows: Rows = options["rows"]
    return rows.attend(module.layer_idx, query[0], key[0], value[0], options["scaling"])[None], None


class Prefill:
    """One or more sequences behind one prefix; keeps their keys and values.

    Attributes:
        own: for each layer, keys and values [R, K, L, D] of the sequences, padded at the right.
    """

    def __init__(self, prefix: Prefix | None, lengths: Sequence[int], device: torch.device) -> None:
        self.prefix = prefix
        self.own: list[KeysValues] = []
        self.rows, self.longest = len(lengths), max(lengths)
        self._slots = None
        if min(lengths) < self.longest:
            self._slots = torch.cat([torch.arange(n, device=device) + i * self.longest for i, n in enumerate(lengths)])
        before = len(prefix.ids) if prefix else 0
        # A padded key stands after every real query of its row, so the causal mask hides it too.
        self._mask = torch.ones(self.longest, before + self.longest, dtype=torch.bool, device=device).tril(before)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = self._padded(q), self._padded(k), self._padded(v)
        self.own.append((k, v))
        if self.prefix:
            shared_k, shared_v = self.prefix.layers[layer]
            k = torch.cat([shared_k.expand(self.rows, -1, -1, -1), k], dim=2)
            v = torch.cat([shared_v.expand(self.rows, -1, -1, -1), v], dim=2)
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask, scale=scale, enable_gqa=True)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self._slots is None else out[self._slots]

    def _padded(self, x: Tensor) -> Tensor:
        """[heads, T, D] to [R, heads, L, D]."""
        heads, _, size = x.shape
        x = x.transpose(0, 1)
        if self._slots is not None:
            packed, x = x, x.new_zeros(self.rows * self.longest, heads, size)
            x[self._slots] = packed
        return x.reshape(self.rows, self.longest, heads, size).transpose(1, 2)


@dataclass(frozen=True)
class Block:
    """Prompts that were prefilled together.

    Attributes:
        prefix: what they share.
        own: for each layer, keys and values [P, K, L, D], padded at the right.
        lengths: number of own tokens of each prompt.
    """

    prefix: Prefix | None
    own: tuple[KeysValues, ...]
    lengths: tuple[int, ...]


@dataclass
class _Part:
    """The alive rows of one block: where they stand, and where their prompts stand in the block."""

    block: Block
    rows: slice
    prompts: Tensor | None  # [P'] the prompts that have alive rows; None for all, in order
    slots: Tensor | None  # [R'] prompt * samples + sample; None where each prompt has one row
    samples: int
    mask: Tensor | None  # [P', 1, 1, L] true at padding
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.block.own[0][0].shape[2]


class Decode:
    """The rows that still generate: one token each and pass, in the order of their blocks and prompts."""

    def __init__(self, layers: int) -> None:
        self.generated: list[KeysValues | None] = [None] * layers
        self.length = 0
        self._parts: list[_Part] = []

    def arrange(self, rows: Sequence[tuple[Block, int]], kept: Tensor | None = None) -> None:
        """Say which rows are alive.

        Args:
            rows: block and index of the prompt within it, grouped by block, then by prompt.
            kept: [R] where each stood among the rows before; None on the first call.
        """
        self._parts = list(_parts(rows))
        if kept is not None:
            self.generated = [None if kv is None else (kv[0][kept], kv[1][kept]) for kv in self.generated]

    def advance(self) -> None:
        """Count the token that every row has just been given."""
        self.length += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self._extended(layer, k.transpose(0, 1), v.transpose(0, 1))
        rows, heads, size = q.shape[1], k.shape[0], q.shape[2]
        q = (q * scale).transpose(0, 1).reshape(rows, heads, -1, size)  # [R, K, G, D]
        return torch.cat([self._attend_part(p, layer, q[p.rows], keys[p.rows], values[p.rows]) for p in self._parts])

    def _extended(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        held = self.generated[layer]
        if held is None or held[0].shape[2] == self.length:
            room = max(4, 2 * self.length)
            grown = [x.new_empty(x.shape[0], x.shape[1], room, x.shape[2]) for x in (k, v)]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, :, : self.length] = old
            held = self.generated[layer] = (grown[0], grown[1])
        held[0][:, :, self.length] = k
        held[1][:, :, self.length] = v
        return held[0][:, :, : self.length + 1], held[1][:, :, : self.length + 1]

    @staticmethod
    def _attend_part(part: _Part, layer: int, q: Tensor, gen_k: Tensor, gen_v: Tensor) -> Tensor:
        """q [R, K, G, D], generated keys and values [R, K, T, D] to [R, H, D]."""
        rows, heads, group, size = q.shape
        own_k, own_v = part.block.own[layer]
        if part.prompts is not None:
            own_k, own_v = own_k[part.prompts], own_v[part.prompts]
        by_prompt = _spread(q, part).matmul(own_k.transpose(-1, -2))  # [P, K, S * G, L]
        if part.mask is not None:
            by_prompt = by_prompt.masked_fill(part.mask, float("-inf"))
        scores = [_gather(by_prompt, part, group), q.matmul(gen_k.transpose(-1, -2))]
        prefix = part.block.prefix
        if prefix:
            by_head = q.transpose(0, 1).reshape(heads, rows * group, size)
            shared = by_head.matmul(prefix.layers[layer][0].transpose(-1, -2))
            scores.append(shared.view(heads, rows, group, -1).transpose(0, 1))
        weights = torch.cat(scores, dim=-1).softmax(-1)  # [R, K, G, L + T (+ P)]
        own, gen, *rest = torch.split(weights, [s.shape[-1] for s in scores], dim=-1)
        out: Tensor = _gather(_spread(own, part).matmul(own_v), part, group) + gen.matmul(gen_v)
        if prefix:
            by_head = rest[0].transpose(0, 1).reshape(heads, rows * group, -1).matmul(prefix.layers[layer][1])
            out = out + by_head.view(heads, rows, group, size).transpose(0, 1)
        return out.reshape(rows, heads * group, size)


def _spread(x: Tensor, part: _Part) -> Tensor:
    """[R, K, G, X] by row to [P, K, S * G, X] by prompt, with zeros where a prompt has fewer rows."""
    if part.slots is None:
        return x
    _, heads, group, last = x.shape
    prompts = part.block.own[0][0].shape[0] if part.prompts is None else len(part.prompts)
    spread = x.new_zeros(prompts * part.samples, heads, group, last)
    spread[part.slots] = x
    return spread.view(prompts, part.samples, heads, group, last).transpose(1, 2).flatten(2, 3)


def _gather(x: Tensor, part: _Part, group: int) -> Tensor:
    """The inverse of :func:`_spread`."""
    if part.slots is None:
        return x
    prompts, heads, _, last = x.shape
    return x.view(prompts, heads, part.samples, group, last).transpose(1, 2).flatten(0, 1)[part.slots]


def _parts(rows: Sequence[tuple[Block, int]]) -> list[_Part]:
    parts: list[_Part] = []
    start = 0
    while start < len(rows):
        block = rows[start][0]
        stop = start
        while stop < len(rows) and rows[stop][0] is block:
            stop += 1
        prompts = [prompt for _, prompt in rows[start:stop]]
        distinct = list(dict.fromkeys(prompts))
        position = {prompt: i for i, prompt in enumerate(distinct)}
        samples = max(prompts.count(p) for p in distinct) if len(distinct) < len(prompts) else 1
        device = block.own[0][0].device
        slots = None
        if samples > 1:
            seen = [0] * len(distinct)
            places = []
            for prompt in prompts:
                i = position[prompt]
                places.append(i * samples + seen[i])
                seen[i] += 1
            slots = torch.tensor(places, device=device)
        lengths = torch.tensor([block.lengths[p] for p in distinct], device=device)
        width = block.own[0][0].shape[2]
        mask = None
        if int(lengths.min()) < width:
            mask = (torch.arange(width, device=device) >= lengths[:, None])[:, None, None, :]
        everything = distinct == list(range(len(block.lengths)))
        index = None if everything else torch.tensor(distinct, device=device)
        parts.append(_Part(block, slice(start, stop), index, slots, samples, mask))
        start = stop
    return parts
