"""Records the golden logs that are not there yet: ``python -m tests.golden.make``.

An existing one is never written again: it stands for the runs that people keep. What is recorded here must be
decided the same way for ever, unless whatever decides it otherwise (the gate, a policy, an author) gets a new version.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.plugin_site import install_plugin
from tests.tiny_model import make_tiny_model

HERE = Path(__file__).parent
PARITY = HERE.parent / "e2e" / "parity.py"


def install_parity(site: Path) -> None:
    """Install the plugin with the task ``parity``, as pip would lay it out."""
    install_plugin(site, "parity", PARITY.read_text())


class Recorder:
    """Runs commands in a home of their own and keeps a run's export, without blobs: replay needs none."""

    def __init__(self, root: Path) -> None:
        self._root = root
        install_parity(root / "site")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")}
        self._env = clean | {"PYTHONPATH": str(root / "site"), "BASCULE_HOME": str(root / "home")}

    def bascule(self, *args: str) -> bytes:
        command = [sys.executable, "-m", "bascule.runtime.cli", *args]
        return subprocess.run(command, env=self._env, stdout=subprocess.PIPE, check=True).stdout

    def keep(self, run: str, path: Path) -> None:
        path.write_bytes(lzma.compress(self.bascule("export", run, "--no-blobs"), preset=9 | lzma.PRESET_EXTREME))
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")

    def arith(self, path: Path) -> None:
        """Harness lever only, an engine that always answers 7."""
        small = {"dev_examples": 20, "sealed_examples": 20, "train_groups": 4, "train_samples": 2}
        settings = [f"evaluation.{k}={v}" for k, v in small.items()] + ['engine.params.text="7"']
        flags = [part for setting in settings for part in ("--set", setting)]
        engine = ["--engine", "constant", "--levers", "harness", "--max-gen", "2"]
        self.bascule("run", "--task", "arith", "--run-id", "arith", "--json", *engine, *flags)
        self.keep("arith", path)

    def parity(self, path: Path) -> None:
        """Both levers: recorded on a model with random weights, then answered by the recording."""
        model, cassette = self._root / "tiny", self._root / "cassette.jsonl"
        make_tiny_model(model)
        shared = ["--task", "parity", "--model", str(model), "--seed", "3", "--set", "threads=1", "--json"]
        self.bascule("run", "--run-id", "live", *shared)
        cassette.write_bytes(self.bascule("log", "live", "--type", "trajectory.logged", "--json"))
        answered = ["--engine", "cassette", "--set", f"engine.params.path={cassette}"]
        self.bascule("run", "--run-id", "parity", *answered, *shared)
        self.keep("parity", path)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="bascule-golden-") as root:
        recorder = Recorder(Path(root))
        for name, record in (("arith", recorder.arith), ("parity", recorder.parity)):
            path = HERE / f"{name}.tar.xz"
            if not path.exists():
                record(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
