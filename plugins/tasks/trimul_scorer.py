"""The scorer of the task ``trimul``: is a kernel right, and how much faster than the reference is it?

How a time cannot be faked:

- The clock is in the scoring process. Reference and candidate are two programs in the sandbox, each with one thread's
  worth of the same core, called in turn.
- Work cannot begin before the clock: what a worker has made of a secret seed is not the input yet; every channel's
  scale and shift, from another secret, come with the call itself.
- Work cannot go on after the clock: it stops at the SHA-256 of the output, and the output sent afterwards must have it.
- No call is like another and every output, of timed calls too, is compared here with the reference's, so that caches,
  old buffers and kernels that do their work only when they are looked at are wrong.
- A candidate that works while it should wait would slow the reference down. The reference's processor time tells, see
  :func:`~bascule.plugins.tasks.trimul_timing.compare`.
- A time that the core's own peak rate rules out is refused.

The delivery of scale and shift and the SHA-256 are in both times, which makes a speed-up look a few percent smaller.
"""

from __future__ import annotations

import ast
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from bascule.plugins.sandbox import Programs, Running
from bascule.plugins.tasks.trimul_cases import Case, probes
from bascule.plugins.tasks.trimul_kernels import REFERENCE
from bascule.plugins.tasks.trimul_link import Lost, Worker, program, started
from bascule.plugins.tasks.trimul_timing import Coarse, Compared, Times, compare, hold_up
from bascule.schemas.errors import ScoringError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict

MAX_BYTES = 16 * 1024
#: Relative and absolute tolerance of every element.
TOLERANCE = 2e-2
#: A candidate may be so many times faster than the core's measured peak rate allows, which is not exact.
PEAK_MARGIN = 4.0
#: Reference calls before and after the candidate, of each case.
ALONE = 2
#: A candidate whose call takes longer than this is not called again for an exact figure.
LONG_SECONDS = 2.0
INTERPRETED_N = 32
LIFETIME = 24 * 3600.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one answer.

    Attributes:
        reward: the speed-up, or 0.
        correct: whether every output was right.
        why: what is wrong, where something is.
        compared: the timing, where it came to that.
        unscored: why there is no verdict, where there is none.
    """

    reward: float = 0.0
    correct: bool = False
    well_formed: bool = True
    why: str = ""
    compared: Compared | None = None
    unscored: str = ""

    def verdict(self) -> Verdict:
        if self.unscored:
            return Unscored(reason=self.unscored)
        return Scored(reward=self.reward, passed=self.correct, well_formed=self.well_formed)


class _Wrong(Exception):
    """The candidate is at fault; the text says how."""


class TrimulPrivate:
    """Scores kernels. It has no answers: inputs are made from fresh secrets, and truths by the reference.

    Args:
        cases: of each split and example.
        pairs: timed pairs of an example, shared out over its cases.
        seconds: wall-clock limit of a candidate's program.
        triton: whether Triton is installed.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        cases: dict[tuple[Split, str], tuple[Case, ...]],
        *,
        pairs: int,
        seconds: float,
        triton: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cases = cases
        self._pairs = pairs
        self._limit = seconds
        self._triton = triton
        self._clock = clock
        self._programs: Programs | None = None
        self._reference: tuple[Running, Worker] | None = None
        self._peak = 0.0
        self._tick = 0.0
        #: The most seconds that one verdict takes.
        self.seconds = 4 * seconds

    def use(self, programs: Programs) -> None:
        self._programs = programs

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """The speed-up over the reference, or 0 for a kernel that is not right.

        Raises:
            KeyError: the split has no such example.
            ScoringError: the programs do not run.
        """
        return self.measure(split, example, answer).verdict()

    def measure(self, split: Split, example: str, answer: str | None) -> Measured:
        """As :meth:`score`, with all figures."""
        cases = self._cases[split, example]
        kernel = answer or ""
        try:
            triton = imports_triton(kernel)
        except _Wrong as e:
            return Measured(well_formed=False, why=str(e))
        if triton and not self._triton:
            return Measured(
                unscored="The kernel uses Triton: there is no GPU to time it on, and no Triton to check it."
            )
        for last in (False, True):
            try:
                return self._interpreted(kernel) if triton else self._measured(kernel, cases)
            except _RuntimeLost as e:
                self.close()
                if last:
                    raise ScoringError(
                        "The programs of the task trimul do not run in the sandbox.",
                        next_step="Check that torch is installed and that the machine has 4 GiB of free memory.",
                    ) from e
        raise AssertionError

    def close(self) -> None:
        """End the reference's program; the next score starts another."""
        kept, self._reference = self._reference, None
        if kept is not None:
            with contextlib.suppress(Exception):
                kept[0].__exit__(None, None, None)

    def _measured(self, kernel: str, cases: tuple[Case, ...]) -> Measured:
        before = self._alone(cases)
        with contextlib.ExitStack() as stack:
            try:
                candidate = self._candidate(stack, program(kernel, "candidate", seconds=self._limit))
                for case in probes(random.Random(secrets.randbits(64))):  # noqa: S311 - seeded from a secret
                    self._call(candidate, case, check=True)
                times = [self._times(candidate, case, -(-self._pairs // len(cases))) for case in cases]
            except _Wrong as e:
                return Measured(why=str(e))
        after = self._alone(cases)
        try:
            # Judged now, so that a wrong kernel is wrong with any clock.
            alone = max(hold_up(*calls, self._tick) for calls in (before, after))
            compared = compare(times, alone, self._tick)
        except Coarse as e:
            return Measured(correct=True, unscored=f"The kernel is right, but cannot be timed here: {e}.")
        return Measured(reward=compared.speedup, correct=True, compared=compared)

    def _interpreted(self, kernel: str) -> Measured:
        """Correctness in Triton's interpreter: no time, for there is nothing to time it on."""
        with contextlib.ExitStack() as stack:
            try:
                asked = program(kernel, "interpret", seconds=self._limit, packages=("torch", "numpy", "triton"))
                candidate = self._candidate(stack, asked)
                for case in probes(random.Random(secrets.randbits(64)), INTERPRETED_N):  # noqa: S311 - as above
                    self._call(candidate, case, check=True)
            except _Wrong as e:
                return Measured(why=str(e))
        return Measured(correct=True, unscored="The kernel is right, but uses Triton: there is no GPU to time it on.")

    def _candidate(self, stack: contextlib.ExitStack, asked: Any) -> Worker:
        running, worker = started(self._use(), asked, self._clock)
        stack.callback(running.__exit__, None, None, None)
        try:
            worker.ready()
        except Lost as e:
            # Nothing of the candidate's has run yet, so it cannot be what failed.
            raise _RuntimeLost(str(e)) from e
        try:
            loaded = worker.loaded()
        except Lost as e:
            raise _Wrong(f"kernel.py cannot be loaded: {e}") from e
        if not loaded.ok:
            raise _Wrong(loaded.why)
        return worker

    def _reference_worker(self) -> Worker:
        if self._reference is None:
            self._reference = started(self._use(), program(REFERENCE, "reference", seconds=LIFETIME), self._clock)
            try:
                ready, loaded = self._reference[1].ready(), self._reference[1].loaded()
            except Lost as e:
                raise _RuntimeLost(str(e)) from e
            if not loaded.ok:
                raise _RuntimeLost(loaded.why)
            self._peak, self._tick = ready.peak, ready.tick
        return self._reference[1]

    def _alone(self, cases: Iterable[Case]) -> tuple[list[float], list[float]]:
        """Wall and processor times of the reference while there is no candidate, s."""
        calls = [self._ask_reference(case, secrets.randbits(62), vectors(case)) for case in cases for _ in range(ALONE)]
        return [wall for wall, _, _ in calls], [processor for _, processor, _ in calls]

    def _ask_reference(self, case: Case, seed: int, with_vectors: bytes) -> tuple[float, float, str]:
        """Wall time, processor time and digest of a call."""
        worker = self._reference_worker()
        try:
            worker.prepare(case, seed, check=False)
            reply, seconds = worker.go(with_vectors)
        except Lost as e:
            raise _RuntimeLost(str(e)) from e
        if not reply.ok:
            raise _RuntimeLost(reply.why)
        return seconds, reply.cpu, reply.sha256

    def _call(self, candidate: Worker, case: Case, *, check: bool) -> tuple[float, float, float]:
        """One call of either on the same inputs, the reference first; both outputs are compared.

        Returns:
            Wall and processor time of the reference, wall time of the candidate.
        """
        seed, sent = secrets.randbits(62), vectors(case)
        try:
            # Prepared first, so that nothing lies between the two calls.
            candidate.prepare(case, seed, check=check)
            reference, processor, digest = self._ask_reference(case, seed, sent)
            reply, seconds = candidate.go(sent)
            if not reply.ok:
                raise _Wrong(f"{case.name}: {reply.why}")
            given = candidate.output(case, reply.sha256)
        except Lost as e:
            raise _Wrong(f"{case.name}: {e}") from e
        try:
            right = self._reference_worker().output(case, digest)
        except Lost as e:
            raise _RuntimeLost(str(e)) from e
        wrong = difference(given, right)
        if wrong:
            raise _Wrong(f"{case.name}: {wrong}")
        return reference, processor, seconds

    def _times(self, candidate: Worker, case: Case, pairs: int) -> Times:
        self._call(candidate, case, check=True)
        reference, processor, own = [], [], []
        for _ in range(pairs):
            wall, cpu, seconds = self._call(candidate, case, check=False)
            if seconds < case.operations / (PEAK_MARGIN * self._peak):
                raise _Wrong(f"{case.name}: {seconds * 1e3:.3f} ms is less than the core's peak rate allows")
            reference.append(wall)
            processor.append(cpu)
            own.append(seconds)
            if seconds > LONG_SECONDS:
                break
        wall, cpu, _ = self._ask_reference(case, secrets.randbits(62), vectors(case))
        return Times(reference=(*reference, wall), processor=(*processor, cpu), candidate=tuple(own))

    def _use(self) -> Programs:
        if self._programs is None:
            raise ScoringError("The scorer of trimul has nothing to run programs with.", next_step="Call use() first.")
        return self._programs


class _RuntimeLost(Exception):
    """The reference's program or the sandbox failed, which is nobody's fault who is scored."""


def imports_triton(kernel: str) -> bool:
    """Whether a kernel's text imports Triton.

    Raises:
        _Wrong: it is no kernel's text at all.
    """
    if not kernel.strip():
        raise _Wrong("there is no answer")
    if len(kernel.encode()) > MAX_BYTES:
        raise _Wrong(f"the text is over {MAX_BYTES} bytes")
    try:
        tree = ast.parse(kernel)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise _Wrong(f"the text does not parse: {type(e).__name__}") from e
    if not any("custom_kernel" in _names(node) for node in tree.body):
        raise _Wrong("the text defines no custom_kernel")
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").partition(".")[0])
    return "triton" in roots


def _names(node: ast.stmt) -> set[str]:
    """What a statement at the top level, or within an ``if`` or ``try`` there, may define."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for n in ast.walk(node):
        if isinstance(n, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in n.names}
    return found


def vectors(case: Case) -> bytes:
    """Scale (0.5 to 1.5, of either sign) and shift (standard normal / 2) of each channel of ``x``, from a secret."""
    import numpy as np

    source = np.random.default_rng(secrets.randbits(128))
    scale = source.uniform(0.5, 1.5, case.dim) * source.choice((-1.0, 1.0), case.dim)
    shift = source.standard_normal(case.dim) / 2
    return np.concatenate([scale, shift]).astype("<f4").tobytes()


def difference(given: bytes, right: bytes) -> str:
    """What is wrong with an output, both as float32 bytes; empty if nothing is.

    Raises:
        ArithmeticError: the reference's own output is not finite, which is no fault of the candidate.
    """
    import numpy as np

    found, truth = np.frombuffer(given, dtype="<f4"), np.frombuffer(right, dtype="<f4")
    if not np.isfinite(truth).all():
        raise ArithmeticError
    if not np.isfinite(found).all():
        return "the output is not finite everywhere"
    off = np.abs(found - truth) > TOLERANCE + TOLERANCE * np.abs(truth)
    return f"{int(off.sum())} of {off.size} elements of the output are wrong" if off.any() else ""
