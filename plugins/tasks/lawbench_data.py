"""LawBench's charges: cases and labels from the pinned wheel, near-duplicates found once, splits.

``sealed`` is the 913 cases of the test file. Training cases that are near-duplicates of one of them are in no split.
``dev`` is a fold of the rest. Cases that are near-duplicates of each other are one group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from bascule.plugins.tasks import sia_data
from bascule.plugins.tasks.lawbench_duplicates import components, near_duplicates
from bascule.plugins.tasks.truths import Truths
from bascule.plugins.wheels import cache_folder
from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError

NAME = "lawbench"
#: A larger fold would take the classifiers more than they can spare.
DEV_CASES = 250
#: Raised when the splits or the cached file change.
LAYOUT = "1"


class Case(msgspec.Struct, frozen=True):
    """One case: the facts as the prosecution or the court states them; ``charge`` is empty where it is not public."""

    id: str
    group: str
    text: str
    charge: str = ""


class Duplicates(msgspec.Struct, frozen=True):
    """What near-duplicates were found.

    Attributes:
        dropped: ids of training cases that are near one of the test file, sorted.
        groups: group by id, for cases of either file that are not their group's first.
    """

    dropped: tuple[str, ...]
    groups: dict[str, str]


def charges() -> tuple[str, ...]:
    """The 191 charges: an answer is one of these strings."""
    return tuple(sia_data.records(NAME, "public/classes.json"))


def found_duplicates(labelled: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> Duplicates:
    """Near-duplicates among training and test cases, each given by id and text."""
    every = [*labelled, *asked]
    n = len(labelled)
    pairs = near_duplicates([text for _, text in every])
    dropped = {i for i, j in pairs if i < n <= j}
    # A case that is only near a dropped one stays, and chains through dropped ones link nothing.
    linked = components(len(every), [p for p in pairs if dropped.isdisjoint(p)])
    groups = {every[i][0]: every[first][0] for i, first in enumerate(linked) if first != i}
    return Duplicates(dropped=tuple(sorted(every[i][0] for i in dropped)), groups=groups)


def split_cases(labelled: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    """Train and dev: a systematic sample within each charge, by whole groups.

    A charge's groups are put in a seeded order, spread evenly over [0, 1) from a seeded offset, and dev takes what
    comes first: every charge gives its share, to within one case.
    """

    def drawn(*parts: object) -> bytes:
        return hashlib.sha256("\0".join(map(str, (NAME, seed, *parts))).encode()).digest()

    groups: dict[str, list[Case]] = {}
    for case in labelled:
        groups.setdefault(case.group, []).append(case)
    by_charge: dict[str, list[str]] = {}
    for name in sorted(groups, key=lambda g: drawn("group", g)):
        by_charge.setdefault(groups[name][0].charge, []).append(name)
    place: dict[str, float] = {}
    for charge, names in by_charge.items():
        offset = int.from_bytes(drawn("charge", charge)[:6], "big") / 2**48
        place |= {name: (i + offset) / len(names) for i, name in enumerate(names)}
    chosen: set[str] = set()
    size = 0
    for name in sorted(place, key=lambda g: (place[g], g)):
        if size + len(groups[name]) <= DEV_CASES:
            chosen.add(name)
            size += len(groups[name])
    ordered = sorted(labelled, key=lambda c: drawn("order", c.id))
    return [c for c in ordered if c.group not in chosen], [c for c in ordered if c.group in chosen]


def public_cases(seed: int) -> dict[str, list[Case]]:
    """The cases by split; only those of train have their charge.

    Raises:
        ConfigError: the wheel cannot be had.
    """
    duplicates = _duplicates()
    train, dev = split_cases(_labelled(duplicates), seed)
    return {
        "train": train,
        "dev": [Case(id=c.id, group=c.group, text=c.text) for c in dev],
        "sealed": [
            Case(id=i, group=duplicates.groups.get(i, i), text=text) for i, text in _texts("public/test.csv", "test")
        ],
    }


def truths(seed: int) -> Truths:
    """The charges by split and case; for the scoring process.

    Raises:
        ConfigError: the wheel cannot be had.
    """
    train, dev = split_cases(_labelled(_duplicates()), seed)
    return {
        "train": {c.id: c.charge for c in train},
        "dev": {c.id: c.charge for c in dev},
        "sealed": {f"test-{row['id']}": row["label"] for row in sia_data.rows(NAME, "private/test.csv")},
    }


def _texts(member: str, prefix: str) -> list[tuple[str, str]]:
    return [(f"{prefix}-{row['id']}", row["text"]) for row in sia_data.rows(NAME, member)]


def _labelled(duplicates: Duplicates) -> list[Case]:
    dropped = set(duplicates.dropped)
    rows = [(f"train-{row['id']}", row) for row in sia_data.rows(NAME, "training_data/train.csv")]
    return [
        Case(id=i, group=duplicates.groups.get(i, i), text=row["text"], charge=row["label"])
        for i, row in rows
        if i not in dropped
    ]


def _duplicates() -> Duplicates:
    """The near-duplicates of the two files, from the cache or else found now (some seconds)."""
    path = cache_folder() / "tasks" / f"{NAME}-{sia_data.WHEEL.version}-{LAYOUT}-duplicates.json"
    if not path.exists():
        found = found_duplicates(_texts("training_data/train.csv", "train"), _texts("public/test.csv", "test"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, mode=0o644) as file:
            file.write(msgspec.json.encode(found))
    try:
        return msgspec.json.decode(path.read_bytes(), type=Duplicates)
    except msgspec.DecodeError as e:
        raise ConfigError(f"{path} is damaged: {e}.", next_step="Delete it; it is made again.") from e
