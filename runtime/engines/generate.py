"""Generation of many rows at once, which join and leave between passes.

A pass of the model computes one new token of every row that decodes and, packed with them, prompts of rows that join.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Generator as Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch

from bascule.plugins.engine import before_stop
from bascule.runtime.engines.attention import Block, Decode, Placed, Prefill, Prefix, Together, area, register
from bascule.runtime.engines.sampling import pick, uniform
from bascule.schemas.trajectory import Output, Sampling, pack_floats, pack_ids
from bascule.trainers.tree import shared_prefix

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What bounds memory.

    Attributes:
        rows: rows that decode, those of adapters that wait for their turn included.
        tokens: tokens of prompts in one pass.
        kv_mib: MiB of keys and values of the rows that decode.
        prefix_tokens: tokens whose keys and values are kept for later rows.
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


@dataclass(frozen=True)
class Answer:
    """What came of a row: an output, or why there is none."""

    adapter: str | None
    row: Row
    outcome: Output | Exception


TURN = 32  # passes of one adapter while another waits: to exchange the weights may cost as much as a few passes
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


@dataclass(eq=False)
class _Live(Placed):
    row: Row
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class _Prefilling:
    """Prompts to compute.

    Attributes:
        prompts: their own tokens, behind what ``state`` has as their prefix.
        state: keeps their keys and values.
        rows: what is sampled from them, each with the index of its prompt; none for a prefix.
        ahead: the prefix of ``state``, to be computed in the same pass.
    """

    prompts: Sequence[Ids]
    state: Prefill
    rows: Sequence[tuple[Row, int]] = ()
    ahead: _Prefilling | None = None

    @property
    def parts(self) -> list[_Prefilling]:
        """In the order of their tokens in the pass."""
        return [*(self.ahead.parts if self.ahead else ()), self]

    @property
    def size(self) -> int:
        """Tokens of ``prompts``."""
        return sum(map(len, self.prompts))


@dataclass(eq=False)
class _Batch:
    """The rows of one adapter.

    Attributes:
        waiting: in the order of submission; not yet looked at.
        planned: those that ``admission`` admits, one prefill after another, with None while there is no room.
        cancelled: among those planned.
        decode: those that decode; some may have ended and not left yet.
        untidy: some of them were cancelled.
        passes: computed in this turn.
        starved: it has nothing to decode and finds no room.
    """

    adapter: str | None
    decode: Decode[_Live]
    waiting: dict[Row, None] = field(default_factory=dict)
    planned: dict[Row, None] = field(default_factory=dict)
    cancelled: set[Row] = field(default_factory=set)
    admission: Iterator[_Prefilling | None] | None = None
    untidy: bool = False
    passes: int = 0
    starved: bool = False

    @property
    def live(self) -> list[_Live]:
        return [one for one in self.decode.rows if not one.finished]

    @property
    def empty(self) -> bool:
        return not (self.waiting or self.planned or self.live)

    def wanted(self, queue: Sequence[Row]) -> list[Row]:
        """Those of planned rows that were not cancelled. The others are planned no more: they may be asked for anew."""
        for row in self.cancelled.intersection(queue):
            del self.planned[row]
            self.cancelled.discard(row)
        return [row for row in queue if row in self.planned]


class Generator:
    """Samples from one model: rows are submitted, and every step is one pass. Not safe for threads.

    The adapters with rows take turns. Those of one decode on while others of it join; those of the others keep their
    place. An adapter that waits has its turn after :data:`TURN` passes of each of the others, or, where memory is full,
    as soon as rows have ended: until then nobody else admits any.

    Args:
        model: a causal language model of transformers.
        decode: the text of token ids.
        ends: token ids that end an answer.
        limits: of memory.
        activate: puts the weights of an adapter, or of the base model, in place.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[list[int]], str],
        ends: frozenset[int],
        limits: Limits,
        activate: Callable[[str | None], None],
    ) -> None:
        register(model)
        self.model = model
        self.limits = limits
        self._decode = decode
        self._ends = ends
        self._activate = activate
        self._layers: int = model.config.num_hidden_layers
        self._prefixes: OrderedDict[tuple[str | None, Ids], Prefix] = OrderedDict()
        self._batches: OrderedDict[str | None, _Batch] = OrderedDict()
        self._token_bytes = 0  # of keys and values; known after the first pass

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return any(not batch.empty for batch in self._batches.values())

    @property
    def waiting(self) -> int:
        """Number of rows that no step has looked at yet."""
        return sum(len(batch.waiting) for batch in self._batches.values())

    def submit(self, adapter: str | None, rows: Iterable[Row]) -> None:
        """Have rows answered; one that is being answered already is answered once."""
        batch = self._batches.get(adapter)
        if batch is None:
            batch = self._batches[adapter] = _Batch(adapter, Decode(self._layers))
        decoding = {one.row for one in batch.live}
        for row in rows:
            batch.cancelled.discard(row)
            if row not in decoding and row not in batch.planned:
                batch.waiting[row] = None

    def cancel(self, adapter: str | None, rows: Iterable[Row]) -> None:
        """Let rows go unanswered; harmless for those that are answered or unknown."""
        batch = self._batches.get(adapter)
        if batch is None:
            return
        gone = set(rows)
        for row in gone:
            batch.waiting.pop(row, None)
        batch.cancelled |= gone & batch.planned.keys()
        for one in batch.live:
            if one.row in gone:
                one.finished = batch.untidy = True

    def drop(self, adapter: str | None) -> list[Row]:
        """Forget all that is held for an adapter; the rows that will not be answered."""
        for key in [key for key in self._prefixes if key[0] == adapter]:
            del self._prefixes[key]
        batch = self._batches.pop(adapter, None)
        return [] if batch is None else [*(one.row for one in batch.live), *batch.planned, *batch.waiting]

    def forget(self) -> None:
        """Drop the kept prefixes."""
        self._prefixes.clear()

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Compute one pass; the answers of the rows that ended with it, or that failed because it did."""
        self._batches = OrderedDict((name, batch) for name, batch in self._batches.items() if not batch.empty)
        batch = next(iter(self._batches.values()), None)
        if batch is not None and batch.passes >= TURN:
            self._pass_on(batch)
        for batch in list(self._batches.values()):
            try:
                self._tidy(batch)
                prefilling = self._admitted(batch)
                if prefilling is not None or batch.live:
                    self._activate(batch.adapter)
                    batch.passes += 1
                    return self._pass(batch, prefilling)
            except Exception as error:
                return [Answer(batch.adapter, row, error) for row in self._lost(batch)]
            self._pass_on(batch)
        return []

    @torch.inference_mode()
    def score(self, adapter: str | None, ids: Sequence[int]) -> list[float]:
        """Log-probabilities at temperature 1 of each of ``ids`` but the first, between two steps."""
        self._activate(adapter)
        places = range(len(ids) - 1)
        logits = self._forward(ids[:-1], places, places, Prefill(None, [len(places)], self.model.device))
        chosen = torch.tensor(list(ids[1:]), device=logits.device)[:, None]
        return [float(x) for x in logits.float().log_softmax(-1).gather(1, chosen)[:, 0]]

    def _pass_on(self, batch: _Batch) -> None:
        batch.passes = 0
        self._batches.move_to_end(batch.adapter)

    def _lost(self, batch: _Batch) -> list[Row]:
        """Give up the rows that a failed pass was for."""
        rows = [*(one.row for one in batch.live), *batch.planned]
        if not rows:
            rows = list(batch.waiting)
            batch.waiting.clear()
        batch.decode, batch.admission = Decode(self._layers), None
        batch.planned.clear()
        batch.cancelled.clear()
        return rows

    def _tidy(self, batch: _Batch) -> None:
        """Let rows leave that ended.

        Leaving them in place costs their share of a pass, dropping them a copy of all keys and values.
        """
        if batch.untidy or len(batch.live) * 8 <= len(batch.decode.rows) * 7:
            batch.decode.arrange(lambda one: not one.finished)
            batch.untidy = False

    def _admitted(self, batch: _Batch) -> _Prefilling | None:
        """What to prefill in this batch's next pass."""
        if batch.live and any(other.starved for other in self._batches.values()):
            return None
        while batch.admission is not None or self._plan(batch):
            assert batch.admission is not None
            try:
                prefilling = next(batch.admission)
            except StopIteration:
                batch.admission = None
                batch.planned.clear()
                batch.cancelled.clear()
                continue
            batch.starved = prefilling is None and not batch.live
            return prefilling
        batch.starved = bool(batch.waiting) and not batch.live
        return None

    def _plan(self, batch: _Batch) -> bool:
        """Begin to admit those of a batch's rows that have waited longest; not few where many wait."""
        free = self.limits.rows - sum(len(b.live) + len(b.planned) for b in self._batches.values())
        if not batch.waiting or free < min(len(batch.waiting), max(1, self.limits.rows // 8)):
            return False
        for row in list(batch.waiting)[:free]:
            batch.planned[row] = batch.waiting.pop(row)
        batch.admission = self._admission(batch, list(batch.planned))
        return True

    def _admission(self, batch: _Batch, rows: Sequence[Row]) -> Iterator[_Prefilling | None]:
        by_prompt: dict[Ids, list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row.prompt, []).append(row)
        for shared, group in clusters(list(by_prompt)):
            prefix, ahead = yield from self._prefix(batch.adapter, group[0][:shared], len(group))
            for prompts in self._cut(group, len(prefix.ids) if prefix else 0):
                behind, before = prefix, len(prefix.ids) if prefix else 0
                size = sum(len(p) - before for p in prompts)
                if ahead and ahead.size + size > self.limits.tokens:
                    yield ahead
                    ahead = None
                if size > self.limits.tokens:
                    behind, ahead = yield from self._extended(prefix, prompts[0][before:-1])
                queue = [row for prompt in prompts for row in by_prompt[prompt]]
                while queue := batch.wanted(queue):
                    taken = self._fitting(batch, len(behind.ids) if behind else 0, queue)
                    queue = queue[len(taken) :]
                    if not taken:
                        yield None
                        continue
                    yield self._prefilling(behind, taken, ahead)
                    ahead = None

    def _fitting(self, batch: _Batch, before: int, queue: Sequence[Row]) -> list[Row]:
        """The first rows of a queue whose keys and values find room; at least one where nothing else decodes."""
        live = batch.live
        others = sum(area(b.live) for b in self._batches.values() if b is not batch)
        limit = max((one.limit for one in live), default=0)
        prompts = area(live) - len(live) * limit
        alone = not any(b.live for b in self._batches.values())
        budget = self.limits.kv_mib * 2**20 // self._token_bytes if self._token_bytes else 1 << 12
        width = max(len(row.prompt) for row in queue) - before
        taken: list[Row] = []
        for row in queue:
            if not taken or taken[-1].prompt != row.prompt:
                prompts += width
            limit = max(limit, row.sampling.max_tokens)
            full = others + prompts + (len(live) + len(taken) + 1) * limit > budget
            if full and (taken or not alone):
                break
            taken.append(row)
        return taken

    def _cut(self, group: Sequence[Ids], before: int) -> Iterator[list[Ids]]:
        """Prompts to prefill in one pass; one that is too long for it stands alone."""
        block: list[Ids] = []
        size = 0
        for prompt in sorted(group, key=lambda p: (len(p), p)):
            own = len(prompt) - before
            if block and size + own > self.limits.tokens:
                yield block
                block, size = [], 0
            block.append(prompt)
            size += own
        yield block

    def _prefix(
        self, adapter: str | None, ids: Ids, users: int
    ) -> Coroutine[_Prefilling | None, None, tuple[Prefix | None, _Prefilling | None]]:
        """The longest kept prefix of ``ids``, extended to all of them where that saves work; see :meth:`_extended`."""
        best = ahead = None
        for (owner, kept), prefix in self._prefixes.items():
            longer = best is None or len(kept) > len(best.ids)
            computed = len(prefix.layers) == self._layers
            if owner == adapter and longer and computed and ids[: len(kept)] == kept:
                best = prefix
        missing = len(ids) - (len(best.ids) if best else 0)
        if missing * (users - 1) > _SPLIT // 2 and len(ids) >= _SHORTEST:
            best, ahead = yield from self._extended(best, ids[len(ids) - missing :])
        if best is None:
            return None, None
        self._prefixes[adapter, best.ids] = best
        self._prefixes.move_to_end((adapter, best.ids))
        while len(self._prefixes) > 1 and sum(len(k[1]) for k in self._prefixes) > self.limits.prefix_tokens:
            self._prefixes.popitem(last=False)
        return best, ahead

    def _extended(
        self, prefix: Prefix | None, ids: Ids
    ) -> Coroutine[_Prefilling | None, None, tuple[Prefix, _Prefilling]]:
        """The prefix with ``ids`` behind it, and what computes the last of them: before, or with, what uses it."""
        for start in range(0, len(ids), self.limits.tokens):
            part = ids[start : start + self.limits.tokens]
            longer = Prefix((prefix.ids if prefix else ()) + part)
            last = _Prefilling([part], Prefill(prefix, [len(part)], self.model.device, longer))
            if start + len(part) < len(ids):
                yield last
            prefix = longer
        assert prefix is not None
        return prefix, last

    def _prefilling(self, prefix: Prefix | None, rows: Sequence[Row], ahead: _Prefilling | None) -> _Prefilling:
        """The prompts of rows, which are grouped by prompt."""
        before = len(prefix.ids) if prefix else 0
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        own = [prompt[before:] for prompt in number]
        state = Prefill(prefix, [len(o) for o in own], self.model.device)
        return _Prefilling(own, state, [(row, number[row.prompt]) for row in rows], ahead)

    def _pass(self, batch: _Batch, prefilling: _Prefilling | None) -> list[Answer]:
        """Compute prompts, and one token of every row that decodes; sample the next of all of them."""
        decode = batch.decode
        rows = list(decode.rows)
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        states: list[tuple[Any, int]] = []
        for part in prefilling.parts if prefilling else ():
            before = len(part.state.prefix.ids) if part.state.prefix else 0
            for prompt in part.prompts:
                ids += prompt
                positions += range(before, before + len(prompt))
                if part is prefilling:
                    wanted.append(len(ids) - 1)
            states.append((part.state, part.size))
        if rows:
            decode.begin(self.model.device)
            wanted += range(len(ids), len(ids) + len(rows))
            ids += [one.tokens[-1] for one in rows]
            positions += [len(one.row.prompt) + len(one.tokens) - 1 for one in rows]
            states.append((decode, len(rows)))
        logits = self._forward(ids, positions, wanted, states[0][0] if len(states) == 1 else Together(states))
        decode.end()
        joining: list[_Live] = []
        if prefilling is not None:
            first = prefilling.state.own[0][0]
            self._token_bytes = self._layers * 2 * first.shape[1] * first.shape[3] * first.element_size()
            joining = self._joining(batch, prefilling)
            prompts = [one.prompt for one in joining]
            if prompts != list(range(len(prefilling.prompts))):
                logits = logits[[*prompts, *range(len(prefilling.prompts), len(wanted))]]
        answers = self._sample(batch.adapter, [*joining, *rows], logits) if joining or rows else []
        if joining:
            decode.arrange(lambda one: not one.finished, joining)
            batch.untidy = False
        return answers

    def _joining(self, batch: _Batch, prefilling: _Prefilling) -> list[_Live]:
        if not prefilling.rows:
            return []
        state = prefilling.state
        block = Block(state.prefix, tuple(state.own), tuple(len(p) for p in prefilling.prompts))
        for row, _ in prefilling.rows:
            del batch.planned[row]
        return [_Live(block, prompt, row.sampling.max_tokens, row) for row, prompt in prefilling.rows]

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

    def _sample(self, adapter: str | None, live: Sequence[_Live], logits: torch.Tensor) -> list[Answer]:
        heat = [one.row.sampling.temperature for one in live]
        uniforms = [
            uniform(one.row.seed, one.row.sample, len(one.tokens)) if t else 0.0
            for one, t in zip(live, heat, strict=True)
        ]
        answers = []
        for one, token, logprob in zip(live, *pick(logits, heat, uniforms), strict=True):
            if one.finished:
                continue
            one.tokens.append(token)
            one.logprobs.append(logprob)
            if (output := self._ended(one)) is not None:
                one.finished = True
                answers.append(Answer(adapter, one.row, output))
        return answers

    def _ended(self, one: _Live) -> Output | None:
        sampling = one.row.sampling
        at_end = one.tokens[-1] in self._ends
        at_limit = len(one.tokens) >= sampling.max_tokens
        if not (at_end or at_limit or sampling.stop):
            return None
        text = self._decode(one.tokens[:-1] if at_end else one.tokens)
        cut = before_stop(text, sampling.stop)
        if not (at_end or at_limit) and cut is None:
            return None
        return Output(
            token_ids=pack_ids(one.tokens),
            logprobs=pack_floats(one.logprobs),
            text=text if cut is None else cut,
            finish_reason="length" if cut is None and not at_end else "stop",
        )
