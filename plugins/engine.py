"""The engine protocol: who samples tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from bascule.schemas.trajectory import Output, Sampling


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """What stands before the first stop string of a text; None where none is in it."""
    cuts = [at for at in map(text.find, filter(None, stops)) if at >= 0]
    return text[: min(cuts)] if cuts else None


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``n`` continuations of one prompt.

    Attributes:
        trajectory: who asks, ``<evaluation>-<position>-n<sample>``; a cassette looks its answer up by it.
        call: ordinal of the model call within the trajectory.
        prompt: chat messages, or the text of a raw completion.
        n: number of samples.
        sampling: temperature, token limit, stop strings.
        seed: the answer depends on it and on the prompt alone, up to floating-point differences between batch shapes.
        adapter: name of a loaded adapter, or None for the base model.
    """

    trajectory: str
    call: int
    prompt: tuple[Message, ...] | str
    n: int
    sampling: Sampling
    seed: int
    adapter: str | None = None


def asked(request: SampleRequest) -> str:
    """Digest of what a request asks: prompt, number of samples, sampling. Compared before an answer is given."""
    text = msgspec.json.encode((request.prompt, request.n, request.sampling), order="sorted")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The exact prompt that the model saw, and the outputs in order.

    Attributes:
        usage: tokens of the prompt and of all outputs, from an engine that counts them and does not give their ids.
    """

    prompt_ids: tuple[int, ...]
    outputs: tuple[Output, ...]
    usage: tuple[int, int] | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a run records of its engine: enough to tell whether two runs used the same model, and what it can.

    Attributes:
        token_ids: answers hold the exact token ids of prompt and outputs.
        logprobs: outputs hold the log-probability of every token at the sampling temperature.
        seeds: the answer depends on the request's seed.
        adapters: LoRA adapters can be loaded.
    """

    name: str
    model: str
    model_digest: str
    versions: dict[str, str] = {}
    token_ids: bool = True
    logprobs: bool = True
    seeds: bool = True
    adapters: bool = True


#: The fields of :class:`EngineInfo` that say what an engine can.
CAPABILITIES = ("token_ids", "logprobs", "seeds", "adapters")


class Engine(Protocol):
    """An inference engine. Methods are called on the event loop; the model must compute off it."""

    async def start(self) -> EngineInfo:
        """Load what is needed.

        Raises:
            EngineError: the model is missing or not usable, with the next step.
        """
        ...

    async def close(self) -> None: ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make a LoRA adapter (PEFT's layout) available under ``name`` without a restart; idempotent by name."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Free an adapter that nobody asks for any more; harmless if it is not loaded."""
        ...

    async def sample(self, request: SampleRequest) -> Sampled:
        """Sample ``request.n`` outputs. Concurrent calls are batched.

        Raises:
            EngineError: the adapter is unknown, or the prompt is longer than the model's context.
        """
        ...


@runtime_checkable
class Scoring(Protocol):
    """An engine that says how likely given tokens are, so that a probe can tell what an adapter serves."""

    async def score(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """Log-probabilities at temperature 1 of each of ``ids`` but the first, after those before it.

        Args:
            adapter: a loaded one, None for the base model.
            ids: two or more, within the model's context.

        Returns:
            One tuple for each copy of the model that answers requests; all are asked.

        Raises:
            EngineError: the adapter is not loaded, or a copy does not answer.
        """
        ...


def cannot(engine: Engine) -> frozenset[str]:
    """What an engine can not, whatever its start finds: names of :class:`EngineInfo`'s capabilities, known before."""
    return frozenset(getattr(engine, "cannot", ()))


class EngineFactory(Protocol):
    """Makes an engine from a model name and parameters; heavy imports belong inside."""

    def __call__(self, model: str, params: dict[str, Any]) -> Engine: ...
