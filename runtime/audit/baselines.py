"""Baselines, scored where everything is scored: in the scoring process.

Some take a minute, a classifier that is fitted or a program that runs, and none of them changes as long as its task,
its code and the libraries are the same. So what they scored is remembered in the user's cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import msgspec
from packaging.requirements import Requirement

from bascule.plugins.loader import code_hash
from bascule.plugins.task import Compares, Comparison
from bascule.plugins.wheels import cache_folder
from bascule.plugins.whole import whole_file
from bascule.runtime.world import World, task_digest
from bascule.schemas.codec import canonical
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.scoring import Scorer


class BaselineScore(msgspec.Struct, frozen=True, kw_only=True):
    """What a baseline reaches on one split.

    Attributes:
        score: mean reward over all ``n`` examples of the split that the run uses; one without a verdict counts 0. None
            if no example has a verdict.
        unscored: examples without a verdict; ``reason`` is that of the first.
    """

    score: float | None
    n: int
    unscored: int = 0
    reason: str = ""


Scores = dict[str, dict[str, BaselineScore]]
"""By the baseline's name and the split."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded figure and the one that was made here; ``within`` is None where there is no verdict."""

    comparison: Comparison
    here: BaselineScore
    within: bool | None


async def _score(scorer: Scorer, world: World, split: Split, answer: Callable[[str], str | None]) -> BaselineScore:
    examples = [world.public.split(split)[p] for p in world.positions(split)]
    verdicts = await asyncio.gather(*(scorer.score(split, e.id, answer(e.id)) for e in examples))
    reasons = [v.reason for v in verdicts if isinstance(v, Unscored)]
    total = sum(v.reward for v in verdicts if isinstance(v, Scored))
    return BaselineScore(
        score=None if len(reasons) == len(examples) else total / len(examples),
        n=len(examples),
        unscored=len(reasons),
        reason=reasons[0] if reasons else "",
    )


def _scorer(world: World) -> Scorer:
    config = world.config
    return Scorer(config.task.name, config.task.params, sandbox=config.sandbox)


async def score_baselines(world: World, splits: Sequence[Split]) -> Scores:
    """Score each of the task's baselines on each split, over the examples that the run uses, and remember that."""
    async with _scorer(world) as scorer:
        baselines = await asyncio.to_thread(world.task.baselines, world.public)
        scores: Scores = {
            b.name: {s: await _score(scorer, world, s, b.answers[s].get) for s in splits if s in b.answers}
            for b in baselines
        }
    _remember(_place(world, splits), scores)
    return scores


def remembered_baselines(world: World, splits: Sequence[Split]) -> Scores | None:
    """What :func:`score_baselines` found here for this task, its code and these examples; None if nothing."""
    try:
        return msgspec.json.decode(_place(world, splits).read_bytes(), type=Scores)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


async def baselines_once(world: World, splits: Sequence[Split]) -> Scores:
    """What is remembered, unless an example had no verdict then; else scored now."""
    known = await asyncio.to_thread(remembered_baselines, world, splits)
    if known is not None and not any(score.unscored for by_split in known.values() for score in by_split.values()):
        return known
    return await score_baselines(world, splits)


async def score_comparisons(world: World, comparisons: Sequence[Comparison] | None = None) -> list[Compared]:
    """Make the figures that the task was recorded to have elsewhere; all of them unless some are given."""
    if comparisons is None:
        comparisons = world.task.comparisons() if isinstance(world.task, Compares) else ()
    out = []
    for c in comparisons:
        task = msgspec.structs.replace(world.config.task, params={**world.config.task.params, **c.params})
        other = World(world.plugins, msgspec.structs.replace(world.config, task=task))
        (answers,) = (b.answers[c.split] for b in other.task.baselines(other.public) if b.name == c.baseline)
        async with _scorer(other) as scorer:
            here = await _score(scorer, other, c.split, answers.get)
        within = None if here.score is None else abs(here.score - c.recorded) <= c.tolerance
        out.append(Compared(comparison=c, here=here, within=within))
    return out


async def score_constant(world: World, answer: str) -> float:
    """What one answer to everything scores on the sealed split; an example without a verdict counts 0."""
    async with _scorer(world) as scorer:
        return (await _score(scorer, world, "sealed", lambda _: answer)).score or 0.0


def installed(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the libraries that a baseline may compute with: all that Bascule may need, and ``packages``.

    Args:
        packages: names of further distributions.

    Returns:
        By name; empty for what is not installed.
    """
    found = {}
    for name in sorted({*(Requirement(text).name for text in requires("bascule") or ()), *packages}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _place(world: World, splits: Sequence[Split]) -> Path:
    """The file for the scores of these splits; its name follows from all that they depend on."""
    task = world.config.task
    depends = (
        *(task.name, task.params, task_digest(world.public), world.plugins.pin("task", task.name).hash, code_hash()),
        *(platform.python_version(), installed(world.public.allows.packages)),
        *(world.config.sandbox.unsafe, [(split, len(world.positions(split))) for split in splits]),
    )
    return cache_folder() / "baselines" / f"{hashlib.blake2b(canonical(depends), digest_size=16).hexdigest()}.json"


def _remember(path: Path, scores: Scores) -> None:
    """Put the file in place; a cache that is full is no failure."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(msgspec.json.encode(scores))
