"""What a run is refused before anything of it is recorded, as far as only the base model knows it."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from bascule.plugins.algorithm import Requires
from bascule.plugins.engine import EngineInfo
from bascule.plugins.loader import LoadedPlugin, Plugins, load_plugins, plugins
from bascule.runtime.cli import configuration
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.services.inference import start_engine
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError, EngineError
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


def test_parameters_of_a_task_that_nobody_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'regression': 3.* does not name a task") as caught:
        configuration.configure({}, [], plugins(), {"task": {"params": {"regression": 3}}})
    assert "task.name" in str(caught.value)


def test_a_run_whose_base_model_can_be_trained_as_asked_is_pinned_to_it(model: Path) -> None:
    algorithms = {"grpo": {"lora_target_modules": ["q_proj", "up_proj"]}}
    assert checked(model, algorithms=algorithms).model_digest


def test_a_run_on_a_vllm_that_it_starts_keeps_its_model_and_one_at_a_url_need_not_have_it(model: Path) -> None:
    only = {"levers": ["harness"]}
    assert checked(model, engine={"name": "vllm"}, **only).model_digest
    elsewhere = {"name": "vllm", "params": {"url": "http://127.0.0.1:1"}}
    assert checked(Path("/nowhere"), engine=elsewhere, **only).model_digest == ""
    with pytest.raises(ConfigError, match="/nowhere"):
        checked(Path("/nowhere"), engine={"name": "vllm"}, **only)


async def test_an_engine_that_knows_its_model_serves_a_run_that_did_not_record_it(model: Path) -> None:
    class Told(ConstantEngine):
        async def start(self) -> EngineInfo:
            return msgspec.structs.replace(await super().start(), model_digest="abc")

    begun = checked(model, levers=["harness"])
    assert begun.model_digest == ""
    for recorded, served in (("", True), ("abc", True), ("other", False)):
        state = SimpleNamespace(started=msgspec.structs.replace(begun, model_digest=recorded))
        view: Any = SimpleNamespace(
            world=World(plugins(), begun.config),
            state=state,
            run="r",
            logger=SimpleNamespace(info=lambda *_, **__: None),
        )
        if served:
            assert (await start_engine(view, Told("7"), begun.config.engine)).model_digest == "abc"
        else:
            with pytest.raises(EngineError, match="is not the one that r started with"):
                await start_engine(view, Told("7"), begun.config.engine)


def test_an_endpoints_model_is_a_name_and_an_embedded_one_a_folder_with_its_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"task": {"name": "arith"}, "model": "Qwen"}
    prices = {"prices": {"Qwen": {"input": 1.0, "output": 2.0}}}
    remote = configuration.configure({**given, **prices, "engine": {"name": "openai"}}, [], plugins())
    assert (remote.model, [*remote.prices]) == ("Qwen", ["Qwen"])
    embedded = configuration.configure({**given, **prices}, [], plugins())
    assert (embedded.model, [*embedded.prices]) == (str(tmp_path / "Qwen"), [str(tmp_path / "Qwen")])
    assert configuration.configure({**given, "model": ""}, [], plugins()).model == ""


def test_a_decision_that_would_ask_for_more_than_a_batch_holds_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "MAX_BATCH", 400)
    given = {"shard_size": 1, "levers": ["harness"], "evaluation": {"perturbed": 150, "sealed_examples": 20}}
    assert checked(model, **given)
    task = {"name": "arith", "params": {"regression": 60}}
    with pytest.raises(ConfigError, match="A decision would ask for 424 shards"):
        checked(model, **given, task=task)


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


@pytest.mark.parametrize(
    ("policy", "changes", "said"),
    [
        ("fixed", {}, "told no algorithm"),
        ("fixed", {"params": {"algorithm": "gpro"}}, "policy fixed is told to use 'gpro', and there is none"),
        ("fixed", {"params": {"preset": "lawbench", "schedule": ["harness"]}}, "leaves the harness alone"),
        ("alternate", {}, "leaves the harness alone"),
        ("rules", {"params": {"algorithm": "gpro"}}, "policy rules is told to use 'gpro'"),
    ],
)
def test_a_policy_that_could_not_do_as_it_is_told_is_refused_before_the_run_starts(
    model: Path, policy: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(model, policy={"name": policy, **changes})
    assert checked(model, policy={"name": "fixed", "params": {"preset": "lawbench"}})


@pytest.mark.parametrize("named", [{"algorithm": "dpo"}, {"algorithm": "grpo"}, {"preset": "trimul"}])
def test_an_algorithm_that_compares_samples_is_refused_where_an_example_has_one(
    model: Path, named: dict[str, str]
) -> None:
    asked = {"name": "fixed", "params": named}
    with pytest.raises(ConfigError, match=r"compares samples of one example, and evaluation\.train_samples is 1"):
        checked(model, policy=asked, evaluation={"train_samples": 1})
    assert checked(model, policy=asked)
    with pytest.raises(ConfigError, match="The algorithm entropic cannot be used so"):
        checked(
            model,
            policy={"name": "fixed", "params": {"preset": "trimul"}},
            algorithms={"grpo": {}, "entropic": {"num_generations": 2}},
        )


@pytest.mark.parametrize(
    ("algorithm", "values", "said"),
    [
        ("grpo", {"loss_type": "nonsense"}, r"loss_type is not usable: .*it is one of dapo, dr_grpo, grpo"),
        ("grpo", {"learning_rate": -1}, "learning_rate is not usable"),
        ("grpo", {"num_generations": 1}, "num_generations is 1; it needs 2 samples a group"),
        ("entropic", {"num_generations": 2}, "num_generations is 2; it needs 3 samples a group"),
        ("ppo", {"lora_dropout": 0.5}, r"lora_dropout is 0.5, and with dropout.*Set it to 0"),
        ("reinforce", {"reward_clip_range": [1, 0]}, "not a lower and a higher bound"),
        ("dpo", {"beta": 0, "pair_loss": "ipo"}, "beta is not usable"),
        ("dpo", {"max_kl": 0}, "max_kl is not usable"),
    ],
)
def test_a_parameter_that_is_not_usable_is_refused_with_its_algorithm(
    model: Path, algorithm: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"The algorithm {algorithm} cannot be used so\. .*{said}"):
        checked(model, algorithms={algorithm: values})


class Broken:
    """An installed algorithm that nobody has tried."""

    name = "broken"
    version = "1"
    requires = Requires()
    streams: frozenset[Any] = frozenset()
    usual: ClassVar[dict[str, Any]] = {}

    def defaults(self) -> dict[str, Any]:
        return dict(self.usual)

    def credit(self, groups: Any, params: Any) -> Any:
        return 1 / len(groups)


class Odd(Broken):
    usual: ClassVar[dict[str, Any]] = {"learning_rate": "fast"}


class Foreign(Broken):
    streams = frozenset({"foo"})


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (Broken(), "failed to give credit: ZeroDivisionError"),
        (Odd(), "learning_rate is not usable"),
        (Foreign(), "asks for the stream 'foo'; there are policy, reference, values"),
    ],
)
def test_a_broken_algorithm_concerns_only_the_runs_that_name_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any, said: str
) -> None:
    loaded = load_plugins()
    loaded.registry.algorithm(algorithm)
    bringing = LoadedPlugin(
        name="odd", distribution="odd", version="1", hash="", seconds=0.0, provides=("algorithm:broken",)
    )
    found = Plugins(loaded.registry, (*loaded.loaded, bringing))
    monkeypatch.setattr("tests.cli.test_configuration.plugins", lambda: found)
    assert "broken" in {pin.name for pin in checked(model).plugins}
    with pytest.raises(ConfigError, match=f"The algorithm broken cannot be used so.*{said}"):
        checked(model, policy={"name": "rules", "params": {"algorithm": "broken"}})


@pytest.mark.parametrize(("dev", "settings", "told"), [(7, [], True), (8, [], False), (7, ["gate.guard=none"], False)])
def test_a_dev_on_which_nothing_can_be_promoted_is_told_of(dev: int, settings: list[str], told: bool) -> None:
    given = {"task": {"name": "arith"}, "engine": {"name": "constant", "params": {"text": "7"}}, "levers": ["harness"]}
    config = configuration.configure(given, [f"evaluation.dev_examples={dev}", *settings], plugins())
    said = configuration.cautions(configuration.preflight(config, plugins()))
    assert [line[:21] for line in said] == (["On 7 examples of dev "] if told else [])
