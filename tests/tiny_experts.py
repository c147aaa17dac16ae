"""Mixture-of-experts models of a few kB with random weights, in the layouts that experts are stacked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERTS = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
#: Model types: the first has its experts as [experts, in, out], the second as [experts, out, in].
LAYOUTS = ("gpt_oss", "qwen3_moe")


def make_tiny_experts(model_type: str, folder: Path, **settings: Any) -> Path:
    """Write a model of 2 layers with 4 experts each, 2 of them at a time, and no tokenizer; always the same bytes.

    gpt-oss has one layer of each kind of attention. ``settings`` are of the model's configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    own: dict[str, dict[str, Any]] = {
        "gpt_oss": {
            "num_local_experts": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    }
    config = AutoConfig.for_model(model_type, **sizes, **own[model_type], **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder
