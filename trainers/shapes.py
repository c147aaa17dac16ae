"""Sizes of causal language models, from their ``config.json``, and of some well-known ones before they are fetched.

The built-in sizes are those of the models' published ``config.json``; the parameters that follow from them are as many
as their makers say (gpt-oss: arXiv 2508.10925, table 1; Qwen3: arXiv 2505.09388; SmolLM2: arXiv 2502.02737).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from bascule.schemas.errors import ConfigError


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What memory depends on, of a decoder with a gated feed-forward part in each layer.

    Attributes:
        intermediate: width of the feed-forward part, of one expert's where there are experts.
        tied: the output embedding is the input embedding.
        context: most tokens of a sequence.
        qkv_bias, o_bias, mlp_bias: of the attention's and the feed-forward part's linear layers, experts included.
        qk_norm: queries and keys have a norm of ``head_dim`` weights each.
        sinks: attention has a weight per head beside its keys, and computes its scores in full.
        experts: in each layer; 0 for a dense model.
        experts_per_token: how many of them compute a token.
        router_bias: of the router.
        window: tokens that a layer with a window sees, 0 without.
        windowed: layers with a window.
        mxfp4: the published weights of the experts are in MXFP4, 4.25 bits each.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    context: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    experts: int = 0
    experts_per_token: int = 0
    router_bias: bool = False
    window: int = 0
    windowed: int = 0
    mxfp4: bool = False


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 8, **more: Any) -> Shape:
    known = {"vocab": 151_936, "head_dim": 128, "context": 40_960, "qk_norm": True, "tied": False}
    sizes = {"hidden": hidden, "intermediate": intermediate, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return Shape(**{**known, **sizes, **more})


def _gpt_oss(layers: int, experts: int) -> Shape:
    return Shape(
        vocab=201_088,
        hidden=2880,
        layers=layers,
        heads=64,
        kv_heads=8,
        head_dim=64,
        intermediate=2880,
        tied=False,
        context=131_072,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        sinks=True,
        experts=experts,
        experts_per_token=4,
        router_bias=True,
        window=128,
        windowed=layers // 2,
        mxfp4=True,
    )


def _smollm2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Shape:
    return Shape(
        vocab=49_152,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        intermediate=intermediate,
        tied=True,
        context=8192,
    )


#: By the last part of the model's name, in lower case.
KNOWN: Mapping[str, Shape] = {
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
    "qwen3-30b-a3b": _qwen3(2048, 768, 48, 32, 4, experts=128, experts_per_token=8),
    "smollm2-135m-instruct": _smollm2(576, 1536, 30, 9, 3),
    "smollm2-360m-instruct": _smollm2(960, 2560, 32, 15, 5),
    "smollm2-1.7b-instruct": _smollm2(2048, 8192, 24, 32, 32),
}

#: Types of which :func:`shape_of_config` knows how the configuration names sizes, and what their layers have.
_TYPES: Mapping[str, Mapping[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gpt_oss": {"mlp_bias": True, "sinks": True, "router_bias": True},
}


def known_shape(model: str) -> Shape | None:
    """The sizes of a built-in model by name (``Qwen/Qwen3-8B``, ``smollm2-135m-instruct``); None for others."""
    name = model.rpartition("/")[2].lower()
    return KNOWN.get(name) or KNOWN.get(f"{name}-instruct")


def shape_of_folder(folder: Path) -> Shape:
    """The sizes of the model in a folder, from its ``config.json``.

    Raises:
        ConfigError: the file is missing or no JSON, or as :func:`shape_of_config`.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.", next_step="Name a Hugging Face model folder.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is no JSON object.", next_step="Name a Hugging Face model folder.")
    return shape_of_config(config)


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The sizes that a Hugging Face configuration gives.

    Raises:
        ConfigError: the model type is none of those that are known here, or a size is missing.
    """
    kind = str(config.get("model_type"))
    if kind not in _TYPES:
        raise ConfigError(
            f"How large a model of type {kind!r} is in memory is not known here.",
            next_step=f"Known are {', '.join(sorted(_TYPES))}.",
        )
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    heads, hidden, layers = (_size(config, f"{n}") for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    bias = bool(config.get("attention_bias"))
    window, windowed = _window(config, kind, layers)
    has = _TYPES[kind]
    return Shape(
        vocab=_size(config, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=_size(config, "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        context=_size(config, "max_position_embeddings"),
        qkv_bias=has.get("qkv_bias", bias),
        o_bias=has.get("o_bias", bias and kind != "qwen2"),
        mlp_bias=has.get("mlp_bias", bool(config.get("mlp_bias"))),
        qk_norm=has.get("qk_norm", False),
        sinks=has.get("sinks", False),
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 0) if experts else 0,
        router_bias=has.get("router_bias", False),
        window=window,
        windowed=windowed,
        mxfp4=(config.get("quantization_config") or {}).get("quant_method") == "mxfp4",
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    found = config.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(
            f"The model's configuration gives {found!r} as {name}.", next_step="Correct the model's config.json."
        )
    return found


def _window(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int, int]:
    """Tokens that a layer with a window sees, and how many have one."""
    window = config.get("sliding_window")
    if not window or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return 0, 0
    kinds = config.get("layer_types")
    if kinds:
        return int(window), sum(k == "sliding_attention" for k in kinds)
    return int(window), layers // 2 if kind == "gpt_oss" else layers
