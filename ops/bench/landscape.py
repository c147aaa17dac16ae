"""The reward landscape of 100,000 trajectories, beside numpy's figures of the same samples.

The landscape is computed without numpy, exactly and with its intervals, since what decides has no heavy imports. The
baseline takes the rewards out of the same samples and computes the moments, the histogram, the percentile and the
fractions that both have, and no interval. Both compute in one thread; seconds are of the processor, as other work may
share the machine.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bascule.schemas.landscape import RewardLandscape
from bascule.schemas.trajectory import Scored
from bascule.verifiers.landscape import SampleFigures, landscape
from ops.bench.report import Figure, figure

GROUPS, SAMPLES = 12_500, 8
REPETITIONS = 7
TARGET = 2.0  # seconds
Groups = Sequence[Sequence[SampleFigures]]
SHAPES: dict[str, Callable[[random.Random], Scored]] = {
    "pass or fail": lambda rng: Scored(reward=float(rng.random() < 0.3), passed=None),
    "continuous, with step rewards": lambda rng: Scored(reward=rng.random() ** 3, steps=(0.0, rng.random())),
}


def run() -> tuple[dict[str, Figure], list[str]]:
    """Measure both shapes of reward; a note begins with UNDER where the landscape takes too long."""
    figures: dict[str, Figure] = {}
    notes = []
    for name, make in SHAPES.items():
        rng = random.Random(1)
        groups = [[_sample(make(rng), rng) for _ in range(SAMPLES)] for _ in range(GROUPS)]
        found, known = landscape(groups), _numpy(groups)
        close = all(math.isclose(getattr(found, k), v, rel_tol=1e-9) for k, v in known.items())
        ours, theirs = [], []
        for _ in range(REPETITIONS):
            theirs.append(_seconds(_numpy, groups))
            ours.append(_seconds(landscape, groups))
        middle = statistics.median(ours)
        ratio = statistics.median(theirs) / middle
        figures[name] = figure(ours, "s", baseline="numpy, without intervals", ratio=ratio)
        figures[f"{name}: numpy"] = figure(theirs, "s")
        verdict = "ok" if middle <= TARGET else "UNDER"
        notes.append(f"{verdict}: {middle:.2f} s for {GROUPS * SAMPLES:,} trajectories ({name}), at most {TARGET:g}")
        notes.append(f"{'ok' if close else 'FAIL'}: {', '.join(known)} agree with numpy's to 9 digits ({name})")
    return figures, notes


def _sample(verdict: Scored, rng: random.Random) -> SampleFigures:
    return SampleFigures(verdict=verdict, prompt_tokens=rng.randrange(900), output_tokens=rng.randrange(100))


def _seconds(work: Callable[[Groups], object], groups: Groups) -> float:
    before = time.process_time()
    work(groups)
    return time.process_time() - before


def _numpy(groups: Groups) -> dict[str, float]:
    """Figures by the landscape's names; the histogram and the percentile are computed and not compared."""
    samples = [s for g in groups for s in g]
    rewards = np.fromiter((s.verdict.reward for s in samples if isinstance(s.verdict, Scored)), float, len(samples))
    tokens = np.fromiter((s.prompt_tokens + s.output_tokens for s in samples), float, len(samples))
    by_group = rewards.reshape(len(groups), -1)
    deviations = rewards - rewards.mean()
    np.histogram(rewards, 10)
    np.percentile(tokens, 95, method="inverted_cdf")
    found = {
        "mean": rewards.mean(),
        "variance": rewards.var(),
        "skew": (deviations**3).mean() / rewards.var() ** 1.5,
        "density": np.count_nonzero(rewards) / len(rewards),
        "informative": (by_group.max(1) > by_group.min(1)).mean(),
        "score": by_group.mean(1).mean(),
    }
    assert set(found) <= set(RewardLandscape.__struct_fields__)
    return {name: float(value) for name, value in found.items()}
