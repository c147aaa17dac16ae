"""A person's way to the blobs of a run, in the home and on the broker: list, erase, and collect garbage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.cli.store import open_store
from bascule.schemas.errors import Erased
from bascule.schemas.events import BlobRef
from tests.runtime.sample import ADAPTER, ERASED, GONE, NEWEST, TRAJECTORY, sample

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["folder", "nats"])
async def bascule(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, on a home with the run ``sample``, a blob that no event names, and blobs of an unknown run."""
    monkeypatch.setenv("BASCULE_BLOBS", request.param)
    monkeypatch.setenv("BASCULE_HOME", str(tmp_path))
    async with open_store(tmp_path) as store:
        await store.admin().append(await sample(store.blobs("sample")))
        await store.blobs("sample").put(b"its event was never appended")
        await store.blobs("stranger").put(b"data")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bascule.runtime.cli", "blobs", *args]
        return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False)

    return run


def answer(bascule: Command, *args: str) -> Any:
    done = bascule(*args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(bascule: Command) -> dict[str, str]:
    return {b["sha256"]: b["state"] for b in answer(bascule, "list", "sample")["blobs"]}


async def test_blobs_are_listed_erased_and_collected(bascule: Command, tmp_path: Path) -> None:
    before = {
        sha256(TRAJECTORY): "kept",
        sha256(ERASED): "erased",
        sha256(ADAPTER): "kept",
        sha256(GONE): "discarded",
        sha256(NEWEST): "kept",
    }
    assert states(bascule) == before

    # Nothing is old enough.
    (found,) = answer(bascule, "gc", "sample")["runs"]
    assert (found["swept"], found["young"], found["kept"]) == ([], 2, 2)

    for _ in range(2):
        assert answer(bascule, "erase", "sample", sha256(TRAJECTORY), "--reason", "asked for")["seq"] == 10
    assert states(bascule) == before | {sha256(TRAJECTORY): "erased"}

    garbage = [sha256(NEWEST), sha256(b"its event was never appended")]
    (found,) = answer(bascule, "gc", "sample", "--grace", "0", "--dry-run")["runs"]
    assert found["swept"] == sorted(garbage)
    assert states(bascule)[sha256(NEWEST)] == "kept"
    done = answer(bascule, "gc", "--grace", "0")
    assert done["runs"][0]["swept"] == sorted(garbage)
    assert done["unknown"] == ["stranger"]
    assert states(bascule) == before | {sha256(TRAJECTORY): "erased", sha256(NEWEST): "discarded"}
    async with open_store(tmp_path) as store:
        assert await store.blobs("stranger").get(BlobRef(sha256=sha256(b"data"), size=4)) == b"data"
        with pytest.raises(Erased):
            await store.blobs("sample").get(BlobRef(sha256=sha256(TRAJECTORY), size=len(TRAJECTORY)))


async def test_a_hash_that_no_event_names_is_not_erased(bascule: Command, tmp_path: Path) -> None:
    unnamed = sha256(b"its event was never appended")
    for wrong in (unnamed, "../../passwd", "f" * 64):
        done = bascule("erase", "sample", wrong, "--reason", "asked for")
        assert done.returncode == 3
        assert wrong in done.stderr
        assert "blobs list sample" in done.stderr
    async with open_store(tmp_path) as store:
        assert unnamed in {s.sha256 for s in await store.blobs("sample").list()}
        assert len(await store.events("sample")) == 9


async def test_an_unknown_place_for_blobs_is_refused(bascule: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_BLOBS", "cloud")
    done = bascule("list", "sample")
    assert done.returncode == 3
    assert "cloud" in done.stderr
    assert "nats" in done.stderr
