"""What policies are given in their tests."""

from __future__ import annotations

from typing import Any

from bascule.plugins.loader import plugins
from bascule.plugins.policy import AlgorithmInfo, Generation, PolicyInput
from bascule.schemas.landscape import Interval, RewardLandscape

LAND = RewardLandscape(
    groups=32, samples=256, unscored=0, score=0.4, score_interval=Interval(0.3, 0.5), mean=0.4, variance=0.24, skew=0.4,
    success_rate=0.4, pass_rates=(4, 6, 6, 6, 6, 4), informative=0.75, format_failures=0.0, errors=0.0,
    prompt_tokens=50.0, output_tokens=3.0, distinct_rewards=2,
)  # fmt: skip


def generation(number: int, **values: Any) -> Generation:
    return Generation(
        **{
            "generation": number, "parent": None, "lever": None, "algorithm": None, "edit": None, "outcome": "promoted",
            "train": LAND, "train_event": "t", "gate_event": "g", **values,
        }
    )  # fmt: skip


FIRST = generation(0)


def given(*history: Generation, **values: Any) -> PolicyInput:
    found = plugins().registry.algorithms.items
    algorithms = tuple(
        AlgorithmInfo(name=a.name, version=a.version, requires=a.requires, params=a.defaults())
        for _, a in sorted(found.items())
    )
    return PolicyInput(
        **{
            "generation": len(history), "max_generations": 9, "levers": ("harness", "weights"), "history": history,
            "best": max(g.generation for g in history if g.outcome == "promoted"), "algorithms": algorithms, **values,
        }
    )  # fmt: skip
