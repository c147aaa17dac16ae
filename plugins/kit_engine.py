"""The conformance kit of engines: what an inference engine promises, asked of a live one.

An engine that cannot do something says so in its :class:`~bascule.plugins.engine.EngineInfo`; what it declares is
checked, what it does not is left out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest
from bascule.plugins.kit import Check, check, fault_of, warns
from bascule.schemas.errors import EngineError, PromptError
from bascule.schemas.trajectory import Output, Sampling, unpack_floats, unpack_ids

#: Log-probabilities of a model's own, computed apart from the engine: given the ids of a prompt and of an output, the
#: temperature (1 for a greedy output) and the adapter's name, one for each id of the output.
Oracle = Callable[[Sequence[int], Sequence[int], float, str | None], Sequence[float]]

PROMPTS = (
    "A bascule is a balance with two arms.",
    "12 + 13 =",
    "The first letter of the alphabet is",
    "Once upon a time",
    "A bascule is a balance with two arms; one",
    "0 1 2 3 4",
)
#: Seconds after which a call that was neither answered nor refused counts as lost.
PATIENCE = 300.0


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What a suite is given to check an engine with.

    Attributes:
        oracle: recomputes log-probabilities.
        tolerance: how far they may be from the oracle's.
        adapters: folders of two or more different LoRA adapters, by the names to load them under.
        context: tokens of the model's context, where it has one.
        ends: ids of the tokens that end an answer, where they are known.
        max_tokens: of most of the answers that are asked for.
    """

    oracle: Oracle | None = None
    tolerance: float = 1e-3
    adapters: Mapping[str, Path] = {}
    context: int | None = None
    ends: frozenset[int] = frozenset()
    max_tokens: int = 12


async def check_engine(engine: Engine, given: Conditions | None = None) -> AsyncIterator[Check]:
    """All that an engine promises; each check as it is done.

    Equal questions are asked under equal trajectories, so that the suite can be recorded and replayed.

    Args:
        engine: not started; it is started and closed here.
        given: what to check it with; what needs something that is not given does not apply.
    """
    suite = _Suite(engine, given or Conditions())
    started = await _looked("start", suite.start)
    yield started
    if started.outcome == "broken":
        return
    looks: dict[str, Callable[[], Awaitable[Check]]] = {
        "tokens": suite.tokens,
        "logprobs": suite.logprobs,
        "oracle": suite.against_oracle,
        "seeds": suite.seeds,
        "greedy": suite.greedy,
        "samples": suite.samples,
        "max-tokens": suite.max_tokens,
        "stop": suite.stop,
        "end": suite.end,
        "concurrent": suite.concurrent,
        "cancelled": suite.cancelled,
        "unknown-adapter": suite.unknown_adapter,
        "adapters": suite.adapters,
        "two-adapters": suite.two_adapters,
        "too-long": suite.too_long,
        "close": suite.close,  # last: the engine is of no use after it
    }
    for name, look in looks.items():
        yield await _looked(name, look)


async def _looked(name: str, look: Callable[[], Awaitable[Check]]) -> Check:
    """The check; broken as well if the engine fails in it."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await look()
    except TimeoutError:
        return check(name, "every call is answered or refused", [f"not within {PATIENCE:g} s"], "Correct the engine.")
    except Exception as e:
        return check(name, "the engine does not fail", [fault_of(e)], "Correct the engine.")


class _Suite:
    def __init__(self, engine: Engine, given: Conditions) -> None:
        self._engine = engine
        self._given = given
        self._info: EngineInfo = EngineInfo(name="", model="", model_digest="")

    async def _ask(
        self,
        label: str,
        prompt: str = PROMPTS[0],
        *,
        n: int = 1,
        seed: int = 1,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Sampled:
        sampling.setdefault("max_tokens", self._given.max_tokens)
        request = SampleRequest(
            trajectory=f"kit-{label}-n0",
            call=0,
            prompt=prompt,
            n=n,
            sampling=Sampling(**sampling),
            seed=seed,
            adapter=adapter,
        )
        return await self._engine.sample(request)

    async def start(self) -> Check:
        self._info = await self._engine.start()
        again = await self._engine.start()
        faults = [] if self._info == again else ["a second start says something else"]
        faults += [f"it has no {name}" for name in ("name", "model") if not getattr(self._info, name)]
        cannot = [name for name in ("token_ids", "logprobs", "seeds", "adapters") if not getattr(self._info, name)]
        found = f"declares no {', no '.join(cannot)}" if cannot else ""
        return check("start", "it starts, twice as well, and says what it is", faults, "Correct start().", found)

    async def tokens(self) -> Check:
        promise = "answers hold the token ids of prompt and outputs, or none where it declares none"
        one, same, other = [
            await self._ask(label, prompt)
            for label, prompt in (("ids", PROMPTS[0]), ("ids", PROMPTS[0]), ("ids-other", PROMPTS[1]))
        ]
        outputs = [output for sampled in (one, same, other) for output in sampled.outputs]
        faults = []
        if self._info.token_ids:
            faults += [] if one.prompt_ids and other.prompt_ids else ["a prompt has no ids"]
            faults += [] if one.prompt_ids == same.prompt_ids else ["one prompt has two encodings"]
            faults += [] if one.prompt_ids != other.prompt_ids else ["two prompts have one encoding"]
            faults += [] if all(o.token_ids for o in outputs) else ["an output has no ids"]
            ids = [i for o in outputs for i in unpack_ids(o.token_ids)]
            faults += [] if all(i >= 0 for i in (*ids, *one.prompt_ids)) else ["an id is negative"]
        elif any(o.token_ids for o in outputs) or one.prompt_ids:
            faults.append("there are ids, which its information denies")
        return check("tokens", promise, faults, "Return what the model saw, or declare token_ids=False.")

    async def logprobs(self) -> Check:
        promise = "every output token has its log-probability, and those of different tokens sum to at most 1"
        many = (await self._ask("first-tokens", n=8, max_tokens=1)).outputs
        outputs = [*many, *(await self._ask("logprobs", n=2)).outputs]
        next_step = "Return the log-probabilities at the sampling temperature, or declare logprobs=False."
        if not self._info.logprobs:
            faults = ["there are some, which its information denies"] if any(o.logprobs for o in outputs) else []
            return check("logprobs", "there are none, as declared", faults, next_step)
        faults = []
        for o in outputs:
            ids, values = unpack_ids(o.token_ids), unpack_floats(o.logprobs)
            faults += [] if len(ids) == len(values) else [f"{len(ids)} tokens have {len(values)}"]
            faults += [f"one is {x:g}" for x in values if not math.isfinite(x) or x > 1e-5][:1]
        first: dict[int, float] = {}
        for o in many:
            for token, value in zip(unpack_ids(o.token_ids)[:1], unpack_floats(o.logprobs)[:1], strict=False):
                if abs(first.setdefault(token, value) - value) > self._given.tolerance:
                    faults.append(f"token {token} has {first[token]:.4f} and {value:.4f} after one prompt")
        total = sum(map(math.exp, first.values())) if not faults else 0.0
        faults += [f"{len(first)} different first tokens have {total:.4f} together"] if total > 1.001 else []
        return check("logprobs", promise, faults, next_step)

    async def against_oracle(self) -> Check:
        promise = "log-probabilities are the model's own at the sampling temperature, at 1 where that is 0"
        if self._given.oracle is None or not (self._info.logprobs and self._info.token_ids):
            return check("oracle", promise, [], "", applies=False)
        largest = 0.0
        for j, temperature in enumerate((0.0, 0.7, 1.0, 1.5)):
            for i, prompt in enumerate(PROMPTS[:3]):
                sampled = await self._ask(f"oracle-{j}-{i}", prompt, n=2, temperature=temperature)
                largest = max([largest, *self._deviations(sampled, temperature, None)])
        return self._near("oracle", promise, largest)

    def _near(self, name: str, promise: str, largest: float) -> Check:
        faults = [] if largest <= self._given.tolerance else [f"they are up to {largest:.2g} off"]
        return check(name, promise, faults, "Compute them as the model does.", f"at most {largest:.2g} off")

    def _deviations(self, sampled: Sampled, temperature: float, adapter: str | None) -> list[float]:
        assert self._given.oracle is not None
        found = []
        for output in sampled.outputs:
            ids = unpack_ids(output.token_ids)
            expected = self._given.oracle(sampled.prompt_ids, ids, temperature or 1.0, adapter)
            found += [abs(a - b) for a, b in zip(unpack_floats(output.logprobs), expected, strict=True)]
        return [x if math.isfinite(x) else math.inf for x in found]

    async def seeds(self) -> Check:
        promise = "the same seed gives the same answer; other samples and seeds give others"
        if not self._info.seeds:
            return check("seeds", promise, [], "", applies=False)
        one, again = [await self._ask("seed", n=4, temperature=1.5) for _ in range(2)]
        other = await self._ask("seed-other", n=4, temperature=1.5, seed=2)
        faults = [] if _same(one.outputs, again.outputs) else ["asked again, the same seed gave another answer"]
        faults += [] if len({_content(o) for o in one.outputs}) > 1 else ["4 samples of one seed are all alike"]
        faults += [] if not _same(one.outputs, other.outputs) else ["two seeds gave the same samples"]
        return check("seeds", promise, faults, "Draw from the request's seed alone, or declare seeds=False.")

    async def greedy(self) -> Check:
        one = await self._ask("greedy", n=2, temperature=0)
        other = await self._ask("greedy-other", temperature=0, seed=2)
        contents = {_content(o) for o in (*one.outputs, *other.outputs)}
        faults = [] if len(contents) == 1 else [f"it gave {len(contents)} different answers"]
        return check("greedy", "temperature 0 gives one answer, whatever the seed", faults, "Take the likeliest token.")

    async def samples(self) -> Check:
        numbers = {n: len((await self._ask(f"samples-{n}", n=n)).outputs) for n in (1, 3, 7)}
        faults = [f"asked for {n}, it gave {m}" for n, m in numbers.items() if n != m]
        return check("samples", "as many outputs come as are asked for", faults, "Return n outputs.")

    async def max_tokens(self) -> Check:
        promise = "no output is longer than max_tokens, and one that ended by length is as long"
        if not self._info.token_ids:
            return check("max-tokens", promise, [], "", applies=False)
        faults = []
        for most in (1, 2, 9):
            for output in (await self._ask(f"most-{most}", n=3, max_tokens=most)).outputs:
                size = len(unpack_ids(output.token_ids))
                faults += [f"{size} tokens came where {most} were allowed"] if size > most else []
                if output.finish_reason == "length" and size < most:
                    faults.append(f"one of {size} tokens ended by length, with {most} allowed")
        return check("max-tokens", promise, faults, "Count the tokens that are returned, the end token included.")

    async def stop(self) -> Check:
        promise = "a stop string ends the text before it, and the tokens up to it are kept"
        whole = (await self._ask("stop-whole", temperature=0)).outputs[0]
        at = len(whole.text) // 2
        stop = whole.text[at : at + 2]
        if not stop:
            return check("stop", promise, [], "", "the greedy answer is empty", applies=False)
        cut = (await self._ask("stop-cut", temperature=0, stop=("\x00never", stop))).outputs[0]
        faults = []
        if cut.text != whole.text[: whole.text.index(stop)]:
            faults.append(f"{whole.text!r} was cut to {cut.text!r} by {stop!r}")
        faults += [] if cut.finish_reason == "stop" else [f"it ended by {cut.finish_reason!r}"]
        kept = unpack_ids(cut.token_ids)
        faults += [] if kept == unpack_ids(whole.token_ids)[: len(kept)] else ["the kept tokens are others"]
        if self._info.logprobs and len(kept) != len(unpack_floats(cut.logprobs)):
            faults.append("the kept tokens and their log-probabilities differ in number")
        return check("stop", promise, faults, "Cut the text, and keep the tokens that were sampled.")

    async def end(self) -> Check:
        promise = "an end token ends an output and is kept; what ends by length has none"
        ends = self._given.ends
        if not ends or not self._info.token_ids:
            return check("end", promise, [], "", applies=False)
        faults, ended = [], 0
        for output in (await self._ask("end", n=16, temperature=1.5, max_tokens=4 * self._given.max_tokens)).outputs:
            ids = unpack_ids(output.token_ids)
            ended += output.finish_reason == "stop"
            faults += ["something follows an end token"] if ends & set(ids[:-1]) else []
            if (ids[-1] in ends) != (output.finish_reason == "stop") and len(ids) < 4 * self._given.max_tokens:
                faults.append(f"one that ended by {output.finish_reason!r} has {ids[-1]} as its last token")
        return check("end", promise, faults, "Stop at end tokens.", f"{ended} of 16 ended by one")

    async def concurrent(self) -> Check:
        promise = "calls that run at a time are answered each as it would be alone"
        alone = [await self._ask(f"concurrent-{i}", p, temperature=0) for i, p in enumerate(PROMPTS)]
        together = await asyncio.gather(
            *(self._ask(f"concurrent-{i}", p, temperature=0) for _ in range(3) for i, p in enumerate(PROMPTS))
        )
        wrong = [f"call {i} got the prompt of another" for i, s in _paired(together, alone, _prompt)]
        if wrong:
            return check("concurrent", promise, wrong, "Give every call its own answer.")
        faults = [f"call {i} got another answer" for i, s in _paired(together, alone, _outputs)]
        # On some hardware near-ties fall otherwise in another batch; that is no fault.
        return warns(check("concurrent", promise, faults, "Look whether calls are mixed up.", f"{len(together)} calls"))

    async def cancelled(self) -> Check:
        promise = "a cancelled call harms no other, and can be asked again"
        tasks = [asyncio.create_task(self._ask(f"cancelled-{i}", p, n=2)) for i, p in enumerate(PROMPTS)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [f"another failed: {fault_of(r)}" for r in results[1::2] if isinstance(r, Exception)]
        again = await asyncio.gather(
            *(self._ask(f"cancelled-{i}", p, n=2) for i, p in enumerate(PROMPTS)), return_exceptions=True
        )
        faults += [f"asked again it failed: {fault_of(r)}" for r in again if isinstance(r, Exception)]
        return check("cancelled", promise, faults, "Let go of a call whose caller has gone.")

    async def _refused(self, kind: type[EngineError], label: str, **asked: Any) -> list[str]:
        """Faults, unless a call is refused with an error of a kind, and one after it answered."""
        try:
            await self._ask(label, **asked)
        except kind as e:
            faults = [] if e.next_step else ["the refusal says no next step"]
        except Exception as e:
            faults = [f"it raised {type(e).__name__} and not {kind.__name__}: {fault_of(e)}"]
        else:
            faults = ["it was answered"]
        await self._ask("after-refusal")
        return faults

    async def unknown_adapter(self) -> Check:
        promise = "an adapter that is not loaded is refused with EngineError"
        if not self._info.adapters:
            return check("unknown-adapter", promise, [], "", applies=False)
        faults = await self._refused(EngineError, "unknown", adapter="kit-unknown")
        return check("unknown-adapter", promise, faults, "Look the name up before the call is queued.")

    async def adapters(self) -> Check:
        promise = "an adapter is loaded, loaded again, used, unloaded, and then refused"
        if not self._info.adapters or not self._given.adapters:
            return check("adapters", promise, [], "", applies=False)
        name, folder = next(iter(self._given.adapters.items()))
        for _ in range(2):
            await self._engine.load_adapter(name, folder)
        base = await self._ask("adapter-base", temperature=0)
        used = await self._ask("adapter-used", temperature=0, adapter=name)
        faults = [] if not _same(base.outputs, used.outputs) else ["it answers as the base model does"]
        for _ in range(2):
            await self._engine.unload_adapter(name)
        faults += [f"unloaded, {fault}" for fault in await self._refused(EngineError, "adapter-gone", adapter=name)]
        after = await self._ask("adapter-base", temperature=0)
        faults += [] if _same(base.outputs, after.outputs) else ["the base model answers otherwise after it"]
        return check(
            "adapters", promise, faults, "Serve every adapter under its own name, and the base model as it is."
        )

    async def two_adapters(self) -> Check:
        promise = "adapters that are asked at a time answer each with its own weights"
        names = list(self._given.adapters)
        if not self._info.adapters or len(names) < 2:
            return check("two-adapters", promise, [], "", applies=False)
        for name, folder in self._given.adapters.items():
            await self._engine.load_adapter(name, folder)
        asked = [(i, p, name) for i, p in enumerate(PROMPTS) for name in (*names, None)]

        async def ask(i: int, prompt: str, name: str | None) -> Sampled:
            return await self._ask(f"two-{i}-{name}", prompt, adapter=name)

        together = await asyncio.gather(*(ask(*one) for one in asked))
        for name in names:
            await self._engine.unload_adapter(name)
        if self._given.oracle is not None and self._info.logprobs and self._info.token_ids:
            pairs = zip(asked, together, strict=True)
            return self._near(
                "two-adapters", promise, max(x for (_, _, name), s in pairs for x in self._deviations(s, 1.0, name))
            )
        by_name = [[_outputs(s) for (_, _, n), s in zip(asked, together, strict=True) if n == name] for name in names]
        faults = ["two of them answer all alike"] if any(a == b for a, b in pairwise(by_name)) else []
        return check("two-adapters", promise, faults, "Keep apart what belongs to different adapters.")

    async def too_long(self) -> Check:
        promise = "a prompt over the model's context is refused with PromptError"
        if self._given.context is None:
            return check("too-long", promise, [], "", applies=False)
        faults = await self._refused(PromptError, "too-long", prompt="a b " * self._given.context)
        return check("too-long", promise, faults, "Count the prompt's tokens, and refuse instead of cutting.")

    async def close(self) -> Check:
        promise = "closing ends calls that wait: with an answer or with EngineError"
        tasks = [asyncio.create_task(self._ask(f"close-{i}", p, n=4)) for i, p in enumerate(PROMPTS)]
        await asyncio.sleep(0)
        await self._engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [
            f"one raised {type(r).__name__}"
            for r in results
            if isinstance(r, BaseException) and not isinstance(r, EngineError)
        ]
        return check("close", promise, faults, "Fail what waits when the engine is closed.")


def _content(output: Output) -> tuple[bytes, str]:
    return output.token_ids, output.text


def _same(one: Sequence[Output], other: Sequence[Output]) -> bool:
    return [_content(o) for o in one] == [_content(o) for o in other]


def _prompt(sampled: Sampled) -> tuple[int, ...]:
    return sampled.prompt_ids


def _outputs(sampled: Sampled) -> list[tuple[bytes, str]]:
    return [_content(o) for o in sampled.outputs]


def _paired(
    found: Sequence[Sampled], expected: Sequence[Sampled], by: Callable[[Sampled], object]
) -> list[tuple[int, Sampled]]:
    """Those found, with their numbers, that differ from what is expected of them, which repeats."""
    return [(i, s) for i, s in enumerate(found) if by(s) != by(expected[i % len(expected)])]
