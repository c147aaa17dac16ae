"""Kernels that cheat, in the real sandbox: each is scored for what it is. Nothing here asserts a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bascule.plugins.tasks.trimul import Trimul
from bascule.plugins.tasks.trimul_kernels import REFERENCE
from bascule.plugins.tasks.trimul_scorer import Measured, TrimulPrivate
from bascule.schemas.errors import ScoringError
from bascule.schemas.trajectory import Scored
from bascule.verifiers.sandbox.layered import LayeredSandbox

EXAMPLE = "dev-0"
HONEST = REFERENCE.replace("def custom_kernel", "def honest")

#: Wrong kernels, and what is said of them.
WRONG = {
    "output cache by shape": (
        (
            "KEPT = {}\ndef custom_kernel(data):\n"
            "    key = data[0].shape\n"
            "    if key not in KEPT:\n        KEPT[key] = honest(data)\n"
            "    return KEPT[key].clone()\n"
        ),
        "elements of the output are wrong",
    ),
    "stale buffer by address": (
        (
            "LAST = []\ndef custom_kernel(data):\n"
            "    if LAST and LAST[-1].shape == data[0].shape:\n        return LAST[-1]\n"
            "    LAST.append(honest(data))\n    return LAST[-1]\n"
        ),
        "elements of the output are wrong",
    ),
    "wrong on odd shapes": (
        (
            "def custom_kernel(data):\n    out = honest(data)\n"
            "    return out if data[0].shape[1] % 2 == 0 else torch.zeros_like(out)\n"
        ),
        "elements of the output are wrong",
    ),
    "a thread that goes on after the return": (
        (
            "import threading\ndef custom_kernel(data):\n    out = torch.zeros_like(data[0])\n"
            "    threading.Timer(0.2, lambda: out.copy_(honest(data))).start()\n    return out\n"
        ),
        "the output",
    ),
    "a double fork": (
        (
            "import os\nif os.fork() == 0:\n    os.setsid()\n    os._exit(0) if os.fork() else None\n"
            "def custom_kernel(data):\n    return honest(data)\n"
        ),
        "cannot be loaded",
    ),
    "a commitment before the work": (
        (
            "import sys\ndriver = sys.modules['__main__']\n"
            "class Early:\n    def __init__(self, data):\n        pass\n"
            "    def hexdigest(self):\n        return '0' * 64\n"
            "class Hashes:\n    sha256 = Early\n"
            "driver.hashlib = Hashes\n"
            "def custom_kernel(data):\n    return honest(data)\n"
        ),
        "another than when the clock stopped",
    ),
    "work before the call": (
        (
            "import sys\ndriver = sys.modules['__main__']\nmake = driver.inputs\nREADY = []\n"
            "def early(torch, spec):\n    data = make(torch, spec)\n    READY[:] = [honest(data)]\n    return data\n"
            "driver.inputs = early\n"
            "def custom_kernel(data):\n    return READY[0]\n"
        ),
        "elements of the output are wrong",
    ),
    "an end in the middle": ("import os\ndef custom_kernel(data):\n    os._exit(0)\n", "the program is over"),
}

#: Right kernels that would have a clock or a core for themselves.
UNFAIR = {
    "patched clocks": (
        "import time\n"
        "for name in ('time', 'perf_counter', 'monotonic', 'process_time', 'thread_time', 'perf_counter_ns'):\n"
        "    setattr(time, name, lambda: 0)\nprint('0' * 100000)\n"
        "def custom_kernel(data):\n    return honest(data)\n"
    ),
    "more threads and cores": (
        "import os\ntorch.set_num_threads(8)\n"
        "try:\n    os.sched_setaffinity(0, range(os.cpu_count()))\n    FREE = True\nexcept OSError:\n    FREE = False\n"
        "def custom_kernel(data):\n    assert not FREE\n    return honest(data)\n"
    ),
}


@pytest.fixture(scope="module")
def face() -> Iterator[TrimulPrivate]:
    """One reference for all; the limit is what a machine ten times slower would need."""
    private = Trimul({"size": "small", "seconds": 900}).private()
    private.use(LayeredSandbox())
    yield private
    private.close()


def measured(face: TrimulPrivate, ending: str) -> Measured:
    return face.measure("dev", EXAMPLE, f"{HONEST}\n\n{ending}")


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_kernel_scores_nothing(face: TrimulPrivate, name: str) -> None:
    ending, why = WRONG[name]
    found = measured(face, ending)
    assert found.verdict() == Scored(reward=0.0, passed=False)
    assert why in found.why


@pytest.mark.parametrize("name", list(UNFAIR))
def test_a_trick_with_clock_or_cores_gains_nothing(face: TrimulPrivate, name: str) -> None:
    found = measured(face, UNFAIR[name])
    assert found.correct, found.why
    # The tricks show up as factors of eight and more where they work; a busy machine may triple an honest one's.
    assert found.reward <= 6
    assert found.reward > 0 or "clock of processor time" in found.unscored


def test_an_honest_kernel_is_right_and_a_lost_reference_is_started_again(face: TrimulPrivate) -> None:
    face._reference_worker()
    assert face._reference is not None
    face._reference[0].__exit__(None, None, None)
    found = face.measure("sealed", "sealed-0", REFERENCE)
    assert found.correct, found.why
    if "clock of processor time" in found.unscored:
        return  # there are kernels whose clock is too coarse for calls so short; that is said, and no verdict
    assert found.compared is not None
    assert len(found.compared.cases) == 1
    assert 0 < found.reward <= 6


def test_a_sandbox_that_does_not_start_a_program_is_no_fault_of_the_kernel(
    face: TrimulPrivate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face, "_limit", 1e-3)
    with pytest.raises(ScoringError):
        measured(face, "custom_kernel = honest\n")
