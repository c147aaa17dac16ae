"""``python -m tests.faults``: inject every fault and print one table; the exit status is 1 if a promise broke."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tests.faults.catalog import FAULTS
from tests.faults.fault import Fault, Outcome, Setting


class Row(msgspec.Struct, frozen=True):
    """A line of the table; ``seconds`` is the wall-clock time of the fault."""

    fault: Fault
    outcome: Outcome
    seconds: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=[f.name for f in FAULTS], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer of each")
    options = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if options.only is None or f.name in options.only]
    chosen = [f for f in chosen if f.quick or not options.quick]
    rows = [played(fault, seed=options.seed, quick=options.quick) for fault in chosen]
    # Wide, so that no cell is cut where the output is no terminal.
    Console(width=160, highlight=False).print(table(rows))
    for row in rows:
        for problem in row.outcome.broken:
            print(f"{row.fault.name}: {problem}", file=sys.stderr)
    return 0 if all(row.outcome.kept for row in rows) else 1


def played(fault: Fault, *, seed: int, quick: bool) -> Row:
    """Inject a fault in a folder of its own. A crash of the load is a broken promise, too."""
    print(f"{fault.name}: {fault.does}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"fault-{fault.name}-") as folder:
        setting = Setting(folder=Path(folder), seed=seed, count=fault.quick if quick else fault.full, say=_say)
        try:
            outcome = asyncio.run(fault.inject(setting))
        except Exception:  # the other faults are still to be injected
            traceback.print_exc()
            outcome = Outcome(injected=setting.count, broken=("the load failed, see above",))
    return Row(fault, outcome, time.monotonic() - begin)


def table(rows: Sequence[Row]) -> Table:
    drawn = Table("fault", "injected", "lost", "duplicated", "detected", "decisions equal", "kept", "seconds", "note")
    for column in drawn.columns[1:4]:
        column.justify = "right"
    for row in rows:
        o = row.outcome
        drawn.add_row(
            row.fault.name,
            *(str(n) for n in (o.injected, o.lost, o.duplicated)),
            "" if o.detected is None else f"{o.detected}, {o.harmless} harmless, {o.silent} silent",
            "" if o.equal is None else ("yes" if o.equal else "NO"),
            "skipped" if o.skipped else ("yes" if o.kept else "NO"),
            f"{row.seconds:.1f}",
            o.skipped or o.note,
        )
    return drawn


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
