"""Items that must not be published are in restricted blobs and nowhere else, whatever the harness says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.exports.check import verify_export
from bascule.runtime.exports.reader import open_export
from tests.e2e import secretive
from tests.plugin_site import install_plugin

PHRASE = "unpublished colours"


class Home:
    """A home with one run of the task ``secretive``."""

    def __init__(self, root: Path) -> None:
        install_plugin(root / "site", "secretive", Path(secretive.__file__).read_text())
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")}
        self._env = clean | {"PYTHONPATH": str(root / "site"), "BASCULE_HOME": str(root / "home")}
        self.path = root / "home"
        self.report = self.run("r")

    def run(self, name: str, *args: str) -> Any:
        engine = ("--engine", "constant", "--set", 'engine.params.text="a"')
        return json.loads(self.bascule("run", "--task", "secretive", "--run-id", name, "--json", *engine, *args))

    def bascule(self, *args: str) -> bytes:
        command = [sys.executable, "-m", "bascule.runtime.cli", *args]
        return subprocess.run(command, env=self._env, stdout=subprocess.PIPE, check=True, timeout=300).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("restricted"))


def test_no_event_quotes_an_item_and_what_would_have_is_named_by_its_hash(home: Home) -> None:
    events = home.bascule("log", "r", "--json").decode()
    assert PHRASE.casefold() not in events.casefold()
    logged: list[dict[str, Any]] = [
        event["data"] for event in map(json.loads, events.splitlines()) if event["type"] == "bascule.trajectory.logged"
    ]
    assert logged
    assert all(e["body"] is None and e["blob"]["media"].endswith("; restricted") for e in logged)
    assert [e["answer"].startswith("[restricted:") for e in logged if e["example"] == "dev-2"] == [True]
    assert all("[restricted:" in e["error"]["message"] for e in logged if e["error"])
    assert home.report["sealed"]["before"] == 0.5


def test_what_was_asked_is_in_the_blobs_and_an_export_leaves_them_out_unless_asked(home: Home) -> None:
    held = {}
    for flags in ((), ("--restricted",)):
        data = home.bascule("export", "r", *flags)
        with open_export(io.BytesIO(data)) as found:
            assert verify_export(found) == []
            held[flags] = sum(PHRASE.encode() in found.blob(b) for b in found.manifest.blobs if b.included)
        assert (PHRASE.encode() in data) is bool(flags)
    assert held == {(): 0, ("--restricted",): 12}


def test_the_services_log_and_the_report_name_no_item(home: Home) -> None:
    files = [p for p in (home.path / "runs").rglob("*") if p.is_file()]
    assert any(p.name == "services.jsonl" for p in files)
    assert not [p for p in files if PHRASE.encode() in p.read_bytes()]
    assert home.report["looks"] == 1


def test_an_edit_that_quotes_an_item_is_none_and_the_run_goes_on(home: Home) -> None:
    home.run("quoted", "--author", "quoting", "--max-gen", "2")
    events = home.bascule("log", "quoted", "--json").decode()
    assert PHRASE not in events
    failed = [
        e["data"]["reason"] for e in map(json.loads, events.splitlines()) if e["type"] == "bascule.harness.failed"
    ]
    assert [reason.startswith("[restricted:") for reason in failed] == [False, True]
    assert "quotes an item" in failed[0]
    assert json.loads(home.bascule("replay", "quoted", "--json"))["differences"] == []
