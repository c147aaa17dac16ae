"""Kernels that cheat: each scored by the task ``trimul`` for what it is, and by a naive grader as it would like."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bascule.plugins.tasks.trimul import Trimul
from bascule.plugins.tasks.trimul_kernels import REFERENCE
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests.attacks.attack import HERE, Attack, Outcome, line_of, text_of

#: By kernel: whether it is right, so that it is scored and only its trick must gain nothing.
KERNELS = {
    "patched_timers": True,
    "patched_globals": False,
    "output_cache": False,
    "lazy_tensor": False,
    "input_mutation": False,
    "thread_oversubscription": True,
}
#: The tricks show up as factors of eight and more where they work.
MOST_GAIN = 2.0


def attacks() -> list[Attack]:
    return [
        Attack(name=name, tries=line_of(text_of("kernels", name)), play=_player(name, right))
        for name, right in KERNELS.items()
    ]


def _player(name: str, right: bool) -> Any:
    async def play(folder: Path) -> list[Outcome]:
        text = REFERENCE.replace("def custom_kernel", "def honest") + "\n\n" + text_of("kernels", name)
        control = await asyncio.to_thread(naively, name, text, folder)
        return [await asyncio.to_thread(scored, text, right, control)]

    return play


def scored(text: str, right: bool, control: str | None) -> Outcome:
    face = Trimul({"size": "small", "seconds": 900}).private()
    face.use(LayeredSandbox())
    try:
        found = face.measure("dev", "dev-0", text)
    finally:
        face.close()
    problems = []
    if found.unscored:
        problems.append(f"unscored: {found.unscored}")
    elif right and not (found.correct and 0 < found.reward <= MOST_GAIN):
        problems.append(f"reward {found.reward:.2f}, {found.why or 'right'}")
    elif not right and (found.correct or found.reward):
        problems.append(f"reward {found.reward:.2f}")
    layer = "clock and core of the scorer" if right else f"scorer: {found.why[:60]}"
    return Outcome(
        place="kernel",
        control=control,
        layer=layer,
        result=f"reward {found.reward:.2f}",
        problems=tuple(problems),
    )


def naively(name: str, text: str, folder: Path) -> str | None:
    """What the naive grader says; None where that depends on what else the machine does."""
    if name == "thread_oversubscription":
        return None
    (folder / "reference.py").write_text(REFERENCE)
    (folder / "kernel.py").write_text(text)
    (folder / "grader.py").write_text((HERE / "naive_grader.py").read_text())
    ran = subprocess.run([sys.executable, "grader.py"], cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        return ""
    said = json.loads(ran.stdout.splitlines()[-1])
    return f"accepted, {said['factor']:.0f} times as fast" if said["right"] and said["factor"] > MOST_GAIN else ""
