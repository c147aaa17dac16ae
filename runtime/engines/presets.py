"""What differs between model families: how a chat is rendered, and what of an answer is the answer.

One small table. The engines ``transformers`` and ``vllm`` render and read by it, ``openai`` only reads: there the
endpoint renders. The doctor sees in it which package a family needs. A family is known by the model's name, or by
``model_type`` in its ``config.json``; what is in no row is served by its own chat template as it is.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One family.

    Attributes:
        family: its name.
        names: what its models' names contain, as a regular expression.
        types: its ``model_type`` in ``config.json``.
        harmony: conversations have OpenAI's harmony format; rendered and parsed by ``openai-harmony``.
        template: arguments that its chat template takes, and their values where nobody says otherwise.
        thinking_ends: what separates thinking from the answer; all tokens are kept.
        thinks: whether its template opens the thinking, so that an answer to a chat which does not end it is thinking.
    """

    family: str
    names: str
    types: tuple[str, ...] = ()
    harmony: bool = False
    template: dict[str, Any] = {}
    thinking_ends: str = ""
    thinks: bool = False

    def said(self, text: str, *, opened: bool = False) -> str:
        """The answer in a text: what follows the thinking, where there was some; nothing where that did not end.

        Args:
            opened: the text goes on from within the thinking.
        """
        if not self.thinking_ends:
            return text
        if self.thinking_ends not in text:
            begun = opened or text.lstrip().startswith(self.thinking_ends.replace("/", ""))
            return "" if begun else text
        return text.partition(self.thinking_ends)[2].lstrip("\n")


PRESETS: tuple[Preset, ...] = (
    Preset(
        family="gpt-oss",
        names=r"gpt-oss-(20|120)b",
        types=("gpt_oss",),
        harmony=True,
        template={"reasoning_effort": "low"},
    ),
    Preset(
        family="Qwen3-Thinking", names=r"qwen3(?!.*non?-thinking).*-thinking", thinking_ends="</think>", thinks=True
    ),
    Preset(
        family="Qwen3",
        names=r"qwen3(?!-(embedding|reranker))",
        types=("qwen3", "qwen3_moe"),
        template={"enable_thinking": False},
        thinking_ends="</think>",
    ),
)
PLAIN = Preset(family="", names=r"(?!)")


def preset_of(model: str, folder: Path | None = None) -> Preset:
    """The row for a model, by its name, or by the configuration in its folder; :data:`PLAIN` if there is none."""
    kind = _model_type(folder) if folder is not None else ""
    for preset in PRESETS:
        if kind in preset.types or re.search(preset.names, model, re.IGNORECASE):
            return preset
    return PLAIN


@lru_cache(maxsize=32)
def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_bytes()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""
