"""The conformance suite of a task: the kit's checks on the real scoring process, and episodes in real processes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import msgspec

from bascule.plugins.kit import Check, check, face_checks, fault_of
from bascule.plugins.kit_scores import score_checks
from bascule.plugins.loader import Plugins
from bascule.runtime.audit.baselines import score_baselines
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.episodes.batch import batch_of
from bascule.runtime.episodes.broker import EpisodeSpec
from bascule.runtime.services.rollout import Episodes, harness_processes
from bascule.runtime.world import World, task_digest
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.sandbox import SandboxConfig
from bascule.schemas.trajectory import Sampling, Scored, Trajectory, Verdict
from bascule.verifiers.scoring import Scorer
from bascule.verifiers.scoring_process import fitting

_EPISODES = 2
_ELSEWHERE = """
import json, sys
from bascule.plugins.loader import plugins
from bascule.runtime.world import task_digest
name, params = json.load(sys.stdin)
print(task_digest(plugins().registry.tasks.get(name)(params).public()))
"""


class _Stopped(Exception):
    """The verifier hung or ended its process: no further verdict is asked for."""


class _Verdicts:
    """Asks for verdicts, and keeps what they were like.

    Args:
        told: is given a line on how far it is, after each verdict.
    """

    def __init__(self, scorer: Scorer, told: Callable[[str], None]) -> None:
        self._scorer = scorer
        self._told = told
        self._count = 0
        self._seconds = 0.0
        self._rewards: tuple[float, float] | None = None
        self._stopped = ""

    async def score(self, split: Split, example: str, answer: str | None, episode: Trajectory | None = None) -> Verdict:
        """As :meth:`Scorer.score`.

        Raises:
            _Stopped: the request lost the scoring process.
        """
        before = time.monotonic()
        verdict = await self._scorer.score(split, example, answer, episode)
        self._count += 1
        self._seconds += time.monotonic() - before
        if self._scorer.lost:
            self._stopped = f"on {split} item {example!r} {self._scorer.lost}"
            raise _Stopped
        if isinstance(verdict, Scored) and episode is not None and not self._scorer.episodes:
            verdict = fitting(verdict, episode)
        if isinstance(verdict, Scored):
            least, most = self._rewards or (verdict.reward, verdict.reward)
            self._rewards = min(least, verdict.reward), max(most, verdict.reward)
        self._told(f"{self._count} verdicts, {self._seconds / self._count:.2g} s each")
        return verdict

    @property
    def none(self) -> bool:
        """Whether nothing has been scored."""
        return self._rewards is None

    def verifier(self) -> Check:
        """Whether it hung or ended its process."""
        return check(
            "verifier",
            "the verifier gives each verdict in time and does not end its process",
            [self._stopped] if self._stopped else [],
            "Let it end by itself, bound what it does there, and keep it from os._exit and from running out of memory; "
            "what else needs verdicts was not checked.",
            f"{self._count} verdicts, {self._seconds / max(self._count, 1):.2g} s each",
        )

    def scale(self) -> Check:
        """The range of the rewards; one beyond 0 to 1 warns."""
        least, most = self._rewards or (0.0, 0.0)
        found = f"rewards from {least:g} to {most:g}"
        faults = [found] if least < 0 or most > 1 else []
        faults += [f"an episode without an answer gets 0, more than the worst one with {least:g}"] if least < 0 else []
        scale = check(
            "scale",
            "rewards are from 0 to 1",
            faults,
            "Scale them, unless they are to be so: bounds of these checks and of the gate are made for 0 to 1.",
            found,
        )
        return msgspec.structs.replace(scale, outcome="warns") if faults else scale


def _quiet(_: str) -> None:
    pass


async def conformance(
    plugins: Plugins,
    name: str,
    params: dict[str, Any],
    *,
    unsafe: bool = False,
    seconds: float | None = None,
    told: Callable[[str], None] = _quiet,
) -> AsyncGenerator[Check, None]:
    """Check a task, and give each check as it is done.

    One that could not be made is broken and says why; what builds on a face that does not load, or on a verifier that
    hangs or ends its process, is left out.

    Args:
        unsafe: without a sandbox.
        seconds: that one verdict may take; by default what the private face says.
        told: is given a line on what is under way.

    Raises:
        ConfigError: there is no such task, or its parameters are not usable.
    """
    sandbox = SandboxConfig(require=(), unsafe=True) if unsafe else SandboxConfig()
    world = World(plugins, RunConfig(task=PluginChoice(name=name, params=params), sandbox=sandbox))
    task = world.task
    promise = "the public face loads"
    told("loading the task")
    try:
        public = world.public
    except Exception as e:
        yield check("face", promise, [fault_of(e)], _next(e))
        return
    yield check("face", promise, [], "", f"{public.name}, version {public.version}")
    for one in face_checks(task, public):
        yield one
    told("loading the task in another process")
    yield await _elsewhere(world)
    try:
        async with Scorer(name, params, sandbox=sandbox, timeout=seconds, tries=1) as scorer:
            verdicts = _Verdicts(scorer, told)
            try:
                async for one in score_checks(public, verdicts.score):
                    yield one
                if verdicts.none:
                    return
                for one in await _played(world, verdicts):
                    yield one
            except _Stopped:
                yield verdicts.verifier()
                return
            yield verdicts.verifier()
            yield verdicts.scale()
    except BasculeError as e:
        yield check("scorer", "the scoring process opens", [e.message], _next(e))
        return
    told("scoring the baselines")
    yield await _baselines(world)


def _next(error: Exception) -> str:
    return (error.next_step if isinstance(error, BasculeError) else None) or "Correct the task."


async def _elsewhere(world: World) -> Check:
    """The public face in a process of its own, with another hash seed."""
    choice = world.config.task
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", _ELSEWHERE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
    )
    try:
        out, errors = await process.communicate(msgspec.json.encode((choice.name, choice.params)))
    finally:
        if process.returncode is None:
            process.kill()
    found = out.decode().strip()
    faults = []
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        faults.append(f"it does not load there: {' '.join(last)}")
    elif found != task_digest(world.public):
        faults.append("it is another one there")
    return check(
        "same-elsewhere",
        "the public face is the same in another process",
        faults,
        "Sort what comes from sets, and seed what is drawn; workers of one run must see the same items.",
    )


async def _played(world: World, verdicts: _Verdicts) -> list[Check]:
    """Episodes of the first harness with an engine that always says the same, and their verdicts."""
    public = world.public
    allowed = "the first harness asks for no more than the task allows"
    played = "the first harness plays an episode to its end, and it gets a verdict"
    try:
        harness = make_harness(world.task.harness())
    except Exception as e:
        return [check("episode", played, [fault_of(e)], _next(e))]
    refused = refusal(harness.manifest, public)
    checks = [check("allowed", allowed, [refused] if refused else [], "Correct the manifest, or what the task allows.")]
    if refused:
        return checks
    examples = public.dev[:_EPISODES]
    batch = batch_of(harness, public, "dev", list(range(len(examples))), key="check", seed=0)
    said = Counter(public.answers.values()).most_common(1)[0][0] if public.answers else ""

    async def one(episodes: Episodes, number: int) -> Trajectory:
        example = examples[number]
        spec = EpisodeSpec(
            trajectory=f"check-{number:04d}-n00",
            harness=harness,
            example=example.input,
            sampling=Sampling(),
            seed=number,
            batch=batch,
        )
        return await episodes(spec, ConstantEngine(said), partial(world.task.tools, example))

    faults, rewards = [], []
    try:
        async with harness_processes(world) as episodes:
            trajectories = [await one(episodes, number) for number in range(len(examples))]
    except Exception as e:
        return [*checks, check("episode", played, [fault_of(e)], _next(e))]
    for example, trajectory in zip(examples, trajectories, strict=True):
        if trajectory.error is not None:
            faults.append(f"on {example.id!r} it ended in {trajectory.error.kind}: {trajectory.error.message}")
        verdict = await verdicts.score("dev", example.id, trajectory.answer, trajectory)
        if isinstance(verdict, Scored):
            rewards.append(verdict.reward)
        else:
            faults.append(f"on {example.id!r} the episode is unscored: {verdict.reason}")
    steps = max((len(t.steps) for t in trajectories), default=0)
    found = f"{len(trajectories)} episodes of at most {steps} steps, rewards {', '.join(f'{r:g}' for r in rewards)}"
    return [*checks, check("episode", played, faults, "Correct the harness or the scorer.", found)]


async def _baselines(world: World) -> Check:
    promise = "the baselines run, and every answer of theirs is scored"
    try:
        scores = await score_baselines(world, ("dev", "sealed"))
    except Exception as e:
        return check("scored-baselines", promise, [fault_of(e)], _next(e))
    faults = [
        f"{name} has no verdict on {found.unscored} of {found.n} items of {split}: {found.reason}"
        for name, by_split in scores.items()
        for split, found in by_split.items()
        if found.unscored
    ]
    figures = [
        f"{name} " + ", ".join(f"{split} {found.score or 0:.3f}" for split, found in by_split.items())
        for name, by_split in scores.items()
    ]
    return check("scored-baselines", promise, faults, "Correct the baseline or the scorer.", "; ".join(figures))
