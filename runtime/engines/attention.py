"""Attention over keys and values that many rows share.

The tokens of a batch stand packed in one row of the model's input, so that its linear layers compute no padding. The
attention alone knows which token belongs to which sequence. Keys and values are held in three parts, each once: a
prefix that many prompts share, the own part of a prompt that its samples share, and what each sample generated.

transformers hands the object that knows this through the model to the attention function as the argument ``rows``.
Shapes: H query heads, K key heads, G = H / K, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

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
    """Token ids and, for each layer that was computed, their keys and values [K, P, D]."""

    ids: tuple[int, ...]
    layers: list[KeysValues] = field(default_factory=list)


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

    Args:
        fills: the prefix that the one sequence extends ``prefix`` to. Rows that follow in the same pass may use it.

    Attributes:
        own: for each layer, keys and values [R, K, L, D] of the sequences, padded at the right.
    """

    def __init__(
        self, prefix: Prefix | None, lengths: Sequence[int], device: torch.device, fills: Prefix | None = None
    ) -> None:
        self.prefix = prefix
        self._fills = fills
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
        self.own.append((k.contiguous(), v.contiguous()))  # else every pass that decodes behind them copies them
        if self.prefix:
            shared_k, shared_v = self.prefix.layers[layer]
            k = torch.cat([shared_k.expand(self.rows, -1, -1, -1), k], dim=2)
            v = torch.cat([shared_v.expand(self.rows, -1, -1, -1), v], dim=2)
        if self._fills:
            self._fills.layers.append((k[0].contiguous(), v[0].contiguous()))
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


class Together:
    """Several kinds of rows in one pass: the first tokens are of the first, and so on.

    Args:
        parts: what attends, and its number of tokens.
    """

    def __init__(self, parts: Sequence[tuple[Rows, int]]) -> None:
        self._parts = [rows for rows, _ in parts]
        self._sizes = [size for _, size in parts]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cut = zip(self._parts, *(torch.split(x, self._sizes, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([rows.attend(layer, *qkv, scale) for rows, *qkv in cut])


@dataclass(frozen=True, eq=False)
class Block:
    """Prompts that are attended to together.

    Attributes:
        prefix: what they share.
        own: for each layer, keys and values [P, K, L, D], padded at the right.
        lengths: number of own tokens of each prompt.
    """

    prefix: Prefix | None
    own: tuple[KeysValues, ...]
    lengths: tuple[int, ...]

    @property
    def area(self) -> int:
        """Tokens whose keys and values are held, padding included."""
        return len(self.lengths) * self.own[0][0].shape[2]


@dataclass(eq=False)
class Placed:
    """A row that generates.

    Attributes:
        block: holds its prompt.
        prompt: index of its prompt there.
        limit: most tokens that it generates.
        generated: number of its generated tokens whose keys and values are held.
        place: where it stands among the rows; -1 before it joined.
    """

    block: Block
    prompt: int
    limit: int
    generated: int = field(default=0, kw_only=True)
    place: int = field(default=-1, kw_only=True)


R = TypeVar("R", bound=Placed)


def area(rows: Sequence[Placed]) -> int:
    """Tokens whose keys and values are held for rows, or may come to be, padding included."""
    blocks = {id(row.block): row.block.area for row in rows}
    return sum(blocks.values()) + len(rows) * max((row.limit for row in rows), default=0)


@dataclass
class _Part:
    """The rows of one block.

    Attributes:
        block: theirs.
        rows: where they stand.
        slots: [R'] prompt * samples + sample; None where each prompt has one row.
        samples: most rows of one prompt.
        mask: [P, 1, 1, L] true at padding; None where there is none.
    """

    block: Block
    rows: slice
    slots: Tensor | None
    samples: int
    mask: Tensor | None


class Decode(Generic[R]):
    """The rows that generate: one token each and pass. Rows join and leave between passes.

    Attributes:
        rows: in the order in which their tokens stand in a pass.
    """

    def __init__(self, layers: int) -> None:
        self.rows: list[R] = []
        self._held: list[KeysValues | None] = [None] * layers  # [R, K, room, D] of the generated tokens
        self._room = 0
        self._parts: list[_Part] = []
        self._places: Tensor | int = 0  # [R] where the next token's keys and values go; a number where it is the same
        self._mask: Tensor | None = None  # [R, 1, 1, T] true where a row has nothing
        self._longest = 0

    def arrange(self, keep: Callable[[R], bool], joining: Sequence[R] = ()) -> None:
        """Let rows leave and others join."""
        rows = [row for row in (*self.rows, *joining) if keep(row)]
        _regroup(rows)
        numbers: dict[int, int] = {}
        for row in rows:
            numbers.setdefault(id(row.block), len(numbers))
        self.rows = sorted(rows, key=lambda row: (numbers[id(row.block)], row.prompt))
        self._parts = list(_parts(self.rows))
        self._hold(max((row.generated for row in self.rows), default=0))

    def begin(self, device: torch.device) -> None:
        """Make ready for a pass."""
        lengths = [row.generated for row in self.rows]
        self._longest = max(lengths)
        if self._longest >= self._room:
            self._hold(self._longest)
        if min(lengths) == self._longest:
            self._places, self._mask = self._longest, None
        else:
            self._places = places = torch.tensor(lengths, device=device)
            columns = torch.arange(self._longest + 1, device=device)
            self._mask = (columns > places[:, None])[:, None, None, :]

    def end(self) -> None:
        """Count the tokens of the pass that was computed."""
        for row in self.rows:
            row.generated += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self._extended(layer, k.transpose(0, 1), v.transpose(0, 1))
        rows, heads, size = q.shape[1], k.shape[0], q.shape[2]
        q = (q * scale).transpose(0, 1).reshape(rows, heads, -1, size)  # [R, K, G, D]
        out = [self._attend_part(p, layer, q[p.rows], keys[p.rows], values[p.rows]) for p in self._parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _hold(self, longest: int) -> None:
        """Give the generated tokens of the rows their room, in the rows' order."""
        limit = max((row.limit for row in self.rows), default=0)
        self._room = max(4, longest + 1, min(2 * longest, limit))
        moved = [(i, row.place) for i, row in enumerate(self.rows) if row.place >= 0]
        for layer, held in enumerate(self._held):
            if held is None or not self.rows:
                self._held[layer] = None
                continue
            new = tuple(x.new_zeros(len(self.rows), x.shape[1], self._room, x.shape[3]) for x in held)
            if moved:
                to, of = torch.tensor(moved, device=held[0].device).T
                width = min(self._room, held[0].shape[2])
                for one, old in zip(new, held, strict=True):
                    one[to, :, :width] = old[of, :, :width]
            self._held[layer] = (new[0], new[1])
        for i, row in enumerate(self.rows):
            row.place = i

    def _extended(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        held = self._held[layer]
        if held is None:
            shape = (k.shape[0], k.shape[1], self._room, k.shape[2])
            held = self._held[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        if isinstance(self._places, int):
            held[0][:, :, self._places] = k
            held[1][:, :, self._places] = v
        else:
            every = torch.arange(k.shape[0], device=k.device)
            held[0][every, :, self._places] = k
            held[1][every, :, self._places] = v
        return held[0][:, :, : self._longest + 1], held[1][:, :, : self._longest + 1]

    def _attend_part(self, part: _Part, layer: int, q: Tensor, gen_k: Tensor, gen_v: Tensor) -> Tensor:
        """q [R, K, G, D], generated keys and values [R, K, T, D] to [R, H, D]."""
        rows, heads, group, size = q.shape
        own_k, own_v = part.block.own[layer]
        by_prompt = _spread(q, part).matmul(own_k.transpose(-1, -2))  # [P, K, S * G, L]
        if part.mask is not None:
            by_prompt.masked_fill_(part.mask, float("-inf"))
        by_row = q.matmul(gen_k.transpose(-1, -2))
        if self._mask is not None:
            by_row.masked_fill_(self._mask[part.rows], float("-inf"))
        scores = [_gather(by_prompt, part, group), by_row]
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
    prompts = len(part.block.lengths)
    spread = x.new_zeros(prompts * part.samples, heads, group, last)
    spread[part.slots] = x
    return spread.view(prompts, part.samples, heads, group, last).transpose(1, 2).flatten(2, 3)


def _gather(x: Tensor, part: _Part, group: int) -> Tensor:
    """The inverse of :func:`_spread`."""
    if part.slots is None:
        return x
    prompts, heads, _, last = x.shape
    return x.view(prompts, heads, part.samples, group, last).transpose(1, 2).flatten(0, 1)[part.slots]


def _regroup(rows: Sequence[Placed]) -> None:
    """Drop prompts that no row has any more, and merge small blocks behind the same prefix.

    Every part of a pass has a fixed cost in each layer, and every merge copies its blocks, so a block is merged only
    with one of at most twice its size, as in a binary counter, and where that pads little.
    """
    alive: dict[int, tuple[Block, set[int]]] = {}
    for row in rows:
        alive.setdefault(id(row.block), (row.block, set()))[1].add(row.prompt)
    chains: dict[int, list[list[tuple[Block, list[int]]]]] = {}  # by prefix: what becomes one block
    for block, prompts in alive.values():
        chain = chains.setdefault(id(block.prefix), [])
        chain.append([(block, sorted(prompts))])
        while len(chain) > 1 and _worth_merging(chain[-2], chain[-1]):
            last = chain.pop()
            chain[-1] += last
    moved: dict[tuple[int, int], tuple[Block, int]] = {}
    for parts in (parts for chain in chains.values() for parts in chain):
        if len(parts) == 1 and len(parts[0][1]) == len(parts[0][0].lengths):
            continue
        merged = _merged(parts)
        places = [(id(block), prompt) for block, prompts in parts for prompt in prompts]
        moved |= {place: (merged, i) for i, place in enumerate(places)}
    for row in rows:
        row.block, row.prompt = moved.get((id(row.block), row.prompt), (row.block, row.prompt))


def _worth_merging(one: list[tuple[Block, list[int]]], other: list[tuple[Block, list[int]]]) -> bool:
    def size(parts: list[tuple[Block, list[int]]]) -> tuple[int, int]:
        prompts = sum(len(p) for _, p in parts)
        return prompts, max(block.lengths[i] for block, p in parts for i in p)

    (n, width), (m, other_width) = size(one), size(other)
    return n <= 2 * m and max(width, other_width) * (n + m) * 2 <= 3 * (n * width + m * other_width)


def _merged(parts: Sequence[tuple[Block, list[int]]]) -> Block:
    lengths = tuple(block.lengths[i] for block, prompts in parts for i in prompts)
    width = max(lengths)
    own: list[KeysValues] = []
    for layer, (first, _) in enumerate(parts[0][0].own):
        _, heads, _, size = first.shape
        both = tuple(first.new_zeros(len(lengths), heads, width, size) for _ in range(2))
        start = 0
        for block, prompts in parts:
            common = min(width, block.own[layer][0].shape[2])
            for new, old in zip(both, block.own[layer], strict=True):
                new[start : start + len(prompts), :, :common] = old[prompts, :, :common]
            start += len(prompts)
        own.append((both[0], both[1]))
    return Block(parts[0][0].prefix, tuple(own), lengths)


def _parts(rows: Sequence[Placed]) -> list[_Part]:
    parts: list[_Part] = []
    start = 0
    while start < len(rows):
        block = rows[start].block
        stop = start
        while stop < len(rows) and rows[stop].block is block:
            stop += 1
        counts = [0] * len(block.lengths)
        nth = []
        for row in rows[start:stop]:
            nth.append(counts[row.prompt])
            counts[row.prompt] += 1
        samples, device = max(counts), block.own[0][0].device
        slots = mask = None
        if samples > 1:
            places = [row.prompt * samples + i for row, i in zip(rows[start:stop], nth, strict=True)]
            slots = torch.tensor(places, device=device)
        width = block.own[0][0].shape[2]
        if min(block.lengths) < width:
            lengths = torch.tensor(block.lengths, device=device)
            mask = (torch.arange(width, device=device) >= lengths[:, None])[:, None, None, :]
        parts.append(_Part(block, slice(start, stop), slots, samples, mask))
        start = stop
    return parts
