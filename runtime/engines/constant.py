"""An engine that always answers the same: what a harness reaches without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest, before_stop
from bascule.schemas.errors import ConfigError
from bascule.schemas.trajectory import Output


class ConstantEngine:
    """Answers every request with ``text``; has no tokens and no log-probabilities."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def start(self) -> EngineInfo:
        return EngineInfo(
            name="constant",
            model="constant",
            model_digest="",
            token_ids=False,
            logprobs=False,
            seeds=False,
            adapters=False,
        )

    async def close(self) -> None:
        pass

    async def load_adapter(self, name: str, folder: Path) -> None:
        del name, folder

    async def unload_adapter(self, name: str) -> None:
        del name

    async def sample(self, request: SampleRequest) -> Sampled:
        cut = before_stop(self._text, request.sampling.stop)
        output = Output(token_ids=b"", logprobs=b"", text=self._text if cut is None else cut)
        return Sampled(prompt_ids=(), outputs=(output,) * request.n)


def make(model: str, params: dict[str, Any]) -> Engine:
    """``params["text"]`` is the answer.

    Raises:
        ConfigError: there is none, or it is not text.
    """
    del model
    text = params.get("text")
    if not isinstance(text, str):
        found = "there is none" if text is None else f"{text!r} is of type {type(text).__name__}"
        raise ConfigError(
            f"The engine constant needs the parameter text, and {found}.",
            next_step="Set engine.params.text to the answer; in quotes where it looks like a number.",
        )
    return ConstantEngine(text)
