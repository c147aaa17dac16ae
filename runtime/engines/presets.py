"""What differs between model families: how a chat is rendered, what ends an answer, what of it is the answer.

One small table, which engines and the doctor read. A family is known by the model's name, or by ``model_type`` in its
``config.json``; what is in no row is served by its own chat template as it is.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

#: What the attention and the feed-forward layers of a Llama-like model are called.
LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One family.

    Attributes:
        family: its name.
        names: what its models' names contain, as a regular expression.
        types: its ``model_type`` in ``config.json``.
        harmony: conversations have OpenAI's harmony format; rendered and parsed by ``openai-harmony``.
        template: arguments that its chat template takes, and their values where nobody says otherwise.
        ends: tokens that end an answer, for people; engines read them from the model's files.
        thinking_ends: what separates thinking from the answer; all tokens are kept.
        lora_target_modules: what adapters change where nothing is said.
        lora_target_parameters: stacks of experts that they can change.
        note: what a person should know.
    """

    family: str
    names: str
    types: tuple[str, ...] = ()
    harmony: bool = False
    template: dict[str, Any] = {}
    ends: tuple[str, ...] = ()
    thinking_ends: str = ""
    lora_target_modules: tuple[str, ...] = LINEAR
    lora_target_parameters: tuple[str, ...] = ()
    note: str = ""

    def said(self, text: str) -> str:
        """The answer in a text: what follows the thinking, where there was some; nothing where that did not end."""
        if not self.thinking_ends:
            return text
        if self.thinking_ends not in text:
            return "" if text.lstrip().startswith(self.thinking_ends.replace("/", "")) else text
        return text.partition(self.thinking_ends)[2].lstrip("\n")


PRESETS: tuple[Preset, ...] = (
    Preset(
        family="gpt-oss",
        names=r"gpt-oss-(20|120)b",
        types=("gpt_oss",),
        harmony=True,
        template={"reasoning_effort": "low"},
        ends=("<|return|>", "<|call|>"),
        lora_target_modules=("k_proj", "o_proj", "q_proj", "v_proj"),
        lora_target_parameters=("mlp.experts.down_proj", "mlp.experts.gate_up_proj"),
        note="Channels: analysis is thought, final is the answer. Give max_tokens room for both.",
    ),
    Preset(
        family="Qwen3",
        names=r"qwen3(?!-(embedding|reranker))",
        types=("qwen3", "qwen3_moe"),
        template={"enable_thinking": False},
        ends=("<|im_end|>", "<|endoftext|>"),
        thinking_ends="</think>",
        note="engine.params.template.enable_thinking = true turns thinking on; give max_tokens room for it.",
    ),
    Preset(
        family="SmolLM2",
        names=r"smollm2",
        ends=("<|im_end|>", "<|endoftext|>"),
        note="Its template adds a system message of its own where a chat has none.",
    ),
)
PLAIN = Preset(family="", names=r"(?!)", note="Served by its own chat template.")


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
