"""The data of four tasks, from the pinned wheel of sia-agent 0.6.0. Its members are read as data, none is imported.

Under ``sia/tasks/NAME/data/`` lie ``public/``, ``private/`` (answers: for private faces only) and, for lawbench,
``training_data/``.
"""

from __future__ import annotations

import csv
import io
import zipfile
from typing import Any

import msgspec

from bascule.plugins.wheels import Wheel, fetch_wheel

WHEEL = Wheel("sia-agent", "0.6.0", "10a186ea66d83a7278d911e913fb6a964cb48a8795625814b736e220a4b56961")
FOUND_IN = f"the wheel {WHEEL.name} {WHEEL.version} on PyPI"

Row = dict[str, str]


def kept_name(task: str, layout: str, seed: int) -> str:
    """The name in the cache of what a task makes of its data: it follows from all that this depends on.

    Args:
        layout: the task's own version of its splits and of the layout of its files.
        seed: of its splits.
    """
    return f"{task}-{WHEEL.version}-{layout}-s{seed}"


def member(task: str, name: str) -> bytes:
    """The bytes of ``sia/tasks/TASK/data/NAME``.

    Raises:
        ConfigError: the wheel cannot be had, or is another one than the pinned.
    """
    with zipfile.ZipFile(fetch_wheel(*WHEEL, task=task)) as archive:
        return archive.read(f"sia/tasks/{task}/data/{name}")


def rows(task: str, name: str) -> list[Row]:
    """A CSV member, a dictionary for each row; errors as in :func:`member`."""
    return list(csv.DictReader(io.StringIO(member(task, name).decode("utf-8"), newline="")))


def records(task: str, name: str) -> Any:
    """A JSON member, decoded; errors as in :func:`member`."""
    return msgspec.json.decode(member(task, name))
