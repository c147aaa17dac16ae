"""What a benchmark reports: figures with their baselines from the same run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        value: median over ``n`` repetitions.
        unit: of ``value``.
        baseline: what it is compared with, measured in the same run; None where there is nothing to compare.
        ratio: how many times better than the baseline; above 1 is better.
        spread: (largest - smallest) / median over the repetitions.
        n: repetitions.
    """

    value: float
    unit: str
    baseline: str | None
    ratio: float | None
    spread: float
    n: int


def figure(values: Sequence[float], unit: str, *, baseline: str | None = None, ratio: float | None = None) -> Figure:
    """A figure from repeated measurements."""
    middle = statistics.median(values)
    return Figure(middle, unit, baseline, ratio, (max(values) - min(values)) / middle if middle else 0.0, len(values))


def machine() -> dict[str, str | int]:
    """The machine that was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def show(bench: str, figures: dict[str, Figure], notes: Sequence[str] = (), *, as_json: bool) -> None:
    """Print a table for people, or one JSON object."""
    if as_json:
        shown = {k: asdict(f) for k, f in figures.items()}
        print(json.dumps({"bench": bench, "machine": machine(), "figures": shown, "notes": list(notes)}))
        return
    table = Table(title=f"{bench} on {machine()['cpu']}, {machine()['cores']} cores")
    for column in ("figure", "value", "unit", "times baseline", "baseline", "spread", "n"):
        table.add_column(column, justify="left" if column in ("figure", "unit", "baseline") else "right")
    for name, f in figures.items():
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        table.add_row(name, f"{f.value:.3g}", f.unit, ratio, f.baseline or "", f"{f.spread:.0%}", str(f.n))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note)
