"""``python -m tests.attacks``: make every attack and print one table; the exit status is 1 if one succeeded."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tests import ordinary_user
from tests.attacks.attack import Attack, Outcome
from tests.attacks.catalog import ATTACKS

_SECONDS = 4 * 3600


class Row(msgspec.Struct, frozen=True):
    """A line of the table; ``seconds`` is the wall-clock time of the whole attack."""

    attack: Attack
    outcome: Outcome
    seconds: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--user", action="store_true", help="as an ordinary user, where one is root")
    parser.add_argument("--only", action="append", choices=[a.name for a in ATTACKS], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="those that the everyday tests make as well")
    options = parser.parse_args(arguments)
    if options.user and os.geteuid() == 0:
        return as_ordinary_user([a for a in arguments if a != "--user"])
    chosen = [a for a in ATTACKS if options.only is None or a.name in options.only]
    chosen = [a for a in chosen if a.quick or not options.quick]
    rows = [row for attack in chosen for row in made(attack)]
    who = "root" if os.geteuid() == 0 else f"the user {os.geteuid()}"
    # Wide, so that no cell is cut where the output is no terminal.
    Console(width=200, highlight=False).print(table(rows, f"attacks as {who}"))
    failed = [row for row in rows if not row.outcome.stopped]
    for row in failed:
        for problem in row.outcome.problems or ("the control achieved nothing, so this proves nothing",):
            print(f"{row.attack.name}, {row.outcome.place}: {problem}", file=sys.stderr)
    print(f"{len(chosen)} attacks at {len(rows)} places as {who}: {len(failed)} succeeded")
    return 1 if failed or not rows else 0


def made(attack: Attack) -> list[Row]:
    """Make an attack in a folder of its own. One that could not be made was not stopped."""
    print(f"{attack.name}: {attack.tries}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as folder:
        try:
            outcomes = asyncio.run(attack.play(Path(folder)))
        except Exception:  # the other attacks are still to be made
            traceback.print_exc()
            outcomes = []
    seconds = time.monotonic() - begin
    if not outcomes:
        outcomes = [Outcome(place="", control=None, layer="", result="", problems=("it was not made, see above",))]
    return [Row(attack, outcome, seconds) for outcome in outcomes]


def table(rows: Sequence[Row], title: str) -> Table:
    drawn = Table("attack", "where", "without protection", "stopped by", "outcome", "stopped", "seconds", title=title)
    for row in rows:
        o = row.outcome
        drawn.add_row(
            row.attack.name,
            o.place,
            "not tried" if o.control is None else (o.control or "NOTHING"),
            o.layer,
            o.result,
            "yes" if o.stopped else "NO",
            f"{row.seconds:.1f}",
        )
    return drawn


def as_ordinary_user(arguments: Sequence[str]) -> int:
    """The same from root's checkout, with what was fetched once."""
    real = Path(os.environ.get("BASCULE_CACHE") or Path.home() / ".cache" / "bascule")
    with ordinary_user.folder() as home:
        own = home / "fetched"
        for name in ("wheels", "tasks"):
            if (real / name).is_dir():
                shutil.copytree(real / name, own / name)
        for path in (own, *own.rglob("*")):
            if path.exists():
                os.chown(path, ordinary_user.UID, ordinary_user.UID)
        ran = ordinary_user.run(
            [sys.executable, "-m", "tests.attacks", *arguments],
            home=home,
            environment={"BASCULE_CACHE": str(own)},
            seconds=_SECONDS,
        )
    print(ran.stdout)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
