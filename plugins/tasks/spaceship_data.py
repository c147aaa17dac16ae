"""The rows of Spaceship Titanic: from a pinned wheel into the cache, public and private parts in separate folders.

Labels of dev and sealed are written among the kept truths alone, and nothing here that serves the public face opens
those.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bascule.plugins.tasks import sia_data
from bascule.plugins.tasks.sia_data import WHEEL, Row
from bascule.plugins.tasks.splits import seeded_order
from bascule.plugins.tasks.truths import Truths, kept_truths
from bascule.plugins.wheels import cache_folder
from bascule.plugins.whole import whole_folder
from bascule.schemas.errors import ConfigError

NAME = "spaceship-titanic"
SOURCE = "Kaggle competition 'Spaceship Titanic' (2022) in the MLE-bench split, from the wheel sia-agent 0.6.0 on PyPI"
LICENCE = "the wheel is MIT; the rows are Kaggle's, under the rules of the competition; nothing is redistributed here"
ANSWER = "Transported"
DEV_ROWS = 400
#: Raised when the split or the layout of the cached files changes.
LAYOUT = "1"


def group_of(row: Row) -> str:
    """The travel group: ``gggg`` of the id ``gggg_pp``."""
    return row["PassengerId"].partition("_")[0]


def split_rows(labelled: Sequence[Row], held_out: Sequence[Row], seed: int) -> tuple[dict[str, list[Row]], int]:
    """Split whole groups by a seeded hash.

    Args:
        labelled: rows of the training file.
        held_out: rows of sealed, which stay in their order.

    Returns:
        The rows by split, and how many labelled rows were dropped because their group is held out.
    """
    straddling = {group_of(r) for r in held_out}
    groups: dict[str, list[Row]] = {}
    for row in labelled:
        if group_of(row) not in straddling:
            groups.setdefault(group_of(row), []).append(row)
    dev: list[Row] = []
    train: list[Row] = []
    for name in seeded_order(groups, str, f"spaceship-titanic {seed}"):
        # A group that would overfill dev goes to train, so that dev is as large as it says.
        (dev if len(dev) + len(groups[name]) <= DEV_ROWS else train).extend(groups[name])
    dropped = len(labelled) - len(dev) - len(train)
    return {"train": train, "dev": dev, "sealed": list(held_out)}, dropped


def public_rows(seed: int) -> dict[str, list[Row]]:
    """Rows by split; only those of train have the answer.

    Raises:
        ConfigError: the wheel cannot be had.
    """
    folder = _folder(seed) / "public"
    if not folder.exists():
        rows, _ = split_rows(_member("public/train.csv"), _member("public/test.csv"), seed)
        questions = {
            split: [{k: v for k, v in row.items() if split == "train" or k != ANSWER} for row in found]
            for split, found in rows.items()
        }
        _publish(folder, questions)
    return {split: _read(folder / f"{split}.csv") for split in ("train", "dev", "sealed")}


def private_truths(seed: int) -> Truths:
    """Answers by split and passenger; for the scoring process.

    Raises:
        ConfigError: the wheel cannot be had.
    """

    def make() -> Truths:
        rows, _ = split_rows(_member("public/train.csv"), _member("private/test.csv"), seed)
        return {split: {row["PassengerId"]: row[ANSWER] for row in found} for split, found in rows.items()}

    return kept_truths(NAME, sia_data.kept_name(NAME, LAYOUT, seed), make)


def _folder(seed: int) -> Path:
    return cache_folder() / "tasks" / sia_data.kept_name(NAME, LAYOUT, seed)


def _member(name: str) -> list[Row]:
    rows = sia_data.rows(NAME, name)
    if len({row["PassengerId"] for row in rows}) != len(rows):
        raise ConfigError(f"{name} of {WHEEL.name} names a passenger twice.", next_step="Use the pinned wheel.")
    return rows


def _publish(folder: Path, rows: dict[str, list[Row]]) -> None:
    """Write the splits of the public face; where another process is first, it has the same bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), whole_folder(folder) as made:
        for split, found in rows.items():
            with (made / f"{split}.csv").open("w", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, fieldnames=list(found[0]))
                writer.writeheader()
                writer.writerows(found)


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))
