"""Canaries are planted where truths are, and the folder of both is nobody else's."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.plugins.canary import PREFIX, Canaries, Planted, _make_key, canary, canary_key, private_folder
from bascule.plugins.task import Example, PublicFace
from bascule.plugins.tasks.truths import kept_truths
from bascule.schemas.errors import ConfigError

TRUTHS = {"dev": {"a": "7", "b": "True"}, "sealed": {"c": "the-truth-is-42"}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_its_owners_alone() -> None:
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
    canary_key()
    assert stat.S_IMODE((private_folder() / "canary.key").stat().st_mode) == 0o600


def test_a_folder_that_is_open_to_others_is_refused() -> None:
    private_folder().chmod(0o750)
    with pytest.raises(ConfigError, match=r"open to others \(mode 750\).*chmod 700"):
        canary_key()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_folder_of_somebody_else_is_refused() -> None:
    os.chown(private_folder(), 61234, 61234)
    with pytest.raises(ConfigError, match="belongs to the user 61234"):
        canary_key()


def test_a_link_to_another_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (cache / "private").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is no folder"):
        private_folder()


def test_of_two_keys_that_are_made_at_once_the_first_counts() -> None:
    key = canary_key()
    _make_key(private_folder() / "canary.key")
    assert canary_key() == key
    assert [p.name for p in private_folder().iterdir()] == ["canary.key"]
    (private_folder() / "canary.key").write_bytes(key[:5])
    with pytest.raises(ConfigError, match="is damaged"):
        canary_key()


def test_a_canary_stands_beside_each_truth_and_follows_a_new_key() -> None:
    assert kept_truths("task", "task-1", lambda: TRUTHS) == TRUTHS
    kept = private_folder() / "task-1.jsonl"
    lines = [json.loads(line) for line in kept.read_bytes().splitlines()]
    assert [line["canary"] for line in lines] == [
        canary(canary_key(), "task", line["split"], line["example"]) for line in lines
    ]
    old = {line["canary"] for line in lines}
    (private_folder() / "canary.key").unlink()
    assert kept_truths("task", "task-1", dict) == TRUTHS, "the file is there: nothing is made again"
    new = {json.loads(line)["canary"] for line in kept.read_bytes().splitlines()}
    assert not old & new
    assert canary(canary_key(), "task", "sealed", "c") in new


def test_truths_that_are_damaged_are_not_quoted() -> None:
    kept_truths("task", "task-1", lambda: TRUTHS)
    kept = private_folder() / "task-1.jsonl"
    kept.write_bytes(kept.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"task-1\.jsonl are damaged") as caught:
        kept_truths("task", "task-1", lambda: TRUTHS)
    assert "42" not in str(caught.value)


def test_a_token_says_what_it_stands_beside() -> None:
    examples = {s: (Example(id=f"{s}-1", group="g", input={}),) for s in ("train", "dev", "sealed")}
    public = PublicFace(
        name="task", version="1", description="", answers={}, max_answer_tokens=1, source="", licence="", **examples
    )
    canaries = Canaries.of(b"k", "task", public)
    assert set(canaries.tokens.values()) == {Planted("task", "dev", "dev-1"), Planted("task", "sealed", "sealed-1")}
    digits = canary(b"k", "task", "dev", "dev-1").removeprefix(PREFIX)
    for known in (digits, digits[:8]):
        assert canaries.find(known) == Planted("task", "dev", "dev-1")
    assert canaries.find(digits[:7]) is None
    assert canaries.find(digits[::-1]) is None


def test_the_scoring_process_holds_them_in_memory_and_environment() -> None:
    script = """
import json, os
from bascule.verifiers import scoring_process
scoring_process.open_private(scoring_process.Open(task="arith", params={}))
(planted,) = scoring_process._planted
print(json.dumps([[v for v in os.environ.values() if v.startswith("bcanary-")], list(planted.tokens)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    environment, memory = json.loads(done.stdout)
    assert len(memory) == 300, "one for each dev and sealed example"
    assert len(environment) == 8
    assert set(environment) < set(memory)
