"""Adapter files: the same bytes for the same weights, and nothing read that was altered."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load as reference_load
from transformers import AutoModelForCausalLM

from bascule.schemas.errors import ConfigError, TrainError
from bascule.trainers.base_model import load_model, model_digest
from bascule.trainers.lora import (
    CONFIG,
    WEIGHTS,
    adapter_files,
    adapter_hash,
    adapter_tensors,
    attach_lora,
    check_adapter,
    load_adapter,
    with_adapter,
)
from bascule.trainers.params import TrainParams
from bascule.trainers.tensorfile import MAX_HEADER, read_header, read_tensors, write_tensors
from tests.tiny_experts import EXPERTS, LAYOUTS, make_tiny_experts

Files = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASCULE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def fresh(base: Path, seed: int = 0, **params: Any) -> PeftModel:
    return attach_lora(load_model(base), TrainParams(**{"lora_r": 4, "lora_alpha": 8.0, **params}), seed)


def moved(model: PeftModel) -> PeftModel:
    """The model with an adapter that is no longer a fresh one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def files(base: Path) -> Files:
    return adapter_files(moved(fresh(base)))


def test_a_fresh_adapter_follows_from_its_seed_whatever_torch_did_before(base: Path) -> None:
    one = adapter_files(fresh(base, seed=3))
    torch.rand(17)
    state = torch.random.get_rng_state()
    assert adapter_files(fresh(base, seed=3)) == one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert adapter_hash(adapter_files(fresh(base, seed=4))) != adapter_hash(one)


def test_every_linear_layer_but_the_head_is_adapted_and_only_adapters_are_trained(base: Path) -> None:
    model = fresh(base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all("lora_" in n for n in trained)
    assert not any("lm_head" in n or "embed" in n for n in trained)


def test_named_targets_alone_are_adapted(base: Path) -> None:
    model = fresh(base, lora_target_modules=("v_proj", "q_proj"))
    trained = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    assert json.loads(adapter_files(model)[CONFIG])["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"lora_target_modules": ("q_proj", "w7", "w8")}, ("names w7, w8,", "It has down_proj, gate_proj,")),
        ({"lora_target_modules": ("q_proj", "lm_head")}, ("names lm_head:", "cannot be served")),
        ({"lora_target_modules": ("embed_tokens",)}, ("names embed_tokens:", "cannot be served")),
        ({"lora_target_modules": ()}, ("nothing to train", "q_proj")),
        ({"lora_target_parameters": ("mlp.experts.down_proj",)}, ("names mlp.experts.down_proj,", "none of this kind")),
    ],
)
def test_unusable_targets_are_refused_with_what_there_is(
    base: Path, params: dict[str, Any], words: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        fresh(base, **params)
    assert all(w in f"{caught.value.message} {caught.value.next_step}" for w in words)


def test_dropout_acts_in_training_mode_alone_and_is_not_recorded(base: Path) -> None:
    model = moved(fresh(base, lora_dropout=0.5))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        still = [model.eval()(input_ids=ids).logits for _ in range(2)]
        noisy = [model.train()(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*noisy)
    assert adapter_files(model) == adapter_files(moved(fresh(base)))


def test_files_go_round_exactly(base: Path, files: Files) -> None:
    other = fresh(base, seed=9)
    load_adapter(other, files)
    assert adapter_files(other) == files


def test_the_adapter_that_a_job_continues_from_wins_over_its_parameters(base: Path) -> None:
    parent = adapter_files(moved(fresh(base, lora_r=2, lora_alpha=3.0, lora_target_modules=("o_proj",))))
    params = with_adapter(TrainParams(learning_rate=0.5), parent)
    model = attach_lora(load_model(base), params, seed=5)
    load_adapter(model, parent)
    assert adapter_files(model) == parent
    assert params.learning_rate == 0.5


def test_the_files_name_the_base_model_and_earlier_ones_that_do_not_are_still_read(base: Path, files: Files) -> None:
    assert read_header(files[WEIGHTS], "test")[1]["base"] == model_digest(base)
    config = json.loads(files[CONFIG])
    del config["target_parameters"]
    earlier = edited_header({**files, CONFIG: json.dumps(config).encode()}, lambda h: h["__metadata__"].pop("base"))
    model = fresh(base, seed=9)
    load_adapter(model, earlier)
    assert adapter_files(model) == files


def test_peft_and_safetensors_read_the_files_to_the_same_weights(base: Path, files: Files, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    ours = check_adapter(files)[1]
    theirs = adapter_tensors(loaded)
    reference = reference_load(files[WEIGHTS])
    assert set(ours) == set(theirs) == set(reference)
    assert all(torch.equal(ours[k], theirs[k]) and torch.equal(ours[k], reference[k]) for k in ours)


def edited_config(files: Files, **changes: Any) -> Files:
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changes}).encode()}


def edited_header(files: Files, edit: Callable[[dict[str, Any]], object]) -> Files:
    data = files[WEIGHTS]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return {**files, WEIGHTS: len(text).to_bytes(8, "little") + text + data[8 + length :]}


def edited_entry(files: Files, **changes: Any) -> Files:
    return edited_header(files, lambda h: h[sorted(h)[1]].update(changes))


def edited_weights(files: Files, edit: Callable[[dict[str, torch.Tensor]], object]) -> Files:
    tensors, metadata = read_tensors(files[WEIGHTS], "test")
    edit(tensors)
    return {**files, WEIGHTS: write_tensors(tensors, metadata)}


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


ALTERED: dict[str, Callable[[Files], Files]] = {
    "a pickle beside the weights": lambda f: {**f, "adapter_model.bin": pickle.dumps({})},
    "a pickle as the weights": lambda f: {**f, WEIGHTS: pickle.dumps({"a": 1})},
    "no weights": lambda f: {CONFIG: f[CONFIG]},
    "empty weights": lambda f: {**f, WEIGHTS: b""},
    "truncated data": lambda f: {**f, WEIGHTS: f[WEIGHTS][:-4]},
    "bytes after the data": lambda f: {**f, WEIGHTS: f[WEIGHTS] + b"\0"},
    "a header longer than the file": lambda f: {**f, WEIGHTS: (10**6).to_bytes(8, "little") + f[WEIGHTS][8:]},
    "a header over the limit": lambda f: {**f, WEIGHTS: (MAX_HEADER + 1).to_bytes(8, "little") + f[WEIGHTS][8:]},
    "a header that is no JSON": lambda f: {**f, WEIGHTS: (4).to_bytes(8, "little") + b"{{{{"},
    "a header that is a list": lambda f: {**f, WEIGHTS: (2).to_bytes(8, "little") + b"[]"},
    "a header nested too deep": lambda f: {**f, WEIGHTS: (10**5).to_bytes(8, "little") + b"[" * 10**5},
    "a tensor named twice": lambda f: {**f, WEIGHTS: (13).to_bytes(8, "little") + b'{"a":1,"a":2}'},
    "an unknown dtype": lambda f: edited_entry(f, dtype="I64"),
    "a dtype that does not fill the bytes": lambda f: edited_entry(f, dtype="F16"),
    "a shape that does not fill the bytes": lambda f: edited_entry(f, shape=[1, 1]),
    "a negative shape": lambda f: edited_entry(f, shape=[-4, -64]),
    "a boolean shape": lambda f: edited_entry(f, shape=[True]),
    "offsets outside the file": lambda f: edited_entry(f, data_offsets=[10**9, 10**9 + 1024]),
    "overlapping tensors": lambda f: edited_header(f, lambda h: h.update(copy=h[sorted(h)[1]])),
    "an extra field of a tensor": lambda f: edited_entry(f, code="x"),
    "metadata that is no text": lambda f: edited_header(f, lambda h: h.update(__metadata__={"a": 1})),
    "an unknown weight": lambda f: edited_weights(f, lambda t: t.update({"lm_head.weight": torch.zeros(4, 4)})),
    "a missing weight": lambda f: edited_weights(f, lambda t: t.pop(first(t))),
    "a weight of another rank": lambda f: edited_weights(f, lambda t: t.update({first(t): t[first(t)][:2]})),
    "a weight of another width": lambda f: edited_weights(f, lambda t: t.update({first(t): t[first(t)][:, :-1]})),
    "a weight that is not a number": lambda f: edited_weights(f, lambda t: t[first(t)].fill_(torch.nan)),
    "a configuration that is no JSON": lambda f: {**f, CONFIG: b"{"},
    "an unknown key": lambda f: edited_config(f, auto_mapping={"base_model_class": "os.system"}),
    "another base model": lambda f: edited_header(f, lambda h: h["__metadata__"].update(base="0" * 64)),
    "dropout": lambda f: edited_config(f, lora_dropout=0.1),
    "a scale that is no number": lambda f: edited_config(f, lora_alpha=float("nan")),
    "a scale without bound": lambda f: edited_config(f, lora_alpha=float("inf")),
    "no targets": lambda f: edited_config(f, target_modules=[]),
    "another target": lambda f: edited_config(f, target_modules=["q_proj"]),
    "experts in a model that has none": lambda f: edited_config(f, target_parameters=["mlp.down_proj.weight"]),
    "parameters that are a pattern": lambda f: edited_config(f, target_parameters=".*"),
    "a weight in a wrapper": lambda f: edited_weights(
        f, lambda t: t.update({first(t).replace(".lora_", ".base_layer.lora_"): t.pop(first(t))})
    ),
    "another method": lambda f: edited_config(f, peft_type="IA3"),
    "whole modules": lambda f: edited_config(f, modules_to_save=["lm_head"]),
    "rank 0": lambda f: edited_config(f, r=0),
    "another rank": lambda f: edited_config(f, r=8),
    "another scale": lambda f: edited_config(f, lora_alpha=9),
    "targets that are a pattern": lambda f: edited_config(f, target_modules=".*"),
}


@pytest.mark.parametrize("alteration", ALTERED)
def test_altered_files_are_refused(base: Path, files: Files, alteration: str) -> None:
    altered = ALTERED[alteration](files)
    assert altered != files
    model = fresh(base)
    before = adapter_files(model)
    with pytest.raises(TrainError, match=r"not (a )?usable"):
        load_adapter(model, altered)
    assert adapter_files(model) == before


def test_the_hash_covers_names_and_bytes(files: Files) -> None:
    renamed = {CONFIG: files[CONFIG], "other": files[WEIGHTS]}
    flipped = {**files, WEIGHTS: files[WEIGHTS][:-1] + bytes([files[WEIGHTS][-1] ^ 1])}
    assert len({adapter_hash(f) for f in (files, renamed, flipped)}) == 3
    assert adapter_hash(dict(reversed(files.items()))) == adapter_hash(files)


def experts_adapter(base: Path, seed: int = 0, **params: Any) -> PeftModel:
    return fresh(base, seed, **{"lora_target_parameters": EXPERTS, **params})


@pytest.fixture(scope="module", params=LAYOUTS)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_experts(request.param, tmp_path_factory.mktemp(request.param))


def stepped(model: PeftModel) -> PeftModel:
    """The model after two steps of gradient descent, the first of which moves B away from 0."""
    ids = torch.arange(1, 17)[None]
    for _ in range(2):
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        model.zero_grad()
        (-logprobs.gather(1, ids[0, 1:, None]).mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.5)
    return model


def test_experts_are_trained_and_their_files_go_round_to_the_same_logits(experts: Path, tmp_path: Path) -> None:
    model = experts_adapter(experts).eval()
    before = adapter_tensors(model)
    after = adapter_tensors(stepped(model))
    assert {k for k in after if ".experts." in k} == {
        f"base_model.model.model.layers.{layer}.mlp.experts.{wrapper}lora_{factor}.weight"
        for layer in range(2)
        for wrapper in ("", "base_layer.")
        for factor in "AB"
    }
    assert not any(torch.equal(before[k], after[k]) for k in after)
    files = adapter_files(model)
    other = experts_adapter(experts, seed=9).eval()
    load_adapter(other, files)
    assert adapter_files(other) == files
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    by_peft = PeftModel.from_pretrained(load_model(experts), tmp_path).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(other(input_ids=ids).logits, logits)
        assert torch.equal(by_peft(input_ids=ids).logits, logits)
        assert not torch.allclose(load_model(experts)(input_ids=ids).logits, logits, atol=1e-3)


def test_experts_continue_from_their_adapter(experts: Path) -> None:
    parent = adapter_files(moved(experts_adapter(experts, lora_r=2, lora_target_modules=())))
    model = attach_lora(load_model(experts), with_adapter(TrainParams(), parent), seed=5)
    load_adapter(model, parent)
    assert adapter_files(model) == parent


EXPERT = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
ALTERED_EXPERTS: dict[str, Callable[[Files], Files]] = {
    "experts that are no target": lambda f: edited_config(f, target_parameters=None),
    "one target fewer than weights": lambda f: edited_config(f, target_parameters=list(EXPERTS[:1])),
    "a rank that no number of experts has": lambda f: edited_weights(f, lambda t: t.update({EXPERT: t[EXPERT][:-1]})),
    "an expert fewer": lambda f: edited_weights(f, lambda t: t.update({EXPERT: t[EXPERT][:-4]})),
    "a weight in one wrapper too many": lambda f: edited_weights(
        f, lambda t: t.update({EXPERT.replace("experts.", "experts.base_layer."): t.pop(EXPERT)})
    ),
    "an expert that is not a number": lambda f: edited_weights(f, lambda t: t[EXPERT].fill_(torch.inf)),
}


@pytest.mark.parametrize("alteration", ALTERED_EXPERTS)
def test_altered_files_of_experts_are_refused(experts: Path, alteration: str) -> None:
    model = experts_adapter(experts)
    before = adapter_files(model)
    with pytest.raises(TrainError, match="not usable"):
        load_adapter(model, ALTERED_EXPERTS[alteration](before))
    assert adapter_files(model) == before


@pytest.mark.parametrize("alteration", ["one target fewer than weights", "a weight in one wrapper too many"])
def test_weights_that_no_target_has_are_refused_before_there_is_a_model(experts: Path, alteration: str) -> None:
    altered = ALTERED_EXPERTS[alteration](adapter_files(experts_adapter(experts)))
    with pytest.raises(TrainError, match="no LoRA weight of a target"):
        check_adapter(altered)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1"),
        ({"lora_target_parameters": ("mlp.experts.w1",)}, "mlp.experts.down_proj, mlp.experts.gate_up_proj"),
    ],
)
def test_what_experts_cannot_have_is_refused(experts: Path, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experts_adapter(experts, **params)
    assert words in f"{caught.value.message} {caught.value.next_step}"


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_targets_that_peft_reads_as_others_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_experts("qwen3_moe", tmp_path, mlp_only_layers=[1])
    with pytest.raises(ConfigError, match=r"PEFT adapts other parts .* down_proj, gate_proj"):
        fresh(folder)
    assert adapter_tensors(fresh(folder, lora_target_modules=("q_proj",)))
