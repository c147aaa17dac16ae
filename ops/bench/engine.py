"""The embedded engine against ``model.generate``, on short answers to prompts that share a system prompt.

And how late the event loop is while many episodes ask the engine: a task sleeps a little, again and again, and measures
when it comes back.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from typing import Any

from bascule.plugins.engine import Message, SampleRequest
from bascule.runtime.engines.transformers import TransformersEngine, make
from bascule.schemas.trajectory import Sampling, unpack_ids
from bascule.trainers.base_model import DEFAULT_MODEL
from ops.bench.report import Figure, figure

PROMPTS = 64
NEW_TOKENS = 8
EPISODES = 256
CALLS = 3
TICK = 0.005
LATEST = 0.050  # seconds that the loop may be late at the 99th percentile
SYSTEM = (
    "You are a careful calculator. Read the question, work out the result, and answer with the number alone: "
    "no words, no units, no explanation, and no punctuation after the number."
)


def requests() -> list[SampleRequest]:
    """The greedy requests of the benchmark."""
    return [
        SampleRequest(
            trajectory=f"bench-{i:04d}-n0",
            call=0,
            prompt=(Message("system", SYSTEM), Message("user", f"What is {17 * i % 90 + 3} + {29 * i % 80 + 5}?")),
            n=1,
            sampling=Sampling(temperature=0, max_tokens=NEW_TOKENS),
            seed=0,
        )
        for i in range(PROMPTS)
    ]


def generate(model: Any, prompts: list[tuple[int, ...]], pad: int) -> list[list[int]]:
    """The baseline: one left-padded batch through transformers' own generate."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=pad)
    return [row[longest:].tolist() for row in out]


def run(model_name: str = DEFAULT_MODEL, repeats: int = 5) -> tuple[dict[str, Figure], list[str]]:
    """Measure in turns, prefixes forgotten before each, and compare the greedy answers.

    Raises:
        AssertionError: an answer differs from the baseline's.
    """
    return asyncio.run(_run(model_name, repeats))


async def lateness(engine: TransformersEngine) -> tuple[list[float], float]:
    """Seconds that the loop was late each time, and the seconds of it all, with many episodes of several calls."""
    late: list[float] = []

    async def episode(number: int) -> None:
        said = ""
        for call in range(CALLS):
            question = f"What is {17 * number % 90 + 3} + {29 * number % 80 + call}?"
            request = SampleRequest(
                trajectory=f"bench-{number:04d}-n0",
                call=call,
                prompt=(Message("system", SYSTEM), Message("user", f"{said}{question}")),
                n=1,
                sampling=Sampling(temperature=1.0, max_tokens=NEW_TOKENS),
                seed=number,
            )
            said = f"{(await engine.sample(request)).outputs[0].text} "

    async def ticks() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    ticking = asyncio.create_task(ticks())
    start = time.perf_counter()
    await asyncio.gather(*(episode(i) for i in range(EPISODES)))
    seconds = time.perf_counter() - start
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)
    return late, seconds


async def _run(model_name: str, repeats: int) -> tuple[dict[str, Figure], list[str]]:
    from bascule.trainers.base_model import load_model, resolve_model

    engine = make(model_name, {})
    assert isinstance(engine, TransformersEngine)
    info = await engine.start()
    baseline_model = load_model(resolve_model(model_name))
    asked = requests()
    prompts = [engine.encode(r.prompt) for r in asked]
    pad = int(baseline_model.generation_config.pad_token_id or 0)
    ours: list[float] = []
    theirs: list[float] = []
    equal = 0
    for turn in range(repeats + 1):
        engine.forget()
        start = time.perf_counter()
        answers = await asyncio.gather(*(engine.sample(r) for r in asked))
        middle = time.perf_counter()
        expected = generate(baseline_model, prompts, pad)
        end = time.perf_counter()
        got = [unpack_ids(a.outputs[0].token_ids) for a in answers]
        equal = sum(g == e[: len(g)] for g, e in zip(got, expected, strict=True))
        assert equal == PROMPTS, f"only {equal} of {PROMPTS} greedy answers equal those of generate"
        if turn:  # the first turn warms up
            ours.append(PROMPTS / (middle - start))
            theirs.append(PROMPTS / (end - middle))
    late, seconds = await lateness(engine)
    await engine.close()
    middle_of, worst = (statistics.quantiles(late, n=100)[i] for i in (49, 98))
    name = f"generate, batch of {PROMPTS}"
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    figures = {
        "engine": figure(ours, "prompts/s", baseline=name, ratio=ratio),
        "generate": figure(theirs, "prompts/s"),
        "event loop late, p50": figure([middle_of], "s"),
        "event loop late, p99": figure([worst], "s"),
        "calls of episodes": figure([EPISODES * CALLS / seconds], "calls/s"),
        "peak_memory": figure([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], "GiB, both models"),
    }
    tokens = sum(map(len, prompts)) / PROMPTS
    notes = [] if worst <= LATEST else [f"UNDER: the loop is {worst * 1e3:.0f} ms late at the 99th percentile."]
    return figures, [
        *notes,
        f"{EPISODES} episodes of {CALLS} calls at a time: {len(late)} ticks, the latest {max(late) * 1e3:.0f} ms late.",
        f"{equal} of {PROMPTS} greedy answers equal; prompts of {tokens:.0f} tokens, {NEW_TOKENS} new at most.",
        f"{info.model}, {', '.join(f'{k} {v}' for k, v in info.versions.items())}; prefixes are cold in each turn.",
    ]
