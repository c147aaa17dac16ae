"""Profiles: one file names everything of a run, options go before it, and faults are named by file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.plugins.loader import load_plugins, plugins
from bascule.runtime.cli.app import app
from bascule.runtime.cli.configuration import check_choices, configure
from bascule.runtime.cli.profiles import asked_task, read_profile
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError
from bascule.schemas.run import RunConfig

SHIPPED = sorted((Path(__file__).parents[2] / "ops" / "profiles").glob("*.toml"))
KEY = "sk-ant-api03-" + "A1b2C3d4" * 6


def written(folder: Path, text: str) -> Path:
    file = folder / "profile.toml"
    file.write_text(text, encoding="utf-8")
    return file


def made(file: Path, *overrides: str, task: str | None = None, **given: Any) -> RunConfig:
    """The configuration of a run with a profile and options."""
    profile = read_profile(file, plugins())
    return configure({"task": asked_task(task, None, profile), **given}, overrides, plugins(), profile.values)


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_a_profile_that_is_shipped_makes_a_configuration_whose_plugins_take_it(file: Path) -> None:
    config = made(file)
    check_choices(World(plugins(), config))
    assert config.levers == ("harness", "weights")


def test_the_price_of_a_model_in_a_folder_is_that_of_the_folder(tmp_path: Path) -> None:
    config = made(written(tmp_path, 'model = "./qwen"\n[prices."./qwen"]\ninput = 1\noutput = 2\n'))
    assert [*config.prices] == [config.model] == [str(tmp_path / "qwen")]


def test_parameters_that_were_given_before_their_plugin_was_named_are_kept(tmp_path: Path) -> None:
    file = written(tmp_path, "seed = 1\n")
    config = made(file, "author.base_url=http://127.0.0.1:8000/v1", "author.model=m", "author=claude")
    assert config.author.params == {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}
    config = made(file, "author=claude", "author.model=m", "author=operators")
    assert (config.author.name, config.author.params) == ("operators", {})


def test_an_empty_task_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--task names none"):
        made(written(tmp_path, 'task = "arith"\n'), task="")


def test_a_profile_names_plugins_by_name_or_with_parameters_and_any_other_field(tmp_path: Path) -> None:
    config = made(
        written(
            tmp_path,
            """
            task = "arith"
            policy = "rules"
            engine = { name = "constant", params = { text = "7" } }
            levers = ["harness"]
            seed = 5
            [evaluation]
            dev_examples = 20
            [algorithms.grpo]
            lora_r = 4
            """,
        )
    )
    assert (config.task.name, config.policy.name, config.engine.params) == ("arith", "rules", {"text": "7"})
    assert (config.levers, config.seed, config.evaluation.dev_examples) == (("harness",), 5, 20)
    assert config.algorithms["grpo"]["lora_r"] == 4


def test_defaults_give_way_to_the_profile_and_that_to_options_and_those_to_set(tmp_path: Path) -> None:
    file = written(tmp_path, "seed = 5\nmax_generations = 6\nshard_size = 7\n[evaluation]\ntrain_groups = 9\n")
    usual = configure({"task": {"name": "arith"}}, [], plugins())
    config = made(file, "shard_size=3", max_generations=2)
    assert (config.seed, config.max_generations, config.shard_size) == (5, 2, 3)
    assert config.evaluation.train_groups == 9
    assert config.evaluation.train_samples == usual.evaluation.train_samples
    assert made(file, "max_generations=1", max_generations=2).max_generations == 1


def test_parameters_for_a_plugin_go_with_it_where_an_option_names_another(tmp_path: Path) -> None:
    file = written(tmp_path, '[policy]\nname = "rules"\nparams = { patience = 3 }\n')
    assert made(file).policy.params["patience"] == 3
    assert made(file, "policy.patience=4").policy.params["patience"] == 4
    changed = made(file, policy={"name": "fixed"})
    assert (changed.policy.name, changed.policy.params) == ("fixed", {})
    assert made(file, "policy=fixed").policy.params == {}


def test_the_task_is_the_options_else_the_profiles_else_the_usual_one(tmp_path: Path) -> None:
    named = written(tmp_path, 'task = { name = "rooms" }\n')
    assert made(named).task.name == "rooms"
    assert made(named, task="arith").task.name == "arith"
    assert made(written(tmp_path, "seed = 2\n")).task.name == "arith"


def test_a_path_with_dots_is_relative_to_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "model").mkdir()
    file = written(tmp_path, 'model = "./model"\n[engine]\nname = "cassette"\nparams = { path = "../c.jsonl" }\n')
    config = made(file)
    assert config.model == str(tmp_path / "model")
    assert config.engine.params["path"] == str(tmp_path.parent / "c.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = \n", r"no valid TOML.*line 1"),
        ("sed = 5\n", r"has no 'sed'"),
        ("[evaluation]\ndev = 5\n", r"has no 'evaluation\.dev'"),
        ("[evaluation]\ndev_examples = 'all'\n", r"Expected `int`, got `str` - at `evaluation\.dev_examples`"),
        ("max_generations = -1\n", r"max_generations"),
        ("levers = 'harness'\n", r"levers"),
        ("levers = []\n", r"at least one lever"),
        ("[policy]\nname = 'rules'\npatience = 3\n", r"policy\.patience is unknown.*policy\.params"),
        ("policy = 'nobody'\n", r"policy\.name: There is no policy 'nobody'"),
        ("[engine]\nname = 'nobody'\n", r"engine\.name: There is no engine"),
        ("task = 'nothing'\n", r"task\.name: There is no task"),
        ("[algorithms.nothing]\nlora_r = 1\n", r"algorithms\.nothing: There is no algorithm"),
        ("[algorithms.grpo]\nlora_rank = 1\n", r"algorithms\.grpo\.lora_rank is unknown"),
        ("[gate]\nalpha = nan\n", r"gate\.alpha is nan"),
        ("seed = 2026-01-01\n", r"seed is a date"),
        ("seed = 99999999999999999999\n", r"seed is a number of more than 64 bits"),
        ("task = './nothing.py'\n", r"task: .*nothing\.py"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        made(file)
    assert str(file) in caught.value.message
    assert caught.value.next_step


def test_a_parameter_that_a_plugin_does_not_have_is_said_with_the_profile(tmp_path: Path) -> None:
    file = written(tmp_path, '[policy]\nname = "rules"\nparams = { patients = 3 }\n')
    ran = CliRunner().invoke(app, ["run", "--profile", str(file), "--home", str(tmp_path / "home")])
    assert isinstance(ran.exception, ConfigError)
    assert str(file) in ran.exception.message
    assert "patients" in ran.exception.message
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("place", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used: (No such file|Is a directory)") as caught:
        read_profile(tmp_path / place, plugins())
    assert str(tmp_path / place) in caught.value.message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"seed = 1 # \xff\n")
    with pytest.raises(ConfigError, match="no UTF-8"):
        read_profile(tmp_path / "p.toml", plugins())


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f'[author]\nname = "claude"\nparams = {{ key_env = "{KEY}" }}\n', r"author\.params\.key_env"),
        (f'[author]\nname = "claude"\nparams = {{ model = "{KEY}" }}\n', r"author\.params\.model"),
        ('[author]\nname = "claude"\nparams = { api_key = "hunter2" }\n', r"author\.params\.api_key"),
        ('[author]\nname = "claude"\nparams = { key_env = "f3b1c09a77d24e5f" }\n', r"author\.params\.key_env"),
        ('[engine]\nname = "constant"\nparams = { url = "http://me:hunter2@host/v1" }\n', r"engine\.params\.url"),
        (f'[engine]\nname = "constant"\nparams = {{ texts = ["7", "{KEY}"] }}\n', r"engine\.params\.texts\[1\]"),
        (f'[engine]\nname = "constant"\nparams = {{ "{KEY}" = 1 }}\n', r"engine\.params"),
    ],
)
def test_a_value_that_looks_like_a_key_is_refused_without_being_shown(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where) as caught:
        made(written(tmp_path, text))
    for secret in (KEY, KEY[:16], "hunter2", "f3b1c09a77d24e5f"):
        assert secret not in str(caught.value)
    assert "environment variable" in str(caught.value)


def test_the_value_of_an_environment_variable_that_looks_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "plain-words-as-a-key")
    file = written(tmp_path, '[engine]\nname = "constant"\nparams = { text = "plain-words-as-a-key" }\n')
    with pytest.raises(ConfigError, match="looks like a key") as caught:
        read_profile(file, load_plugins())  # as in a process that begins with it
    assert "plain-words" not in str(caught.value)
