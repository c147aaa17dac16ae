"""Merged weights are those of PEFT's own merge, whatever order adapters come and go in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from bascule.runtime.engines.adapters import Adapters, read_adapter
from bascule.schemas.errors import EngineError
from bascule.trainers.base_model import load_model
from bascule.trainers.lora import CONFIG, WEIGHTS, adapter_files, attach_lora
from bascule.trainers.params import TrainParams
from tests.oracles import within
from tests.tiny_experts import EXPERTS, LAYOUTS, make_tiny_experts
from tests.tiny_model import make_tiny_model

ALL = ("llama", *LAYOUTS)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASCULE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=ALL)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny_model(folder) if request.param == "llama" else make_tiny_experts(request.param, folder)


def adapted(base: Path, seed: int = 0, **params: Any) -> Any:
    """A model with a random adapter, of the experts too where there are some."""
    experts = EXPERTS if any(p.ndim == 3 for p in load_model(base).parameters()) else ()
    settings = {"lora_r": 4, "lora_alpha": 8.0, "lora_target_parameters": experts, **params}
    model = attach_lora(load_model(base), TrainParams(**settings), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def write(model: Any, folder: Path) -> Path:
    folder.mkdir()
    for name, data in adapter_files(model).items():
        (folder / name).write_bytes(data)
    return folder


def merged_by_peft(model: Any) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own merge gives; it changes them in place, so on memory of their own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return dict(model.merge_and_unload().named_parameters())


def test_merged_weights_are_those_of_pefts_merge(base: Path, tmp_path: Path) -> None:
    served = load_model(base)
    plain = {name: p.clone() for name, p in served.named_parameters()}
    adapters = Adapters(served)
    adapters.add(read_adapter("a", write(adapted(base), tmp_path / "a"), served))
    adapters.activate("a")
    expected = merged_by_peft(adapted(base))
    ours = dict(served.named_parameters())
    assert set(ours) == set(expected)
    changed = {name for name in plain if not torch.equal(ours[name], plain[name])}
    assert changed == {name for name in plain if not torch.equal(expected[name], plain[name])}
    assert len(changed) == 2 * (7 if served.config.model_type == "llama" else 6)
    deviation = max(float((ours[name] - expected[name]).abs().max()) for name in ours)
    within(f"merged weights, {load_model(base).config.model_type}", "PEFT merge_and_unload", deviation, 1e-6)
    adapters.activate(None)
    assert all(torch.equal(p, plain[name]) for name, p in served.named_parameters())


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_adapters_that_come_and_go_answer_as_the_only_one_would(base: Path, tmp_path: Path, kept: int) -> None:
    """The memory of one that is dropped is written over by the next."""
    names = "abcd"
    other_targets = {"lora_target_modules": ("q_proj",), "lora_target_parameters": ()}
    models = {n: adapted(base, i, **(other_targets if n == "c" else {})) for i, n in enumerate(names)}
    folders = {n: write(m, tmp_path / n) for n, m in models.items()}
    ids = torch.arange(1, 17)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=ids).logits
        return found

    served = load_model(base)
    expected: dict[str | None, torch.Tensor] = {None: logits(load_model(base))}
    for name, folder in folders.items():
        alone = Adapters(served)
        alone.add(read_adapter(name, folder, served))
        alone.activate(name)
        expected[name] = logits(served)
        alone.activate(None)
        deviation = float((expected[name] - logits(models[name])).abs().max())
        within(f"logits of merged adapters, {load_model(base).config.model_type}", "PEFT", deviation, 1e-4)
    assert len({tuple(e.flatten().tolist()) for e in expected.values()}) == 5
    adapters = Adapters(served, kept)
    for step in ("a", "b", "-a", "c", "a", None, "-c", "d", "b", "-d", "-b", "a", "c", "d", "b", "-c", "c", None):
        if step and step[0] == "-":
            adapters.remove(step[1:])
            continue
        if step:
            adapters.add(read_adapter(step, folders[step], served))
        adapters.activate(step)
        assert torch.equal(logits(served), expected[step]), step


def test_a_dropped_copys_memory_is_used_again(base: Path, tmp_path: Path) -> None:
    served = load_model(base)
    adapters = Adapters(served)
    first, second = (read_adapter(n, write(adapted(base, i), tmp_path / n), served) for i, n in enumerate("ab"))
    adapters.add(first)
    adapters.activate("a")
    before = {p.data_ptr() for p in served.parameters()}
    adapters.remove("a")
    adapters.add(second)
    adapters.activate("b")
    assert {p.data_ptr() for p in served.parameters()} == before


@pytest.mark.parametrize("damage", ["nested", "untargeted", "shape", "nan", "base", "pickle"])
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path, damage: str) -> None:
    folder = write(adapted(base), tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    metadata = {"format": "pt"}
    key = sorted(tensors)[0]
    words = key.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".base_layer")
    if damage == "nested":
        tensors[key.replace(".lora_", ".base_layer.base_layer.lora_")] = tensors.pop(key)
    elif damage == "untargeted":
        words = "model.layers.0.mlp.experts"
        tensors[f"base_model.model.{words}.lora_A.weight"] = torch.zeros(4, 4)
        config["target_parameters"] = None
    elif damage == "shape":
        tensors[key] = tensors[key][:-1]
    elif damage == "nan":
        tensors[key][0, 0] = torch.nan
    elif damage == "base":
        metadata["base"], words = "0" * 64, "base model 000000000000"
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, metadata)
    if damage == "pickle":
        torch.save(tensors, folder / WEIGHTS)
        words = str(folder)
    with pytest.raises(EngineError) as caught:
        read_adapter("bad", folder, load_model(base))
    assert words in caught.value.message
    assert "'bad'" in caught.value.message
    assert caught.value.next_step
