"""The conformance suite of a task: the kit's checks on the real scoring process, and episodes in real processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from functools import partial
from typing import Any

import msgspec

from bascule.plugins.kit import Check, check, face_checks, score_checks
from bascule.plugins.loader import Plugins
from bascule.runtime.audit.baselines import score_baselines
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.episodes.batch import batch_of
from bascule.runtime.episodes.broker import EpisodeSpec
from bascule.runtime.services.rollout import Episodes, harness_processes
from bascule.runtime.world import World, task_digest
from bascule.schemas.errors import BasculeError
from bascule.schemas.harness import make_harness
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.sandbox import SandboxConfig
from bascule.schemas.trajectory import Sampling, Scored, Trajectory
from bascule.verifiers.scoring import Scorer

_EPISODES = 2
_ELSEWHERE = """
import json, sys
from bascule.plugins.loader import plugins
from bascule.runtime.world import task_digest
name, params = json.load(sys.stdin)
print(task_digest(plugins().registry.tasks.get(name)(params).public()))
"""


async def conformance(plugins: Plugins, name: str, params: dict[str, Any], *, unsafe: bool = False) -> list[Check]:
    """Check a task.

    Args:
        unsafe: without a sandbox.

    Returns:
        The checks. One that could not be made is broken and says why; what builds on a face that does not load is left
        out.

    Raises:
        ConfigError: there is no such task, or its parameters are not usable.
    """
    sandbox = SandboxConfig(require=(), unsafe=True) if unsafe else SandboxConfig()
    world = World(plugins, RunConfig(task=PluginChoice(name=name, params=params), sandbox=sandbox))
    task = world.task
    promise = "the public face loads"
    try:
        public = world.public
    except BasculeError as e:
        return [check("face", promise, [e.message], e.next_step or "Correct the task.")]
    except Exception as e:
        return [check("face", promise, [f"{type(e).__name__}: {e}"], "Correct the task.")]
    checks = [check("face", promise, [], "", f"{public.name}, version {public.version}")]
    checks += face_checks(task, public)
    checks.append(await _elsewhere(world))
    try:
        async with Scorer(name, params, sandbox=sandbox) as scorer:
            checks += await score_checks(public, scorer.score)
            checks += await _played(world, scorer)
    except BasculeError as e:
        checks.append(check("scorer", "the scoring process opens", [e.message], e.next_step or "Correct the task."))
        return checks
    checks.append(await _baselines(world))
    return checks


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
    out, errors = await process.communicate(msgspec.json.encode((choice.name, choice.params)))
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


async def _played(world: World, scorer: Scorer) -> list[Check]:
    """Episodes of the first harness with an engine that always says the same, and their verdicts."""
    public = world.public
    allowed = "the first harness asks for no more than the task allows"
    played = "the first harness plays an episode to its end, and it gets a verdict"
    try:
        harness = make_harness(world.task.harness())
    except BasculeError as e:
        return [check("episode", played, [e.message], e.next_step or "Correct the harness.")]
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
    except BasculeError as e:
        return [*checks, check("episode", played, [e.message], e.next_step or "Correct what it names.")]
    for example, trajectory in zip(examples, trajectories, strict=True):
        if trajectory.error is not None:
            faults.append(f"on {example.id!r} it ended in {trajectory.error.kind}: {trajectory.error.message}")
        verdict = await scorer.score("dev", example.id, trajectory.answer, trajectory)
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
    except BasculeError as e:
        return check("scored-baselines", promise, [e.message], e.next_step or "Correct them.")
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
