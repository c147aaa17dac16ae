"""A batch: the episodes of one harness that share what its ``prepare`` made, once.

A batch sees all items of its evaluation: the process that forks its episodes has run code of the harness, and is there
as long as they are. Its episodes are sealed off from one another, and not from it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from bascule.plugins.task import PublicFace
from bascule.schemas.events import Split
from bascule.schemas.harness import Harness


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What ``prepare`` is run on.

    Attributes:
        key: whose episodes these are, such as an evaluation's name; those of one key and one harness share a batch.
        data: what ``prepare`` gets: ``id``, ``input`` and ``answer`` of each item.
        seed: of ``prepare``'s own randomness.
    """

    key: str
    data: tuple[dict[str, Any], ...] = ()
    seed: int = 0


def batch_of(
    harness: Harness, public: PublicFace, split: Split, positions: Collection[int], *, key: str, seed: int
) -> Batch | None:
    """The batch of an evaluation; None for a harness whose episodes share nothing.

    Args:
        positions: everything that the evaluation asks, all its shards together. What it asks of ``train`` is left out
            of the data, and so is what is in one group with that: a group is what must not straddle a split.
    """
    manifest = harness.manifest
    if manifest.isolation != "batch":
        return None
    if manifest.data != "train":
        return Batch(key=key, seed=seed)
    asked = {public.train[p].group for p in positions} if split == "train" else set()
    data = tuple(
        {"id": e.id, "input": e.input, "answer": public.answers[e.id]} for e in public.train if e.group not in asked
    )
    return Batch(key=key, data=data, seed=seed)
