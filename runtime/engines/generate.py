"""Generation of many rows at once: shared prefixes, packed prefill, batched decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bascule.runtime.engines.attention import Block, Decode, Prefill, Prefix, register
from bascule.runtime.engines.sampling import pick, uniform
from bascule.schemas.trajectory import Output, Sampling, pack_floats, pack_ids
from bascule.trainers.tree import shared_prefix

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What bounds memory.

    Attributes:
        rows: rows that decode together.
        tokens: tokens of one prefill pass.
        kv_mib: MiB of keys and values of the rows that decode together.
        prefix_tokens: tokens whose keys and values are kept for later batches.
    """

    rows: int = 256
    tokens: int = 1024
    kv_mib: int = 384
    prefix_tokens: int = 2048


@dataclass(frozen=True)
class Row:
    """One sample of one prompt. Equal rows have equal answers."""

    prompt: Ids
    sampling: Sampling
    seed: int
    sample: int


Done = Callable[[Row, Output], None]

_SPLIT = 64  # tokens that a split of a batch must save: a pass has a fixed cost of about as many
_SHORTEST = 8  # tokens of a prefix that is worth holding


def clusters(prompts: Sequence[Ids]) -> Iterator[tuple[int, list[Ids]]]:
    """Group distinct prompts by the prefix they share, where that saves more tokens than another pass costs.

    Yields:
        The length of the shared prefix, less than any of the prompts', and the prompts.
    """

    def split(group: list[Ids]) -> Iterator[tuple[int, list[Ids]]]:
        shared = min(shared_prefix(group), min(len(p) for p in group) - 1)
        branches: dict[int, list[Ids]] = {}
        for prompt in group:
            branches.setdefault(prompt[shared], []).append(prompt)
        rest: list[Ids] = []
        for branch in branches.values():
            deeper = shared_prefix(branch) - shared
            if len(branches) > 1 and deeper * (len(branch) - 1) > _SPLIT:
                yield from split(branch)
            else:
                rest += branch
        if rest:
            yield shared, rest

    if prompts:
        yield from split(sorted(prompts))


@dataclass
class _Live:
    row: Row
    block: Block
    prompt: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class Generator:
    """Samples from one model. Not safe for threads: call from one at a time."""

    def __init__(self, model: Any, decode: Callable[[list[int]], str], ends: frozenset[int], limits: Limits) -> None:
        register(model)
        self.model = model
        self.limits = limits
        self._decode = decode
        self._ends = ends
        self._layers: int = model.config.num_hidden_layers
        self._prefixes: OrderedDict[tuple[str | None, Ids], Prefix] = OrderedDict()
        self._token_bytes = 0  # of keys and values; known after the first pass

    def forget(self) -> None:
        """Drop the kept prefixes."""
        self._prefixes.clear()

    @torch.inference_mode()
    def run(self, adapter: str | None, rows: Iterable[Row], done: Done) -> None:
        """Answer rows; ``done`` is called for each as soon as it has ended.

        The weights in place must be those of ``adapter``, whose name only keys the prefixes here.
        """
        by_prompt: dict[Ids, list[Row]] = {}
        for row in dict.fromkeys(rows):
            by_prompt.setdefault(row.prompt, []).append(row)
        wave: list[_Live] = []
        held = 0
        for prefix, prompts in self._blocks(adapter, list(by_prompt)):
            before = len(prefix.ids) if prefix else 0
            queue = [row for prompt in prompts for row in by_prompt[prompt]]
            while queue:
                if len(wave) >= self.limits.rows or held >= self._budget():
                    self._finish(wave, done)
                    wave, held = [], 0
                taken: list[Row] = []
                width = max(len(r.prompt) for r in queue) - before
                while queue and (not taken or (held < self._budget() and len(wave) + len(taken) < self.limits.rows)):
                    row = queue.pop(0)
                    held += row.sampling.max_tokens + (width if not taken or taken[-1].prompt != row.prompt else 0)
                    taken.append(row)
                wave += [live for live in self._prefill(prefix, taken, done) if not live.finished]
        self._finish(wave, done)

    def _budget(self) -> int:
        """Tokens whose keys and values may be held by a wave."""
        return self.limits.kv_mib * 2**20 // self._token_bytes if self._token_bytes else 1 << 12

    def _blocks(self, adapter: str | None, prompts: Sequence[Ids]) -> Iterator[tuple[Prefix | None, list[Ids]]]:
        """Prompts to prefill in one pass, and the prefix they share."""
        for shared, group in clusters(prompts):
            prefix = self._prefix(adapter, group[0][:shared], len(group))
            before = len(prefix.ids) if prefix else 0
            block: list[Ids] = []
            size = 0
            for prompt in sorted(group, key=lambda p: (len(p), p)):
                own = len(prompt) - before
                if block and size + own > self.limits.tokens:
                    yield prefix, block
                    block, size = [], 0
                if own > self.limits.tokens:
                    yield self._extended(prefix, prompt[before:-1]), [prompt]
                    continue
                block.append(prompt)
                size += own
            if block:
                yield prefix, block

    def _prefix(self, adapter: str | None, ids: Ids, users: int) -> Prefix | None:
        """The longest kept prefix of ``ids``, extended to all of them where that saves work."""
        best = None
        for (owner, kept), prefix in self._prefixes.items():
            longer = best is None or len(kept) > len(best.ids)
            if owner == adapter and longer and ids[: len(kept)] == kept:
                best = prefix
        missing = len(ids) - (len(best.ids) if best else 0)
        if missing * (users - 1) > _SPLIT // 2 and len(ids) >= _SHORTEST:
            best = self._extended(best, ids[len(ids) - missing :])
        if best is None:
            return None
        self._prefixes[adapter, best.ids] = best
        self._prefixes.move_to_end((adapter, best.ids))
        while len(self._prefixes) > 1 and sum(len(k[1]) for k in self._prefixes) > self.limits.prefix_tokens:
            self._prefixes.popitem(last=False)
        return best

    def _extended(self, prefix: Prefix | None, ids: Ids) -> Prefix:
        for start in range(0, len(ids), self.limits.tokens):
            part = ids[start : start + self.limits.tokens]
            rows = Prefill(prefix, [len(part)], self.model.device)
            before = prefix.ids if prefix else ()
            self._forward(part, range(len(before), len(before) + len(part)), [len(part) - 1], rows)
            own = [(k[0], v[0]) for k, v in rows.own]
            if prefix:
                own = [
                    (torch.cat([a, k], 1), torch.cat([b, v], 1))
                    for (a, b), (k, v) in zip(prefix.layers, own, strict=True)
                ]
            prefix = Prefix(before + part, tuple((k.contiguous(), v.contiguous()) for k, v in own))
        assert prefix is not None
        return prefix

    def _forward(self, ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int], rows: Any) -> torch.Tensor:
        """Logits [W, V] at the wanted places of packed tokens."""
        device = self.model.device
        out = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([list(positions)], device=device),
            logits_to_keep=torch.tensor(list(wanted), device=device),
            use_cache=False,
            rows=rows,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _prefill(self, prefix: Prefix | None, rows: Sequence[Row], done: Done) -> list[_Live]:
        """Compute the prompts of rows, grouped by prompt, and sample the first token of each row."""
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        before = len(prefix.ids) if prefix else 0
        own = [prompt[before:] for prompt in prompts]
        state = Prefill(prefix, [len(o) for o in own], self.model.device)
        ends: list[int] = []
        for o in own:
            ends.append((ends[-1] if ends else -1) + len(o))
        logits = self._forward(
            [t for o in own for t in o], [before + i for o in own for i in range(len(o))], ends, state
        )
        k, _ = state.own[0]
        self._token_bytes = self._layers * 2 * k.shape[1] * k.shape[3] * k.element_size()
        block = Block(prefix, tuple(state.own), tuple(len(o) for o in own))
        number = {prompt: i for i, prompt in enumerate(prompts)}
        live = [_Live(row, block, number[row.prompt]) for row in rows]
        if len(rows) > len(prompts):
            logits = logits[[one.prompt for one in live]]
        self._sample(live, logits, done)
        return live

    def _finish(self, live: list[_Live], done: Done) -> None:
        """Decode rows to their ends, one token each and pass."""
        state = Decode(self._layers)
        state.arrange([(one.block, one.prompt) for one in live])
        while any(not one.finished for one in live):
            positions = [len(one.row.prompt) + len(one.tokens) - 1 for one in live]
            logits = self._forward([one.tokens[-1] for one in live], positions, range(len(live)), state)
            state.advance()
            self._sample(live, logits, done)
            kept = [i for i, one in enumerate(live) if not one.finished]
            # Leaving ended rows in place costs their share of a pass, dropping them a copy of all keys and values.
            if kept and len(kept) * 8 <= len(live) * 7:
                live = [live[i] for i in kept]
                state.arrange([(one.block, one.prompt) for one in live], torch.tensor(kept, device=self.model.device))

    def _sample(self, live: Sequence[_Live], logits: torch.Tensor, done: Done) -> None:
        heat = [one.row.sampling.temperature for one in live]
        uniforms = [
            uniform(one.row.seed, one.row.sample, len(one.tokens)) if t else 0.0
            for one, t in zip(live, heat, strict=True)
        ]
        for one, token, logprob in zip(live, *pick(logits, heat, uniforms), strict=True):
            if one.finished:
                continue
            one.tokens.append(token)
            one.logprobs.append(logprob)
            if (output := self._ended(one)) is not None:
                one.finished = True
                done(one.row, output)

    def _ended(self, one: _Live) -> Output | None:
        sampling = one.row.sampling
        at_end = one.tokens[-1] in self._ends
        at_limit = len(one.tokens) >= sampling.max_tokens
        if not (at_end or at_limit or sampling.stop):
            return None
        text = self._decode(one.tokens[:-1] if at_end else one.tokens)
        cuts = [at for at in map(text.find, filter(None, sampling.stop)) if at >= 0]
        if not (at_end or at_limit or cuts):
            return None
        return Output(
            token_ids=pack_ids(one.tokens),
            logprobs=pack_floats(one.logprobs),
            text=text[: min(cuts)] if cuts else text,
            finish_reason="stop" if at_end or cuts else "length",
        )
