"""What kernels of the task ``trimul`` are called with: shapes, distributions, masks, and which split has which.

Sizes are named as in AlphaFold 2: a pair representation ``x`` of [batch, n, n, dim] and ``hidden`` channels within.
"""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from bascule.schemas.events import Split

HIDDEN = 128


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of call.

    Attributes:
        distribution: of ``x`` before the scale and shift of its channels: standard normal, or Cauchy of scale 2.
        masked: half of the mask's entries are 0, at random; otherwise all are 1.
    """

    n: int
    batch: int
    dim: int
    distribution: Literal["normal", "cauchy"] = "normal"
    masked: bool = False
    hidden: int = HIDDEN

    @property
    def name(self) -> str:
        kind = self.distribution + ("-masked" if self.masked else "")
        return f"n{self.n}-b{self.batch}-d{self.dim}-{kind}"

    @property
    def output_bytes(self) -> int:
        return 4 * self.batch * self.n * self.n * self.dim

    @property
    def operations(self) -> float:
        """Floating-point operations that no kernel can do without; entries that the mask removes are left out."""
        kept = 0.5 if self.masked else 1.0
        pairs = self.batch * self.n * self.n
        projections = 2.0 * pairs * self.dim * self.hidden * (4 * kept + 2)
        return projections + 2.0 * pairs * self.n * self.hidden * kept * kept


def case(n: int, batch: int, dim: int, kind: str = "normal") -> Case:
    distribution, _, masked = kind.partition("-")
    return Case(
        n=n,
        batch=batch,
        dim=dim,
        distribution="cauchy" if distribution == "cauchy" else "normal",
        masked=bool(masked),
    )


#: Three cases to an example; no n stands in two splits. A case takes the reference 20 to 60 ms on a core of 2024.
FULL: dict[Split, tuple[tuple[Case, ...], ...]] = {
    "train": (
        (case(64, 1, 128), case(56, 1, 192, "cauchy"), case(40, 2, 160, "normal-masked")),
        (case(72, 1, 128, "cauchy-masked"), case(60, 1, 160), case(44, 2, 128, "cauchy")),
    ),
    "dev": (
        (case(66, 1, 128), case(54, 1, 192, "cauchy-masked"), case(42, 2, 160)),
        (case(70, 1, 128, "cauchy"), case(58, 1, 160, "normal-masked"), case(46, 2, 128)),
        (case(74, 1, 128, "normal-masked"), case(50, 1, 256, "cauchy"), case(38, 3, 128)),
        (case(66, 1, 160, "cauchy-masked"), case(54, 1, 224), case(42, 2, 192, "normal-masked")),
        (case(70, 1, 144), case(58, 1, 192, "cauchy"), case(46, 2, 144, "cauchy-masked")),
        (case(74, 1, 112, "cauchy"), case(50, 1, 288, "normal-masked"), case(38, 3, 144, "cauchy")),
    ),
    "sealed": (
        (case(65, 1, 128, "cauchy"), case(55, 1, 192), case(41, 2, 160, "cauchy-masked")),
        (case(71, 1, 128), case(59, 1, 160, "cauchy"), case(45, 2, 128, "normal-masked")),
        (case(73, 1, 128, "cauchy-masked"), case(51, 1, 256, "normal-masked"), case(37, 3, 128)),
        (case(65, 1, 160, "normal-masked"), case(55, 1, 224, "cauchy"), case(41, 2, 192)),
        (case(71, 1, 144, "cauchy"), case(59, 1, 192, "normal-masked"), case(45, 2, 144)),
        (case(73, 1, 112), case(51, 1, 288, "cauchy-masked"), case(37, 3, 144, "normal-masked")),
    ),
}

#: For trying out and for tests: correctness is the same, but calls this short cannot be told apart by a clock.
SMALL: dict[Split, tuple[tuple[Case, ...], ...]] = {
    "train": ((case(24, 1, 64),), (case(20, 1, 64, "cauchy"),)),
    "dev": tuple((case(n, 1, 64, kind),) for n in (18, 22, 26) for kind in ("normal", "cauchy-masked")),
    "sealed": tuple((case(n, 1, 64, kind),) for n in (17, 21, 25) for kind in ("cauchy", "normal-masked")),
}

SIZES: dict[str, dict[Split, tuple[tuple[Case, ...], ...]]] = {"full": FULL, "small": SMALL}


def probes(source: random.Random, largest: int = 40) -> list[Case]:
    """Cases for correctness alone, which no description names: the smallest, odd ones, both distributions and masks."""
    odd = [source.randrange(3, largest, 2) for _ in range(2)]
    dims = [source.choice((32, 48, 72, 96, 136, 200)) for _ in range(4)]
    return [
        Case(n=odd[0], batch=1, dim=dims[0], distribution="cauchy", masked=True),
        Case(n=odd[1], batch=source.randint(2, 3), dim=dims[1]),
        Case(n=source.randint(3, largest), batch=1, dim=dims[2], masked=True),
        Case(n=source.randint(1, 2), batch=source.randint(1, 2), dim=dims[3], distribution="cauchy"),
    ]
