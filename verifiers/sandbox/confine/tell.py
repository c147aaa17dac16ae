"""Print what :func:`available.available` finds, as JSON. A program of its own, run by path."""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    finding = importlib.import_module("confine.available")
    sys.path.pop(0)
    print(json.dumps(finding.available(tuple(sys.argv[1:]))))


if __name__ == "__main__":
    main()
