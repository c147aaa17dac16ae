"""What a run is refused before anything of it is recorded, as far as only the base model knows it."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.cli import configuration
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import RunStarted
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def checked(model: Path, **values: Any) -> RunStarted:
    """A run with an engine that needs no model, on a tiny base model."""
    given = {
        "task": {"name": "arith"},
        "engine": {"name": "constant", "params": {"text": "7"}},
        "model": str(model),
        "levers": ["weights"],
        **values,
    }
    return configuration.preflight(configuration.configure(given, [], plugins()), plugins())


def test_a_run_whose_base_model_can_be_trained_as_asked_is_pinned_to_it(model: Path) -> None:
    algorithms = {"grpo": {"lora_target_modules": ["q_proj", "up_proj"]}}
    assert checked(model, algorithms=algorithms).model_digest


def test_a_target_that_the_base_model_does_not_have_is_refused_by_algorithm_and_name(model: Path) -> None:
    algorithms = {"dpo": {"lora_target_modules": ["q_proj", "query_key_value"]}}
    with pytest.raises(ConfigError, match=r"dpo: lora_target_modules names query_key_value.*It has down_proj"):
        checked(model, algorithms=algorithms)
    assert checked(model, algorithms=algorithms, levers=["harness"])


def test_the_embedded_base_model_is_looked_at_too_where_its_parts_are_named() -> None:
    with pytest.raises(ConfigError, match="grpo: lora_target_modules names experts"):
        checked(Path("smollm2-135m-instruct"), algorithms={"grpo": {"lora_target_modules": ["experts"]}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 32, "n_heads": 2},
            "'mpt' has layers of",
        ),
        ({"model_type": "nobody_knows"}, "cannot be built"),
    ],
)
def test_a_base_model_that_the_trainer_does_not_compute_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=said):
        checked(tmp_path)


def test_trl_is_missed_only_where_it_is_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        assert name == "trl"
        return None

    monkeypatch.setattr(configuration, "find_spec", find_spec)
    asked = {"name": "rules", "params": {"algorithm": "trl-grpo"}}
    with pytest.raises(ConfigError, match="TRL is not installed"):
        checked(model, policy=asked)
    assert checked(model)
    assert checked(model, policy=asked, levers=["harness"])
