"""How a model family's conversations become tokens, and its tokens an answer; see the table of presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from bascule.plugins.engine import Message, before_stop
from bascule.runtime.engines.presets import Preset
from bascule.schemas.errors import PromptError
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

    def read(self, output: Output, sampling: Sampling, prompt: tuple[Message, ...] | str) -> Output:
        """An output whose text is the answer alone, up to the first stop string; all its tokens are kept."""
        if not self._preset.harmony and not self._preset.thinking_ends:
            return output
        if self._preset.harmony:
            from bascule.runtime.engines.harmony import final_text

            text = final_text(unpack_ids(output.token_ids))
        else:
            text = self._preset.said(output.text, opened=self._preset.thinks and not isinstance(prompt, str))
        cut = before_stop(text, sampling.stop)
        return replace(output, text=text) if cut is None else replace(output, text=cut, finish_reason="stop")


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as endpoints and chat templates take them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def encoded(
    tokenizer: Any, prompt: tuple[Message, ...] | str, template: Mapping[str, Any], model: str
) -> tuple[int, ...]:
    """Token ids of a raw text, or of a chat with its generation prompt by the tokenizer's own template.

    Args:
        tokenizer: of transformers, or like one.
        template: arguments for the chat template.
        model: as messages call it.

    Raises:
        PromptError: there is no chat template, or it refuses the chat.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    if not getattr(tokenizer, "chat_template", True):  # not every tokenizer of vLLM has the attribute
        what = f"There is no chat template of {model}."
        raise PromptError(what, next_step="Use completion calls, or an instruct model.")
    try:
        text = tokenizer.apply_chat_template(plain(prompt), tokenize=False, add_generation_prompt=True, **template)
    except Exception as error:  # a template is code of the model's
        what = f"The chat template of {model} refuses the prompt: {error}."
        raise PromptError(what, next_step="Send the roles that the template takes, in its order.") from error
    return tuple(tokenizer.encode(text, add_special_tokens=False))
