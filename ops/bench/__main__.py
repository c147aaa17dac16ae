"""``python -m ops.bench NAME [--json]``, from the root of the repository."""

from __future__ import annotations

import argparse
import importlib

from ops.bench.report import show

BENCHES = ("engine", "log", "loop")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench", description="Measure, beside a baseline in the same run."
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures, notes = importlib.import_module(f"ops.bench.{arguments.bench}").run()
    show(arguments.bench, figures, notes, as_json=arguments.json)


if __name__ == "__main__":
    main()
