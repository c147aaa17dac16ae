"""Denoisers that cheat, run as programs: nothing under the strict rule, something under the published one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bascule.plugins.tasks.denoising import MAGIC, Denoising
from bascule.schemas.trajectory import Scored
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests.attacks.attack import Attack, Outcome, line_of, text_of
from tests.attacks.planted import cache

#: By denoiser: the task's parameters and the example. On simulated counts no gene is common enough to pay, nor is MAGIC
#: always a gain.
DENOISERS: dict[str, tuple[dict[str, Any], str]] = {
    "zeros": ({"data": "simulated"}, "tissue-7"),
    "thousandth": ({"split_seed": 0}, "immune-published"),
    "dump_gene": ({"split_seed": 0}, "immune-published"),
}


def attacks() -> list[Attack]:
    return [
        Attack(name=name, tries=line_of(text_of("denoisers", name)), play=_player(name), quick=name == "zeros")
        for name in DENOISERS
    ]


def _player(name: str) -> Any:
    async def play(folder: Path) -> list[Outcome]:
        with cache(folder):
            return [await asyncio.to_thread(scored, name)]

    return play


def scored(name: str) -> Outcome:
    text = MAGIC.read_text(encoding="utf-8") + "\n\n" + text_of("denoisers", name)
    params, example = DENOISERS[name]
    rewards = {}
    why = ""
    for mode in ("paper", "strict"):
        face = Denoising({**params, "score_mode": mode}).private()
        face.use(LayeredSandbox())
        judged = face.judge("dev", example, text)
        assert isinstance(judged.verdict, Scored), judged
        rewards[mode], why = judged.verdict.reward, judged.reason
    return Outcome(
        place="denoiser",
        control=f"{rewards['paper']:.3f} by the published rule" if rewards["paper"] > 0 else "",
        layer=f"scorer: {why[:60]}",
        result=f"reward {rewards['strict']:g}",
        problems=(f"reward {rewards['strict']:.3f}",) if rewards["strict"] > 0 else (),
    )
