"""Small models of many architectures."""

from __future__ import annotations

from typing import Any

import torch

ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Mixtral": {**EXPERTS, "sliding_window": 5},
    "Phi3": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Gemma3": {"sliding_window": 5, "layer_types": ALTERNATING},
    "Olmo3": {"sliding_window": 5, "layer_types": ALTERNATING},
    "SmolLM3": {},
    "GPTNeoX": {},
    "Phimoe": {"num_local_experts": 4, "sliding_window": 5},
    "Starcoder2": {"sliding_window": 5},
    "GptOss": {**EXPERTS, "sliding_window": 5, "layer_types": ALTERNATING},
}


def tiny(kind: str, **more: Any) -> Any:
    """A model of two small layers of some architecture, with weights large enough for tokens to matter."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**{**shape, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
