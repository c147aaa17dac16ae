"""Does the gate hold when dev is asked again in each generation? 2,000 synthetic runs of 30 generations, 200 items.

A candidate passes an item if its luck on it, partly the item's difficulty and partly its own, is below a bound that its
true score sets. Variations share a part of their luck with what they vary. Fresh items have fresh luck, so the true
score is exact however luck was selected on dev. An author sees after each generation what the run reports, and never
improves anything: every candidate is truly equal to the first, or worse. It tries in one of these ways:

- lottery: unlike candidates, each a ticket of its own;
- climb: variations of what was reported highest;
- combine: variations of the first for half the run, then their sum, weighted by what was reported of each (the attack
  of Blum & Hardt 2015, arXiv:1502.04585, section 5).

Harm is a run whose last kept candidate is truly worse than the first by more than a point. Figures are those of the way
and true effect that are worst for each gate. ``python -m ops.bench gate`` draws ``results/gate.png``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from bascule.schemas.run import GateConfig
from bascule.verifiers.statistics import mcnemar_exact
from ops.bench.report import Figure, figure

Array = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Way = Literal["lottery", "climb", "combine"]

RUNS, GENERATIONS, ITEMS = 2000, 30, 200
CHUNK = 500
DRAWING = Path(__file__).with_name("results") / "gate.png"
STEPS = (0.0, 1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5)
WAYS: tuple[Way, ...] = ("lottery", "climb", "combine")
#: True effects of candidates against the first, in points of the score; just over one point is what harms most easily.
EFFECTS = (0.0, -0.011, -0.03)
COMBINED = 0.9  # share of the weighted sum in what `combine` tries, as correlation
DIFFICULTY = 0.5  # share of luck that is the item's
KINSHIP = {"lottery": 0.0, "climb": 0.6, "combine": 0.6}  # share of its own luck that a variation keeps, as correlation
DISCORDANCE = 0.2
HARM, FLATTERY, POWER = 0.05, 0.02, {0.10: 0.60, 0.15: 0.85}


Kind = Literal["naive", "test", "ladder", "thresholdout"]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One gate.

    Attributes:
        kind: ``naive`` promotes whatever scores higher; ``test`` is the paired test alone.
        shown: whether the author sees the raw score of every candidate on dev.
        fresh: dev is drawn anew in each generation.
    """

    kind: Kind
    step: float = 0.0
    noise: float = 0.0
    shown: bool = True
    fresh: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Of many runs: fraction harmed, mean of the reported score minus the true one, promotions a run."""

    harm: float
    flattery: float
    promotions: float


@cache
def p_values(items: int) -> Array:
    """McNemar's p of the gate by [wins, losses]; 1 where the candidate is not better."""
    table = np.ones((items + 1, items + 1), np.float32)
    for wins in range(1, items + 1):
        for losses in range(min(wins, items - wins + 1)):
            table[wins, losses] = mcnemar_exact(wins, losses)
    return table


def promoted(rule: Rule, wins: Counts, losses: Counts, items: int, rng: np.random.Generator) -> Flags:
    """Which candidates the gate promotes, by their counts: ``bascule.verifiers.gate.gate``, for many runs at once."""
    if rule.kind == "naive":
        return np.greater(wins, losses)
    found: Flags = p_values(items)[wins, losses] < GateConfig().alpha
    if rule.kind == "test":
        return found
    error = np.sqrt(wins + losses)
    threshold = rule.step * error
    if rule.kind == "thresholdout":
        threshold = threshold + rule.noise * error * (
            rng.laplace(size=wins.shape, scale=2) + rng.laplace(size=wins.shape, scale=4)
        )
    clear: Flags = wins - losses > np.maximum(0, threshold)
    return np.logical_and(found, clear)


def simulate(
    rule: Rule, way: Way, effect: float, *, runs: int = RUNS, generations: int = GENERATIONS, items: int = ITEMS
) -> Outcome:
    """Synthetic runs in which no candidate is truly better than the first.

    Args:
        effect: true score of every candidate minus that of the first.
    """
    parts = [
        _simulate(rule, way, effect, min(CHUNK, runs - at), generations, items, np.random.default_rng([at, items]))
        for at in range(0, runs, CHUNK)
    ]
    harm, flattery, promotions = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Outcome(harm=float(harm.mean()), flattery=float(flattery.mean()), promotions=float(promotions.mean()))


def _bound(truth: npt.NDArray[Any]) -> Array:
    quantile = np.vectorize(NormalDist().inv_cdf, otypes=[np.float32])
    found: Array = quantile(truth)
    return found


def _simulate(
    rule: Rule, way: Way, effect: float, runs: int, generations: int, items: int, rng: np.random.Generator
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    def normal() -> Array:
        return rng.standard_normal((runs, items), dtype=np.float32)

    def mixed(kept: Array, new: Array, kinship: float) -> Array:
        return np.float32(kinship) * kept + np.float32(np.sqrt(1 - kinship**2)) * new

    def passes(own: Array, bound: Array) -> Flags:
        return mixed(difficulty, own, np.sqrt(DIFFICULTY)) < bound[:, None]

    kinship, noise, half = KINSHIP[way], rng.spawn(1)[0], generations // 2
    first_truth = rng.uniform(0.35, 0.65, runs)
    bounds = _bound(first_truth), _bound(first_truth + effect)
    difficulty, first = normal(), normal()
    kept, kept_passes = first.copy(), passes(first, bounds[0])
    best, changed, promotions = kept.copy(), np.zeros(runs, bool), np.zeros(runs)
    reported = kept_passes.mean(1)
    best_seen = reported.copy()
    directions: list[Array] = []
    seen: list[npt.NDArray[Any]] = []
    total: Array | None = None
    for g in range(generations):
        if rule.fresh:
            difficulty, kept = normal(), normal()
            kept_passes = passes(kept, np.where(changed, bounds[1], bounds[0]))
        new = normal()
        if way == "combine" and g < half:
            directions.append(new)
        elif way == "combine":
            total = _weighted(directions, seen[:half]) if total is None else total
            new = mixed(total, new, COMBINED)
        base = kept if way == "lottery" else best if way == "climb" else first
        candidate = mixed(base, new, kinship)
        result = passes(candidate, bounds[1])
        wins, losses = (result & ~kept_passes).sum(1), (kept_passes & ~result).sum(1)
        promote = promoted(rule, wins, losses, items, noise)
        score = result.mean(1)
        answer = score
        if rule.kind == "thresholdout":
            answer = score + rule.noise * np.sqrt(wins + losses) / items * noise.laplace(size=runs)
        reported = np.where(promote, answer, reported)
        seen.append(score if rule.shown else reported)
        higher = score > best_seen if rule.shown else promote
        best[higher], best_seen[higher] = candidate[higher], seen[-1][higher]
        kept[promote], kept_passes[promote] = candidate[promote], result[promote]
        changed |= promote
        promotions += promote
    truth = first_truth + np.where(changed, effect, 0.0)
    return truth < first_truth - 0.01, reported - truth, promotions


def _weighted(directions: list[Array], seen: list[npt.NDArray[Any]]) -> Array:
    """Their sum, weighted by what was seen of each, with unit variance; the first where nothing tells them apart."""
    weight = np.array(seen, np.float32)
    weight -= weight.mean(0)
    size = np.sqrt((weight**2).sum(0))
    alike = size < 1e-6
    weight[:, alike], weight[0, alike], size[alike] = 0, 1, 1
    return np.asarray(sum(w[:, None] * d for w, d in zip(weight / size, directions, strict=True)), np.float32)


def power(rule: Rule, gain: float, *, discordance: float = DISCORDANCE, runs: int = 20_000) -> float:
    """How often a candidate that is truly better by ``gain`` is promoted when it is asked once.

    Args:
        discordance: fraction of items on which it differs from its parent.
    """
    rng = np.random.default_rng(0)
    win = (discordance + gain) / 2
    counts = rng.multinomial(ITEMS, [win, discordance - win, 1 - discordance], size=runs)
    return float(promoted(rule, counts[:, 0], counts[:, 1], ITEMS, rng).mean())


def worst(rule: Rule, *, runs: int = RUNS, effects: tuple[float, ...] = EFFECTS) -> Outcome:
    """The largest of each figure over all ways and effects."""
    ways: tuple[Way, ...] = ("lottery",) if rule.fresh else WAYS
    found = [simulate(rule, way, effect, runs=runs) for way in ways for effect in effects]
    return Outcome(
        harm=max(o.harm for o in found),
        flattery=max(o.flattery for o in found),
        promotions=max(o.promotions for o in found),
    )


def rules() -> dict[str, Rule]:
    """What is compared: the defaults, and what one would do without them."""
    config = GateConfig()
    ladder = Rule(kind="ladder", step=config.step, shown=False)
    return {
        "default": ladder,
        "thresholdout": Rule(kind="thresholdout", step=config.step, noise=config.noise, shown=False),
        "default, raw scores shown": msgspec.structs.replace(ladder, shown=True),
        "paired test only": Rule(kind="test"),
        "naive >": Rule(kind="naive"),
        "default, fresh dev": msgspec.structs.replace(ladder, fresh=True),
        "paired test only, fresh dev": Rule(kind="test", fresh=True),
        "naive >, fresh dev": Rule(kind="naive", fresh=True),
    }


def run(drawing: Path = DRAWING) -> tuple[dict[str, Figure], list[str]]:
    """Simulate every gate and draw the curve; a line of the notes begins with FAIL where the default does not hold."""
    figures: dict[str, Figure] = {}
    notes = [f"power at a discordance of {DISCORDANCE:.0%}: +10 points is 15% of the items won and 5% lost"]
    for name, rule in rules().items():
        outcome = worst(rule)
        figures[f"{name}: runs harmed"] = figure([100 * outcome.harm], "%")
        figures[f"{name}: reported minus true"] = figure([100 * outcome.flattery], "points")
        figures[f"{name}: promotions"] = figure([outcome.promotions], "a run")
        for gain in POWER:
            figures[f"{name}: power of +{100 * gain:.0f}"] = figure([100 * power(rule, gain)], "%")
        if name == "default":
            notes += verdicts(outcome, {gain: power(rule, gain) for gain in POWER})
    for discordance in (0.15, 0.25, 0.3):
        powers = ", ".join(
            f"+{100 * g:.0f}: {power(rules()['default'], g, discordance=max(discordance, g)):.0%}" for g in POWER
        )
        notes.append(f"power of the default at a discordance of {discordance:.0%}: {powers}")
    _draw(drawing)
    return figures, notes


def verdicts(outcome: Outcome, powers: dict[float, float]) -> list[str]:
    """A line for each promise of the default."""
    flattery = 100 * outcome.flattery
    said = [
        (outcome.harm <= HARM, f"runs harmed {outcome.harm:.1%}, at most {HARM:.0%}"),
        (flattery <= 100 * FLATTERY, f"reported minus true {flattery:+.2f} points, at most {100 * FLATTERY:.0f}"),
    ]
    for gain, least in POWER.items():
        text = f"power of +{100 * gain:.0f} points {powers[gain]:.0%}, at least {least:.0%}"
        said.append((powers[gain] >= least, text))
    return [f"{'ok' if ok else 'FAIL'} {text}" for ok, text in said]


def _draw(path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    config = GateConfig()
    canvas = Canvas(figsize=(7.5, 5), layout="constrained")
    axes = canvas.subplots()
    guards: tuple[tuple[Kind, float, str], ...] = (("ladder", 0.0, "-"), ("thresholdout", config.noise, "--"))
    for kind, noise, line in guards:
        found = [Rule(kind=kind, step=step, noise=noise, shown=False) for step in STEPS]
        harms = [100 * worst(rule, effects=(EFFECTS[1],)).harm for rule in found]
        axes.plot(STEPS, harms, line, color="tab:red", label=f"{kind}: runs harmed")
        for gain, colour in zip(POWER, ("tab:blue", "tab:green"), strict=True):
            powers = [100 * power(rule, gain) for rule in found]
            axes.plot(STEPS, powers, line, color=colour, label=f"{kind}: a true +{100 * gain:.0f} points promoted")
    axes.axhline(100 * HARM, color="tab:red", linewidth=0.8, linestyle=":")
    axes.axvline(config.step, color="grey", linewidth=0.8)
    axes.set(xlabel="step of the guard, in standard errors of the paired difference", ylabel="%", ylim=(0, 101))
    axes.legend(loc="center left", fontsize="small")
    canvas.savefig(path, dpi=120)
