"""What is said of a harness that fails in every episode."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import bascule


def test_a_harness_that_fails_each_time_is_named_in_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "harness.py").write_text("raise SystemExit('boom')\n")
    (folder / "manifest.json").write_text('{"name": "mine"}')
    (folder / "system_prompt.md").write_text("")
    small = ("evaluation.dev_examples=8", "evaluation.sealed_examples=8", "evaluation.train_groups=2")
    done = bascule(
        tmp_path / "home", "run", "--task", "arith", "--harness", str(folder), "--engine", "constant",
        *(x for v in ('engine.params.text="7"', *small) for x in ("--set", v)),
        "--levers", "harness", "--max-gen", "1", "--json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert any("g00-dev: 100% of 8 episodes ended in an error" in note for note in report["notes"])
    assert "100% of the episodes ended in an error" in done.stderr
