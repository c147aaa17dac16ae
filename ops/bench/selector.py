"""How much does a policy lose against the best fixed algorithm? Six synthetic landscapes, one budget for all arms.

An arm is a run of some weight generations on a tiny model. Tasks, sampling and the model are this bench's own
(``selector_tasks``, ``selector_model``); credit, losses and training loop, the landscape's figures, the gate and the
policies are the real ones (``selector_runs``). Services, log, sandbox and harnesses are left out.

Every arm samples and trains equally much in every generation. The regret of a policy on a landscape is (best fixed's
true value - policy's) / (best fixed's - the base model's), where the best fixed algorithm is the one with the highest
mean over the seeds; being the best of six on the same seeds it is flattered a little, so regrets are rather too high
than too low. True values are exact, by enumeration. An algorithm that is not feasible trains nothing.

``alternate`` spends every other generation on a harness where no harness could help: its regret is the price of that.
The presets of ``fixed`` are arms of their algorithms.

Draw 1 of the landscapes' parameters is what thresholds may be set by; draw 2 is of the same distribution, and was
looked at after they were frozen.

``python -m ops.bench selector [--quick] [--home FOLDER]``: with a home, finished tasks are kept and not played again.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import msgspec
import torch

from bascule.plugins.policies import alternate, fixed, rules
from bascule.plugins.policies.fixed import PRESETS
from bascule.plugins.policies.rules import Thresholds, algorithm_options
from bascule.plugins.policy import CallResult, Policy, PolicyInput
from bascule.runtime.experiments.statistics import over_seeds
from bascule.schemas.decision import LeverDecision
from ops.bench.report import Figure
from ops.bench.selector_runs import ALGORITHMS, Played, Size, open_cell, play
from ops.bench.selector_tasks import LANDSCAPES, Kind

SEEDS = (1, 2, 3, 4, 5)
DRAWS = (1, 2)
POLICIES = ("rules", "alternate", *PRESETS, "random")
MOST_REGRET = 0.15
DRAWING = Path(__file__).parent / "results" / "selector.png"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was played on one task.

    Attributes:
        start: the base model's true value.
        arms: of each fixed algorithm and each policy, by name.
    """

    kind: Kind
    draw: int
    seed: int
    start: float
    arms: dict[str, Played]


class Regret(msgspec.Struct, frozen=True):
    """Mean over the seeds, as a share of what the best fixed algorithm gains, and its 95% interval."""

    mean: float
    low: float
    high: float


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one draw of a landscape.

    Attributes:
        best: the best fixed algorithm.
        start, values: mean true values, of the base model and of every arm.
        margin: how much of the best one's gain is more than the mean of the two algorithms in the middle has.
        regrets: of the policies.
    """

    best: str
    start: float
    values: dict[str, float]
    margin: float
    regrets: dict[str, Regret]


class Uniform:
    """Any feasible algorithm, by lot: the control of a policy that looks at the landscape."""

    name = "random"
    version = "1"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        """Draw one."""
        del results  # asks for no calls
        options = [o for o in algorithm_options(self.name, given, Thresholds(), "2") if o.feasible]
        if not options:
            return LeverDecision(lever="stop", reasons=("nothing is feasible",))
        rng = random.Random(f"{self._seed} {given.generation}")
        return LeverDecision(lever="weights", algorithm=rng.choice(options).algorithm, reasons=("by lot",))


def run(home: Path | None = None, *, quick: bool = False) -> tuple[dict[str, Figure], list[str]]:
    """Play all arms; a line of the notes begins with FAIL where ``rules`` does not keep its promise."""
    seeds, draws = (SEEDS[:1], DRAWS[:1]) if quick else (SEEDS, DRAWS)
    asked = [(kind, draw, seed) for draw in draws for seed in seeds for kind in LANDSCAPES]
    if home is None:
        with tempfile.TemporaryDirectory() as folder:
            results = _played(asked, Path(folder))
    else:
        results = _played(asked, home)
    standings = {
        draw: {kind: standing([r for r in results if (r.draw, r.kind) == (draw, kind)]) for kind in LANDSCAPES}
        for draw in draws
    }
    if not quick:
        _draw(standings, DRAWING)
    figures: dict[str, Figure] = {}
    notes = []
    for draw, found in standings.items():
        figures |= _figures(draw, found, len(seeds))
        notes += [f"draw {draw}: {line}" for line in told(found)]
        notes += [f"{line} (draw {draw})" for line in verdicts(found)]
    return figures, notes


def _played(asked: Sequence[tuple[Kind, int, int]], home: Path) -> list[Result]:
    """The results, those that are not there yet played in as many processes as there are processors."""
    home.mkdir(parents=True, exist_ok=True)
    files = {key: home / f"draw{key[1]}-{key[0]}-{key[2]}.json" for key in asked}
    missing = [key for key in asked if not files[key].is_file()]
    if missing:
        workers = min(len(os.sched_getaffinity(0)), len(missing))
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            waiting = {pool.submit(play_all, *key): key for key in missing}
            for done in as_completed(waiting):
                result = done.result()
                part = files[waiting[done]].with_suffix(".part")
                part.write_bytes(msgspec.json.encode(result))
                part.replace(files[waiting[done]])
                told_of = ", ".join(f"{name} {arm.value:.3f}" for name, arm in result.arms.items())
                print(f"{waiting[done]}: {result.start:.3f}; {told_of}", file=sys.stderr, flush=True)
    return [msgspec.json.decode(files[key].read_bytes(), type=Result) for key in asked]


def play_all(kind: Kind, draw: int, seed: int, size: Size | None = None) -> Result:
    """All arms on one task."""
    with open_cell(kind, draw, seed, size or Size()) as cell:
        policies: dict[str, Policy] = {
            **{name: fixed.make({"algorithm": name, "schedule": ("weights",)}) for name in ALGORITHMS},
            "rules": rules.make({}),
            **{name: fixed.make({"preset": name, "schedule": ("weights",)}) for name in PRESETS},
            "random": Uniform(seed),
        }
        arms = {name: play(cell, policy) for name, policy in policies.items()}
        arms["alternate"] = play(cell, alternate.make({}), ("harness", "weights"))
        return Result(kind=kind, draw=draw, seed=seed, start=cell.base.value, arms=arms)


def regret(best: Sequence[float], policy: Sequence[float], start: Sequence[float]) -> Regret:
    """By seed, as a share of the best one's mean gain; the interval is Student's, or a point for a single seed.

    Raises:
        ValueError: the best one gains nothing, so that there is no share of it.
    """
    gain = statistics.fmean(best) - statistics.fmean(start)
    if gain <= 0:
        raise ValueError(f"The best fixed algorithm gains {gain:g}.")
    lost = [(b - p) / gain for b, p in zip(best, policy, strict=True)]
    mean = statistics.fmean(lost)
    interval = over_seeds(lost)
    return Regret(mean, mean, mean) if interval is None else Regret(mean, interval.low, interval.high)


def average(regrets: Sequence[Regret]) -> Regret:
    """The mean over landscapes, which are independent of each other."""
    mean = statistics.fmean(r.mean for r in regrets)
    half = math.sqrt(math.fsum(((r.high - r.low) / 2) ** 2 for r in regrets)) / len(regrets)
    return Regret(mean, mean - half, mean + half)


def standing(results: Sequence[Result]) -> Standing:
    """What the seeds of one landscape come to; without a gain of any algorithm there are no regrets."""
    start = [r.start for r in results]
    found = {name: [r.arms[name].value for r in results] for name in (*ALGORITHMS, *POLICIES)}
    values = {name: statistics.fmean(v) for name, v in found.items()}
    best = max(ALGORITHMS, key=values.__getitem__)
    gain = values[best] - statistics.fmean(start)
    middle = statistics.median(values[name] for name in ALGORITHMS)
    return Standing(
        best=best,
        start=statistics.fmean(start),
        values=values,
        margin=(values[best] - middle) / gain if gain > 0 else 0.0,
        regrets={name: regret(found[best], found[name], start) for name in POLICIES} if gain > 0 else {},
    )


def verdicts(found: Mapping[Kind, Standing]) -> list[str]:
    """Whether ``rules`` keeps its promise, and whether the landscapes tell algorithms apart."""
    flat = [kind for kind, s in found.items() if not s.regrets]
    if flat:
        return [f"FAIL no algorithm gains anything on {', '.join(flat)}"]
    mean = average([s.regrets["rules"] for s in found.values()])
    worst = [
        kind
        for kind, s in found.items()
        if s.regrets["rules"].mean > max(r.mean for name, r in s.regrets.items() if name != "rules")
    ]
    winners = sorted({s.best for s in found.values()})
    said = [
        (mean.mean <= MOST_REGRET, f"mean regret of rules {_shown(mean)}, at most {MOST_REGRET:.0%}"),
        (not worst, f"rules is the worst policy on {', '.join(worst) or 'none'}"),
        (len(winners) > 1, f"best fixed algorithms: {', '.join(winners)}"),
    ]
    return [f"{'ok' if ok else 'FAIL'} {text}" for ok, text in said]


def told(found: Mapping[Kind, Standing]) -> list[str]:
    """A line for each landscape, and one for the means."""
    lines = []
    for kind, s in found.items():
        order = sorted(ALGORITHMS, key=lambda name: -s.values[name])
        values = ", ".join(f"{name} {s.values[name]:.3f}" for name in order)
        regrets = "; ".join(f"{name} {_shown(r)}" for name, r in s.regrets.items())
        lines.append(f"{kind}: {s.start:.3f} -> {values} (margin {s.margin:.0%}); regret: {regrets}")
    if all(s.regrets for s in found.values()):
        means = {name: average([s.regrets[name] for s in found.values()]) for name in POLICIES}
        lines.append(f"mean regret: {'; '.join(f'{name} {_shown(r)}' for name, r in means.items())}")
    return lines


def _shown(r: Regret) -> str:
    return f"{r.mean:.0%} [{r.low:.0%}, {r.high:.0%}]"


def _figures(draw: int, found: Mapping[Kind, Standing], seeds: int) -> dict[str, Figure]:
    figures = {}
    for kind, s in found.items():
        figures[f"draw {draw}, {kind}: {s.best}"] = Figure(s.values[s.best], "", "the base model", None, 0.0, seeds)
        for name, r in s.regrets.items():
            figures[f"draw {draw}, {kind}: regret of {name}"] = _percent(r, s.best, seeds)
    if all(s.regrets for s in found.values()):
        for name in POLICIES:
            mean = average([s.regrets[name] for s in found.values()])
            figures[f"draw {draw}: mean regret of {name}"] = _percent(mean, "the best fixed", seeds)
    return figures


def _percent(r: Regret, best: str, seeds: int) -> Figure:
    """``spread`` is the width of the 95% interval over the mean, as far as that is not 0."""
    spread = (r.high - r.low) / abs(r.mean) if r.mean else 0.0
    return Figure(100 * r.mean, "%", best, None, spread, seeds)


def _draw(standings: Mapping[int, Mapping[Kind, Standing]], path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 3.5 * len(standings)), layout="constrained")
    rows = canvas.subplots(len(standings), squeeze=False)
    for (draw, found), axes in zip(standings.items(), rows[:, 0], strict=True):
        for i, name in enumerate(POLICIES):
            shown = [(at, s.regrets[name]) for at, s in enumerate(found.values()) if s.regrets]
            axes.bar(
                [at + (i - 2.5) * 0.14 for at, _ in shown],
                [100 * r.mean for _, r in shown],
                0.14,
                yerr=[100 * (r.high - r.low) / 2 for _, r in shown],
                error_kw={"linewidth": 0.8},
                label=name if name not in PRESETS else f"fixed: {PRESETS[name]} ({name})",
            )
        axes.axhline(100 * MOST_REGRET, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(found)), [f"{kind}\nbest: {s.best}" for kind, s in found.items()])
        axes.set(ylabel="regret, % of the best fixed's gain", title=f"draw {draw}", ylim=(-40, 160))
    rows[0, 0].legend(fontsize="x-small", ncols=6)
    canvas.savefig(path, dpi=120)
