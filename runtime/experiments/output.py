"""A comparison as files: JSON, CSV and a picture."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from bascule.plugins.whole import whole_file
from bascule.runtime.experiments.comparison import Comparison, Estimate, Row, RunLine
from bascule.schemas.errors import ConfigError
from bascule.schemas.landscape import Interval

NAMES = ("table.json", "table.csv", "table.png")


class _Table(msgspec.Struct):
    """What is read of a table that is there."""

    runs: tuple[RunLine, ...]


def check_folder(folder: Path) -> None:
    """Make the folder, and see that the files can be written there.

    Raises:
        ConfigError: they cannot.
    """
    step = "Give --out a folder that can be written."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        taken = [p for name in NAMES if (p := folder / name).exists() and not (p.is_file() and os.access(p, os.W_OK))]
    except (FileExistsError, NotADirectoryError) as e:
        raise ConfigError(f"The table cannot be written to {folder}: that is no folder.", next_step=step) from e
    except OSError as e:
        raise ConfigError(f"The table cannot be written to {folder}: {e.strerror or e}.", next_step=step) from e
    if taken:
        raise ConfigError(f"The table cannot be written: {taken[0]} is no file to write.", next_step=step)


def write_files(found: Comparison, folder: Path) -> Comparison:
    """Write the three files into the folder; the comparison comes back with their paths.

    What is there is left as it is where a run is refused, or where the table there has a completed run that this one
    lacks. Then the comparison comes back without paths, and with a note that says so.
    """
    if (why := _left(found, folder)) is not None:
        note = f"no table was written, and what is in {folder} is as it was: {why}"
        return msgspec.structs.replace(found, notes=(*found.notes, note))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in NAMES]
    told = msgspec.structs.replace(found, files=tuple(str(p) for p in paths))
    picture = io.BytesIO()
    draw(found, picture)
    table = msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n"
    # The table last: by it the files of another are judged.
    for path, data in zip(reversed(paths), (picture.getvalue(), as_csv(found).encode(), table), strict=True):
        with whole_file(path, mode=0o644) as file:
            file.write(data)
    return told


def _left(found: Comparison, folder: Path) -> str | None:
    """Why the files of a folder are left as they are; None where they give way, or there are none."""
    refused = sum(line.status == "refused" for line in found.runs)
    if refused:
        return f"{refused} {'run is' if refused == 1 else 'runs are'} refused"
    try:
        there = msgspec.json.decode((folder / NAMES[0]).read_bytes(), type=_Table)
    except (FileNotFoundError, msgspec.DecodeError):  # none, or one whose writing was cut off
        return None
    lost = sorted(_completed(there.runs) - _completed(found.runs))
    if lost:
        return f"its table also has {', '.join(lost)}. Ask for these runs as well, or give another folder with --out"
    return None


def _completed(runs: Iterable[RunLine]) -> set[str]:
    return {line.run for line in runs if line.status == "completed"}


def as_csv(found: Comparison) -> str:
    """A line for each arm; empty where there is no figure."""
    lines = [dict(_cells(row, found.baselines)) for row in found.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _cells(row: Row, baselines: Iterable[str]) -> Iterable[tuple[str, object]]:
    yield from (("arm", row.arm), ("kind", row.kind), ("levers", "+".join(row.levers)), ("votes", row.votes))
    yield from (("asked", row.asked), ("completed", row.completed))
    scores = {
        "dev_before": row.dev_before,
        "dev_after": row.dev_after,
        "sealed_before": row.before,
        "sealed_after": row.after,
        "pass_at_n": row.oracle,
    }
    for name, value in scores.items():
        yield from _estimate_cells(name, value)
    against = {d.against: d for d in row.differences}
    for name in baselines:
        d = against.get(name)
        yield from _estimate_cells(f"minus_{name}", d.estimate if d else None)
        yield f"minus_{name}_p_seeds", d.p_seeds if d else None
        yield f"minus_{name}_p_items", d.p_items if d else None
    yield "tokens_an_item", row.tokens
    parts = {"loop": row.spent, "sealed": row.sealed}
    parts |= {lever: row.levers_spent.get(lever) for lever in ("harness", "weights")}
    for name, spent in parts.items():
        for figure in ("rollouts", "tokens", "seconds"):
            yield f"{name}_{figure}", getattr(spent, figure) if spent is not None else None
    for figure in ("generations", "rollouts", "tokens", "seconds", "gpu_seconds", "dollars"):
        yield f"bound_{figure}", row.bounds.get(figure)
    yield "algorithms", counted(row.algorithms)
    yield "promotions", counted(row.promotions)


def _estimate_cells(name: str, value: Estimate | None) -> Iterable[tuple[str, object]]:
    yield name, value.mean if value else None
    for kind in ("over_seeds", "pooled"):
        interval = getattr(value, kind) if value else None
        yield f"{name}_{kind}_low", interval.low if interval else None
        yield f"{name}_{kind}_high", interval.high if interval else None


def counted(found: dict[str, int]) -> str:
    """``grpo 3, ppo 1``."""
    return ", ".join(f"{name} {n}" for name, n in sorted(found.items(), key=lambda x: (-x[1], x[0])))


def draw(found: Comparison, file: BinaryIO) -> None:
    """Draw sealed scores by arm, and differences to the baselines, with pooled 95% intervals, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in found.rows if r.after is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.5 * max(2, len(rows))), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        assert row.after is not None
        if row.before is not None:
            left.plot([row.before.mean], [y], "|", ms=14, c="#9aa7b4", label="before")
        left.errorbar(
            [row.after.mean], [y], xerr=_errors(row.after.mean, row.after.pooled), fmt="o", c="#1b7f5c", capsize=3,
            label="after",
        )  # fmt: skip
        seeds = row.after.seeds
        left.plot(seeds, [y] * len(seeds), ".", ms=4, c="#444444", label="a seed")
        if row.oracle is not None:
            left.plot([row.oracle.mean], [y], "x", c="#c0392b", label="pass@n, an upper bound")
    left.set_yticks(range(len(rows)), [r.arm for r in reversed(rows)])
    left.set(xlabel="sealed score", title=found.name + (" (quick)" if found.quick else ""))
    named = {label: handle for handle, label in zip(*left.get_legend_handles_labels(), strict=True)}
    if named:
        left.legend(named.values(), named.keys(), fontsize=7, loc="best")
    left.margins(y=0.15)
    left.set_xlim(left=min(0.0, left.get_xlim()[0]))
    bars = [(r.arm, d) for r in reversed(rows) for d in reversed(r.differences)]
    for y, (_, d) in enumerate(bars):
        mean = d.estimate.mean
        right.errorbar([mean], [y], xerr=_errors(mean, d.estimate.pooled), fmt="o", c="#4a6fa5", capsize=3)
    right.axvline(0, lw=0.8, c="#444444")
    labels = [f"{arm} − {d.against}" + (" (one seed)" if len(d.estimate.seeds) == 1 else "") for arm, d in bars]
    right.set_yticks(range(len(bars)), labels, fontsize=8)
    right.set(xlabel="difference of sealed scores", title="95% over seeds and items")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _errors(mean: float, interval: Interval | None) -> list[list[float]] | None:
    return None if interval is None else [[max(0.0, mean - interval.low)], [max(0.0, interval.high - mean)]]
