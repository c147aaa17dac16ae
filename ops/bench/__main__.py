"""``python -m ops.bench NAME [--json]``, from the root of the repository."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from ops.bench.report import show

BENCHES = ("algorithms", "engine", "gate", "landscape", "log", "loop", "publish", "sandbox", "selector", "train")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench", description="Measure, beside a baseline in the same run."
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--home", type=Path, help="algorithms, selector: keep the runs here, and make only those that are missing"
    )
    parser.add_argument("--quick", action="store_true", help="selector: one seed, one draw")
    arguments = parser.parse_args()
    given = {"home": arguments.home} if arguments.home else {}
    given |= {"quick": True} if arguments.quick else {}
    figures, notes = importlib.import_module(f"ops.bench.{arguments.bench}").run(**given)
    show(arguments.bench, figures, notes, as_json=arguments.json)
    if any(note.startswith(("FAIL", "UNDER")) for note in notes):
        sys.exit(1)


if __name__ == "__main__":
    main()
