"""Whole runs as processes: a tiny model with random weights, a plugin that somebody else could ship, a cassette."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.plugin_site import install_plugin

HERE = Path(__file__).parent


@dataclass(frozen=True)
class World:
    """An isolated home for runs.

    Attributes:
        model: a folder with the tiny model.
        env: the environment in which ``bascule`` finds the plugin.
    """

    root: Path
    model: Path
    env: dict[str, str]

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "bascule.runtime.cli", *args]

    def bascule(self, *args: str, home: str = "home", ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*args), env=self.environment(home), capture_output=True, text=True, timeout=300, check=False
        )
        assert not ok or done.returncode == 0, done.stderr
        return done

    def json(self, *args: str, home: str = "home") -> Any:
        return json.loads(self.bascule(*args, "--json", home=home).stdout)

    def environment(self, home: str) -> dict[str, str]:
        return {**self.env, "BASCULE_HOME": str(self.root / home)}

    def cassette_run(self, cassette: Path) -> list[str]:
        """Arguments of a run that answers from a recording."""
        return [
            *("run", "--task", "parity", "--model", str(self.model), "--seed", "3", "--run-id", "same"),
            *("--engine", "cassette", "--set", f"engine.params.path={cassette}", "--set", "threads=1"),
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("e2e")
    site = root / "site"
    install_plugin(site, "parity", (HERE / "parity.py").read_text())
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tiny_model import make_tiny_model; from pathlib import Path"
    )
    subprocess.run(
        [sys.executable, "-c", f"{script}; make_tiny_model(Path(sys.argv[2]))", str(HERE.parent), str(root / "tiny")],
        check=True,
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")} | {"PYTHONPATH": str(site)}
    return World(root, root / "tiny", env)


@pytest.fixture(scope="session")
def recorded(world: World) -> dict[str, Any]:
    """A run of the tiny model on the real engine, and its answers as a cassette."""
    report = world.json(
        *(
            "run",
            "--task",
            "parity",
            "--model",
            str(world.model),
            "--seed",
            "3",
            "--run-id",
            "live",
            "--set",
            "threads=1",
        )
    )
    cassette = world.root / "cassette.jsonl"
    cassette.write_text(world.bascule("log", "live", "--type", "trajectory.logged", "--json").stdout)
    return {"report": report, "cassette": cassette}


@pytest.fixture(scope="session")
def unkilled(world: World, recorded: dict[str, Any]) -> dict[str, Any]:
    """The cassette run that nothing disturbs."""
    report: dict[str, Any] = world.json(*world.cassette_run(recorded["cassette"]), home="unkilled")
    return report
