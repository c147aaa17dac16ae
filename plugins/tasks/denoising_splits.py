"""Counts split into those that a program sees and those that are held out; made where scores are made, nowhere else.

Nine of ten molecules are seen, each by chance. A program that knew the seed and the order of the draws could make them
again and take the held-out counts from the difference. So the seed is secret, and cells and genes come in a secret
order, which also guards the published split, whose seed everybody knows.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.int32]

SEEN = 0.9


class Parted(NamedTuple):
    """What a program sees and what is held out, both cells x genes; genes without train counts are left out."""

    train: Counts
    test: Counts


def secret(key: bytes, example: str) -> bytes:
    """The secret of an example: 32 bytes that follow from this machine's private key."""
    return hmac.new(key, f"denoising\0{example}".encode(), hashlib.sha256).digest()


def parted(counts: Counts, secret: bytes, seed: int | None = None) -> Parted:
    """Split counts.

    Args:
        counts: cells x genes.
        secret: the order of cells and genes follows from it, and the draws where ``seed`` is None.
        seed: of the published split (``RandomState(seed).binomial(counts, 0.9)`` over the whole matrix).
    """
    import numpy as np

    private = np.random.Generator(np.random.PCG64(int.from_bytes(secret, "big")))
    if seed is None:
        train = private.binomial(counts, SEEN).astype(np.int32)
    else:
        train = np.random.RandomState(seed).binomial(counts, SEEN).astype(np.int32)
    test = counts - train
    found = train.sum(0) > 0
    cells, genes = private.permutation(len(counts)), private.permutation(np.flatnonzero(found))
    order = np.ix_(cells, genes)
    return Parted(train[order], test[order])
