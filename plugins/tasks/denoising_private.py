"""The private face of the task ``denoising``: splits counts, runs programs on what is seen, scores what they return."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bascule.plugins.sandbox import Program, Programs, Ran
from bascule.plugins.tasks.denoising_results import NotAMatrix, matrix
from bascule.plugins.tasks.denoising_scores import Bounds, Figures, Mode, bounds, figures, reward
from bascule.plugins.tasks.denoising_splits import Parted, parted, secret
from bascule.schemas.errors import ScoringError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 16 * 1024
PACKAGES = ("numpy", "scipy", "scikit-learn")
DRIVER = Path(__file__).with_name("denoising_driver.py").read_bytes()
_MEMORY_MB = 3072
#: What splitting and scoring take besides the program, s; generous for slow machines.
_OWN_SECONDS = 120.0


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """Where the counts of an example come from.

    Attributes:
        data: name of the data set.
        seed: of the published split; None: the split is private.
    """

    data: str
    seed: int | None = None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict, the figures that it comes from where there are any, and why it is 0 where a rule made it so."""

    verdict: Verdict
    figures: Figures | None = None
    reason: str = ""


class DenoisingPrivate:
    """See the module's docstring; opened in the scoring process only.

    Args:
        cuts: by split and example.
        data: counts, cells x genes, by data set.
        key: this machine's private key.
        mode: of the score.
        limit: wall-clock limit of a program, s; a third of it is the budget that it is told.
    """

    def __init__(
        self,
        cuts: Mapping[tuple[Split, str], Cut],
        data: Mapping[str, NDArray[np.int32]],
        key: bytes,
        *,
        mode: Mode = "strict",
        limit: float = 60.0,
    ) -> None:
        self.seconds = limit + _OWN_SECONDS
        self._cuts = cuts
        self._data = data
        self._key = key
        self._mode = mode
        self._limit = limit
        self._programs: Programs | None = None
        self._bounds: dict[tuple[Split, str], Bounds] = {}
        self._last: tuple[tuple[Split, str], Parted] | None = None

    def use(self, programs: Programs) -> None:
        self._programs = programs

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """Run one program on one example; see :meth:`judge`.

        Raises:
            KeyError: the split has no such example.
            ScoringError: there is nothing to run programs with.
        """
        return self.judge(split, example, answer).verdict

    def judge(self, split: Split, example: str, answer: str | None) -> Judged:
        """The verdict with its figures.

        Whatever a program does wrong is a reward of 0; Unscored is one that the sandbox could not start.

        Raises:
            KeyError, ScoringError: as :meth:`score`.
        """
        cut = self._cuts[split, example]
        if self._programs is None:
            raise ScoringError("The task denoising has no sandbox for programs.", next_step="Score it in a run.")
        text = b"" if answer is None else answer.encode("utf-8", "replace")
        if not text.strip() or len(text) > MAX_BYTES:
            return _failed(f"the answer is {len(text)} bytes; it must be a program of at most {MAX_BYTES}")
        held = self._parted(split, example, cut)
        ran = self._programs.run(_program(text, held.train, example, self._limit))
        if ran.ending == "refused":
            reason = ran.stderr.decode("utf-8", "replace")[-300:]
            return Judged(verdict=Unscored(reason=f"The sandbox could not start the program: {reason}"))
        try:
            values = matrix(_result(ran), (held.train.shape[0], held.train.shape[1]))
        except NotAMatrix as e:
            return _failed(str(e))
        against = self._bounds.setdefault((split, example), bounds(held.train, held.test))
        found = figures(held.train, held.test, values, against)
        gained, reason = reward(found, against, self._mode)
        return Judged(verdict=Scored(reward=gained, passed=gained > 0), figures=found, reason=reason)

    def _parted(self, split: Split, example: str, cut: Cut) -> Parted:
        # One at a time: baselines and samples ask the same example several times in a row, and matrices are large.
        if self._last is None or self._last[0] != (split, example):
            self._last = None
            found = parted(self._data[cut.data], secret(self._key, f"{split}\0{example}"), cut.seed)
            self._last = ((split, example), found)
        return self._last[1]


def program_seed(example: str) -> int:
    """The seed that a program gets; it tells nothing about the split."""
    return int.from_bytes(hashlib.sha256(f"denoising {example}".encode()).digest()[:4], "big") >> 1


def _program(text: bytes, train: NDArray[np.int32], example: str, limit: float) -> Program:
    entries = train.size
    return Program(
        files={"driver.py": DRIVER, "denoise.py": text, "counts.npy": _npy(train)},
        arguments=("driver.py", str(program_seed(example)), f"{limit / 3:g}"),
        packages=PACKAGES,
        seconds=limit,
        memory_mb=_MEMORY_MB + (entries * 64 >> 20),
        disk_mb=64 + (entries * 16 >> 20),
        results=("result.npy",),
        # The widest numbers that are read, and a header.
        result_bytes=entries * 8 + 4096,
    )


def _npy(values: NDArray[np.int32]) -> bytes:
    import io

    import numpy as np

    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values), allow_pickle=False)
    return out.getvalue()


def _result(ran: Ran) -> bytes:
    """The bytes of the result of a program that ended well.

    Raises:
        NotAMatrix: it did not, or left no result.
    """
    if ran.ending != "exited":
        raise NotAMatrix(f"the program was stopped ({ran.ending}) after {ran.seconds:.0f} s")
    if "result.npy" not in ran.results or ran.exit_code != 0:
        said = ran.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotAMatrix(f"the program ended with {ran.exit_code} and no result; {said[-1][:200] if said else ''}")
    return ran.results["result.npy"]


def _failed(reason: str) -> Judged:
    return Judged(verdict=Scored(reward=0.0, passed=False, well_formed=False), reason=reason)
