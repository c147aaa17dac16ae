"""How a model family's conversations become tokens, and its tokens an answer; see the table of presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from bascule.plugins.engine import Message, before_stop
from bascule.runtime.engines.presets import Preset
from bascule.schemas.trajectory import Output, Sampling, unpack_ids


class Form:
    """A preset with the arguments that a configuration gives its template.

    Attributes:
        template: arguments for the chat template.
    """

    def __init__(self, preset: Preset, template: Mapping[str, Any]) -> None:
        self._preset = preset
        self.template: dict[str, Any] = {**preset.template, **template}

    def check(self) -> None:
        """See that what the form needs is there.

        Raises:
            EngineError: openai-harmony or its vocabulary is missing.
        """
        if self._preset.harmony:
            from bascule.runtime.engines.harmony import stop_tokens

            stop_tokens()

    def rendered(self, prompt: tuple[Message, ...] | str) -> tuple[int, ...] | None:
        """Token ids of a chat that is rendered here; None for what the model's own template and tokenizer do.

        Raises:
            PromptError: the format does not have the chat.
        """
        if not self._preset.harmony or isinstance(prompt, str):
            return None
        from bascule.runtime.engines.harmony import render

        return render(prompt, str(self.template.get("reasoning_effort", "low")))

    def asked(self, sampling: Sampling) -> tuple[Sampling, tuple[int, ...]]:
        """What to ask of the model, and the tokens that end an answer besides its own.

        Stop strings are for the answer and not for what is thought before it, so they are looked for afterwards.
        """
        if not self._preset.harmony:
            return sampling if not self._preset.thinking_ends else replace(sampling, stop=()), ()
        from bascule.runtime.engines.harmony import stop_tokens

        return replace(sampling, stop=()), stop_tokens()

    def read(self, output: Output, sampling: Sampling) -> Output:
        """An output whose text is the answer alone, up to the first stop string; all its tokens are kept."""
        if not self._preset.harmony and not self._preset.thinking_ends:
            return output
        if self._preset.harmony:
            from bascule.runtime.engines.harmony import final_text

            text = final_text(unpack_ids(output.token_ids))
        else:
            text = self._preset.said(output.text)
        cut = before_stop(text, sampling.stop)
        return replace(output, text=text) if cut is None else replace(output, text=cut, finish_reason="stop")
