"""What confinement costs: a sandboxed ``python -c pass`` beside a bare interpreter, alone and 64 at once."""

from __future__ import annotations

import resource
import subprocess
import threading
import time
from collections.abc import Callable

from bascule.plugins.sandbox import Program
from bascule.verifiers.sandbox import front
from bascule.verifiers.sandbox.layered import LayeredSandbox
from bascule.verifiers.sandbox.packages import executable
from bascule.verifiers.sandbox.probe import probe
from ops.bench.report import Figure, figure

REPETITIONS = 30
AT_ONCE = 64
TARGET = 40  # ms over a bare interpreter, median
BARE = [executable(), "-S", "-s", "-B", "-c", "pass"]
PROGRAM = Program(arguments=("-c", "pass"))
TALKING = Program(arguments=("-c", "import os; os.write(1, b'up'); os.read(0, 1)"), seconds=600.0)


def run(repetitions: int = REPETITIONS, at_once: int = AT_ONCE) -> tuple[dict[str, Figure], list[str]]:
    """Start programs in turn, bare and sandboxed, and then many that are all alive at one time.

    Raises:
        AssertionError: a program did not run as it should.
    """
    sandbox = LayeredSandbox()
    kinds: dict[str, Callable[[], None]] = {"bare": _bare, "all layers": lambda: _sandboxed(sandbox)}
    lean = LayeredSandbox(without=("namespaces",))
    kinds["no namespaces"] = lambda: _sandboxed(lean)
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repetitions + 1):
        for name, start in kinds.items():
            begun = time.perf_counter()
            start()
            taken[name].append(1e3 * (time.perf_counter() - begun))
    # On a busy machine each of the few changes of process waits for a turn; this does not.
    used = {name: figure([_processor_time(start, repetitions)], "ms") for name, start in kinds.items()}
    # The first of each warms it up.
    bare = figure(taken["bare"][1:], "ms")
    figures = {"bare interpreter": bare, "bare interpreter: processor time": used["bare"]}
    for name in ("all layers", "no namespaces"):
        over = [inside - outside for inside, outside in zip(taken[name][1:], taken["bare"][1:], strict=True)]
        figures[f"{name}: sandboxed"] = figure(
            taken[name][1:], "ms", baseline="bare interpreter", ratio=bare.value / figure(taken[name][1:], "ms").value
        )
        figures[f"{name}: over bare"] = figure(over, "ms")
        figures[f"{name}: processor time"] = used[name]
    each, held = _at_once(sandbox, at_once)
    alone = figures["all layers: sandboxed"].value
    figures[f"{at_once} at once: each"] = figure([each], "ms", baseline="one alone", ratio=alone / each)
    layers = probe(sandbox).holds
    over_bare = figures["all layers: over bare"].value
    return figures, [
        f"{'ok' if over_bare <= TARGET else 'UNDER'}: {over_bare:.0f} ms over a bare interpreter, at most {TARGET}",
        f"{'ok' if held == at_once else 'FAIL'}: {held} of {at_once} alive at one time ended as they should",
        f"holds: {', '.join(layers)}",
        f"mechanisms: {', '.join(sandbox.mechanisms.mechanisms)}",
    ]


def _processor_time(start: Callable[[], None], repetitions: int) -> float:
    """Milliseconds of processor time of a program, its launcher and all that it starts, on average.

    What the zygote forks counts with us once the zygote has ended, so what it needs itself is taken off.
    """

    def used(times: int) -> float:
        front.end_zygote()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(times):
            start()
        front.end_zygote()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return 1e3 * (used(repetitions + 1) - used(1)) / repetitions


def _bare() -> None:
    subprocess.run(BARE, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def _sandboxed(sandbox: LayeredSandbox) -> None:
    ran = sandbox.run(PROGRAM)
    assert (ran.ending, ran.exit_code) == ("exited", 0), ran


def _at_once(sandbox: LayeredSandbox, count: int) -> tuple[float, int]:
    """Start them from ``count`` threads, and let none end before all are up.

    Returns:
        Milliseconds per program from the first start until all are up, and how many ended as they should.
    """
    up = threading.Barrier(count + 1, timeout=600)
    good = []

    def one() -> None:
        with sandbox.start(TALKING) as running:
            started = running.read(2) == b"up"
            up.wait()
            running.write(b"x")
            ran = running.wait()
            good.append(started and (ran.ending, ran.exit_code) == ("exited", 0))

    threads = [threading.Thread(target=one) for _ in range(count)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    up.wait()
    taken = 1e3 * (time.perf_counter() - begun) / count
    for thread in threads:
        thread.join()
    return taken, sum(good)
