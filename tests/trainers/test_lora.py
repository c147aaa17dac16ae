"""Adapter files: the same bytes for the same weights, and nothing read that was altered."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load as reference_load
from transformers import AutoModelForCausalLM

from bascule.schemas.errors import TrainError
from bascule.trainers.lora import (
    CONFIG,
    WEIGHTS,
    adapter_files,
    adapter_hash,
    adapter_tensors,
    attach_lora,
    check_adapter,
    load_adapter,
)
from bascule.trainers.tensorfile import MAX_HEADER, read_tensors, write_tensors
from tests.tiny_model import make_tiny_model

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


def fresh(base: Path, seed: int = 0, r: int = 4) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return attach_lora(model, r, 8, seed)


@pytest.fixture(scope="module")
def files(base: Path) -> Files:
    model = fresh(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return adapter_files(model)


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


def test_files_go_round_exactly(base: Path, files: Files) -> None:
    other = fresh(base, seed=9)
    load_adapter(other, files)
    assert adapter_files(other) == files


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
