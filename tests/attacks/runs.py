"""Short real runs as processes, in a home and a cache of their own, and what is searched of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.plugin_site import install_plugin

HERE = Path(__file__).parent
_CONSTANT = ("--engine", "constant", "--set", 'engine.params.text="7"', "--levers", "harness")
_SECONDS = 1800


class Failed(Exception):
    """A command did something else than was asked of it."""


class Place:
    """A home, plugins and the present cache.

    Args:
        plugins: names of the plugins beside this file that are installed.
    """

    def __init__(self, folder: Path, *plugins: str) -> None:
        self.home = folder / "home"
        self._site = folder / "site"
        self._site.mkdir()
        for name in plugins:
            install_plugin(self._site, name, (HERE / "plugins" / f"{name}.py").read_text(encoding="utf-8"))

    def bascule(self, *arguments: str, expected: int = 0) -> str:
        """The output of a command.

        Raises:
            Failed: its status is another than ``expected``.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_") or k == "BASCULE_CACHE"}
        own = {"BASCULE_HOME": str(self.home), "PYTHONPATH": str(self._site)}
        ran = subprocess.run(
            [sys.executable, "-m", "bascule.runtime.cli", *arguments],
            env={**kept, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if ran.returncode != expected:
            raise Failed(f"bascule {' '.join(arguments)}: status {ran.returncode}. {ran.stderr[-1500:]}")
        return ran.stdout

    def run(self, name: str, *arguments: str) -> None:
        self.bascule("run", *arguments, *_CONSTANT, "--run-id", name, "--json")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bascule("log", name, "--json").splitlines()]

    def exported(self, name: str, to: Path) -> Path:
        self.bascule("export", name, "--to", str(to))
        return to

    def searched(self, name: str, *paths: Path, leaks: bool = False) -> dict[str, Any]:
        """The report of ``bascule canaries``.

        Raises:
            Failed: it says another thing than ``leaks``.
        """
        out = self.bascule("canaries", name, *map(str, paths), "--json", expected=1 if leaks else 0)
        found: dict[str, Any] = json.loads(out)
        return found
