"""Estimates of memory: what is counted is what torch allocates, and what is published of known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.schemas.errors import ConfigError
from bascule.trainers import memory
from bascule.trainers.base_model import load_model
from bascule.trainers.fused import fuse
from bascule.trainers.lora import attach_lora, expert_parameters, linear_layers
from bascule.trainers.params import TrainParams
from bascule.trainers.shapes import KNOWN, Shape, known_shape, shape_of_config, shape_of_folder
from tests.tiny_experts import EXPERTS, LAYOUTS, make_tiny_experts
from tests.tiny_model import make_tiny_model

#: Parameters as their makers count them: gpt-oss by its model card, the others by their files.
PUBLISHED = {
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-instruct": 1_711_376_384,
}


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(params=["llama", *LAYOUTS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "llama":
        return make_tiny_model(tmp_path)
    return make_tiny_experts(request.param, tmp_path)


def test_the_parameters_of_known_models_are_as_many_as_published() -> None:
    assert {name: memory.parameters(shape).total for name, shape in KNOWN.items()} == PUBLISHED


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_weights_in_mxfp4_take_what_the_model_card_says(name: str, gib: float) -> None:
    assert round(memory.weight_bytes(KNOWN[name], 2, quantized=True) / memory.GIB, 1) == gib


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "openai/gpt-oss-20b", "HuggingFaceTB/SmolLM2-360M-Instruct"])
def test_a_known_model_is_found_by_its_usual_name(name: str) -> None:
    assert known_shape(name) is KNOWN[name.partition("/")[2].lower()]
    assert known_shape(f"{name}-of-mine") is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"])
def test_the_parameters_of_a_configuration_are_those_that_transformers_makes(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "attention_bias": True,
    }
    own = {"gpt_oss": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24}}
    if kind in ("qwen2", "mistral"):
        sizes.pop("head_dim")
        sizes.pop("attention_bias")
    config = AutoConfig.for_model(kind, **sizes, **own.get(kind, {}))
    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model = build(config)
    counts = memory.parameters(shape_of_config(config.to_dict()))
    assert counts.total == sum(p.numel() for p in model.parameters())
    stacks = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert counts.experts == stacks


def test_weights_adapter_gradients_and_optimizer_are_counted_as_torch_allocates_them(folder: Path) -> None:
    shape = shape_of_folder(folder)
    base = load_model(folder)
    assert memory.weight_bytes(shape, base.dtype.itemsize) == bytes_of(base.parameters())
    stacks = EXPERTS if shape.experts else ()
    params = TrainParams(lora_r=3, lora_target_parameters=stacks)
    names = {layer.name for layer in (*memory.attention_layers(shape), *memory.dense_layers(shape))}
    assert names == set(linear_layers(base))
    assert {layer.name for layer in memory.expert_layers(shape)} == {
        name for name in expert_parameters(base) if name in EXPERTS
    }
    trained = [p for p in attach_lora(base, params, seed=0).parameters() if p.requires_grad]
    adapter = memory.adapter_size(shape, 3, params.lora_target_modules, stacks)
    assert adapter == (sum(p.numel() for p in trained), len(trained))
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    found = memory.training_memory(shape, adapter, 64, base.dtype.itemsize, cuda=False)
    assert found.adapter == bytes_of(trained)
    assert found.gradients == bytes_of(p.grad for p in trained)
    assert found.optimizer == bytes_of(states)


def test_the_cache_is_counted_as_transformers_allocates_it(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    model: Any = load_model(folder)
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(3, 11, dtype=torch.long), use_cache=True).past_key_values
    held = bytes_of(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.cache_bytes(shape_of_folder(folder), 3, 11, model.dtype.itemsize) == held


def test_a_layer_with_a_window_keeps_no_more_than_that() -> None:
    shape = KNOWN["gpt-oss-20b"]
    token = 2 * 8 * 64 * 2
    assert memory.cache_bytes(shape, 1, 128, 2) == 24 * 128 * token
    assert memory.cache_bytes(shape, 2, 1128, 2) == 2 * (12 * 1128 + 12 * 128) * token


def test_a_target_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no 'c_attn'.*It has q_proj"):
        memory.adapter_size(KNOWN["qwen3-8b"], 8, ["c_attn"])
    with pytest.raises(ConfigError, match="none of this kind"):
        memory.adapter_size(KNOWN["qwen3-8b"], 8, None, EXPERTS)


def test_where_vllm_sleeps_the_larger_of_the_two_counts_and_not_the_sum() -> None:
    shape = KNOWN["gpt-oss-20b"]
    adapter = memory.adapter_size(shape, 16)
    serving = memory.vllm_memory(shape, rows=64, length=2048, adapter=adapter, adapters=2)
    training = memory.training_memory(shape, adapter, 2048, 2, cuda=True)
    both = memory.on_one_gpu(serving, training)
    assert max(serving.total, training.total) < both < serving.total + training.total


def test_one_process_holds_the_base_model_once() -> None:
    shape = KNOWN["smollm2-135m-instruct"]
    limits = {"rows": 256, "tokens": 1024, "kv_mib": 384, "prefix_tokens": 2048, "merged": 2}
    serving = memory.embedded_memory(shape, **limits, element=4, cuda=False)
    training = memory.training_memory(shape, memory.adapter_size(shape, 32), 2048, 4, cuda=False)
    both = memory.in_one_process(serving, training)
    assert both == serving.total + training.total - serving.weights - training.process


@pytest.mark.parametrize(("need", "said"), [(90, "fits"), (91, "tight"), (100, "tight"), (101, "does not fit")])
def test_what_takes_nearly_all_is_tight(need: int, said: str) -> None:
    assert memory.verdict(need, 100) == said


def test_a_longer_micro_batch_and_a_larger_model_take_more() -> None:
    def activations(name: str, nodes: int) -> int:
        return memory.activation_bytes(KNOWN[name], nodes, 2)

    assert activations("qwen3-8b", 1024) < activations("qwen3-8b", 2048) < activations("qwen3-32b", 2048)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "mamba"}, "type 'mamba'"), ({"hidden_size": "wide"}, "'wide' as hidden_size")],
)
def test_a_configuration_that_is_not_understood_says_why(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    make_tiny_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        shape_of_folder(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        shape_of_folder(tmp_path)


def test_the_embedded_model_has_the_sizes_that_are_known_of_it() -> None:
    from bascule.trainers.base_model import resolve_model

    found: Shape = shape_of_folder(resolve_model())
    assert found == KNOWN["smollm2-135m-instruct"]


def test_the_activations_that_a_pass_keeps_are_estimated_from_above_and_not_by_far(tmp_path: Path) -> None:
    folder, nodes = make_tiny_model(tmp_path), 128
    base: Any = load_model(folder)
    model = attach_lora(base, TrainParams(lora_r=2), seed=0).eval()
    fuse(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    mask = torch.zeros(1, 1, nodes, nodes)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        states = base.get_decoder()(input_ids=torch.ones(1, nodes, dtype=torch.long), attention_mask=mask)
    assert states.last_hidden_state.requires_grad
    measured = sum(size for storage, size in kept.items() if storage not in own)
    shape = shape_of_folder(folder)
    head = nodes * shape.vocab * 4 * memory.HEAD_COPIES + 2 * nodes * shape.hidden * 4
    estimate = memory.activation_bytes(shape, nodes, base.dtype.itemsize) - head
    assert measured < estimate < 2 * measured
