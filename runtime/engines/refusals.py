"""What engines refuse, and how they say so: one text for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bascule.plugins.engine import SampleRequest
from bascule.schemas.errors import BasculeError, EngineError, PromptError

#: What to do about an adapter whose files are not usable.
PUBLISH = "Publish the adapter again in PEFT's layout (adapter_config.json, adapter_model.safetensors)."


def cannot_start(model: str, error: BasculeError) -> EngineError:
    """Of a start that ``error`` ended."""
    return EngineError(f"The engine cannot start with {model!r}: {error.message}", next_step=error.next_step)


def not_started() -> EngineError:
    """Of a call before ``start``."""
    return EngineError("The engine is not started.", next_step="Await start() first.")


def closed() -> EngineError:
    """Of a call that was open when the engine closed."""
    return EngineError("The engine was closed before it answered.", next_step="Start the engine again.")


def no_adapters(engine: str, name: str) -> EngineError:
    """Of an adapter, by an engine that takes none."""
    return EngineError(
        f"The engine {engine!r} takes no adapters, and {name!r} is one.",
        next_step="Leave the weights out of --levers, or use the engine 'transformers' or 'vllm'.",
    )


def other_content(name: str) -> EngineError:
    """Of an adapter whose name another one has."""
    return EngineError(
        f"An adapter with other content is already loaded as {name!r}.",
        next_step="Give every version of an adapter a name of its own.",
    )


def not_loaded(who: str, adapter: str, loaded: Iterable[str]) -> EngineError:
    """Of an adapter that a call asks for; ``loaded`` are those that it may."""
    known = ", ".join(sorted(loaded)) or "none"
    return EngineError(
        f"{who} asks for the adapter {adapter!r}, which is not loaded (loaded: {known}).",
        next_step="Load the adapter before it is asked for.",
    )


def refused_prompt(error: BasculeError) -> PromptError:
    """Of a call that an endpoint refused, although it takes a plain one: what was asked of it is to blame."""
    return PromptError(error.message, next_step="Ask otherwise; the endpoint answers a plain question.")


def caller(request: SampleRequest) -> str:
    """Who asks, for a message."""
    return f"Call {request.call} of {request.trajectory!r}"


def check_size(request: SampleRequest, prompt: Sequence[int], context: int) -> None:
    """Refuse what cannot be computed.

    Args:
        prompt: its token ids.
        context: most tokens of a prompt and its answer.

    Raises:
        PromptError: the prompt is empty or too long, or no sample is asked for.
    """
    size, wanted = len(prompt), request.sampling.max_tokens
    if size + wanted > context:
        raise PromptError(
            f"{caller(request)} has {size} prompt tokens and asks for {wanted} more: over the context of {context}.",
            next_step="Shorten the prompt or lower max_tokens.",
        )
    if not size or request.n < 1:
        raise PromptError(
            f"{caller(request)} has {size} prompt tokens and asks for {request.n} samples.",
            next_step="Ask for at least one sample of a prompt that is not empty.",
        )
