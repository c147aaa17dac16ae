"""The arm ``best-of-n``: the first harness with n votes, and what its samples hold if the right one were known."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from bascule.plugins.tasks.harness_files import REFERENCE, manifest_text
from bascule.plugins.tasks.reference_harness import extract
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.harness import parse_manifest
from bascule.schemas.run import EvaluationConfig, RunConfig
from bascule.schemas.trajectory import ModelCall, Scored, Trajectory
from bascule.verifiers.scoring import Scorer

MOST = 256
#: Samples that one episode may ask for.
_MOST_CALLS = 4096


def votes_of(config: RunConfig, sealed: int, given: int | None) -> int:
    """How many samples an item gets: as many as given, else the budget's rollouts shared out over the sealed items.

    Raises:
        ConfigError: neither says how many.
    """
    if given is not None:
        return given
    if config.budget.rollouts is None:
        raise ConfigError(
            "the budget bounds no rollouts, from which the number of votes would follow.",
            next_step="Give the arm its n, for example n = 8.",
        )
    return max(1, min(MOST, config.budget.rollouts // max(1, sealed)))


def voting(config: RunConfig, reference: Mapping[str, str], votes: int) -> RunConfig:
    """The configuration under which nothing is improved, and the first harness answers by a majority of its samples.

    Args:
        reference: the task's own harness.

    Raises:
        ConfigError: the first harness is not the reference code, whose ``votes`` are set.
    """
    files = dict(config.harness or reference)
    if files.get("harness.py") != REFERENCE.read_text(encoding="utf-8"):
        raise ConfigError(
            "the first harness has code of its own, which takes no votes.",
            next_step="Give the arm a harness with the reference code, or leave the arm out.",
        )
    manifest = parse_manifest(files["manifest.json"])
    retries, how = manifest.params.get("retries", 0), manifest.params.get("extract", "whole")
    try:
        extract("7", how)
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries = {retries!r}")
    except Exception as e:  # the reference code's own
        raise ConfigError(
            f"the first harness has parameters that its code cannot use: {type(e).__name__}: {e}.",
            next_step="Correct params in its manifest.json.",
        ) from e
    samples = votes * (retries + 1)
    if samples > _MOST_CALLS:
        raise ConfigError(f"{samples} samples an episode are over {_MOST_CALLS}.", next_step="Lower n.")
    files["manifest.json"] = manifest_text(
        msgspec.structs.replace(
            manifest,
            params={"temperature": 1.0, **manifest.params, "votes": votes},
            max_model_calls=max(manifest.max_model_calls, samples),
        )
    )
    # Nothing is chosen from a landscape over train, so that one episode of it does.
    evaluation = msgspec.structs.replace(config.evaluation, train_groups=1, train_samples=1)
    assert isinstance(evaluation, EvaluationConfig)
    return msgspec.structs.replace(config, harness=files, levers=("harness",), max_generations=0, evaluation=evaluation)


async def best_of_samples(
    world: World, blobs: Blobs, logged: Mapping[int, TrajectoryLogged]
) -> dict[int, float] | None:
    """The best reward among the samples of each item, by position: pass@n where rewards are pass and fail.

    Each sample is answered as the reference code would answer it alone, and scored by the task's own scorer.

    Args:
        logged: the items' trajectories under a harness with the reference code.

    Returns:
        None if the task's scorer scores whole episodes.
    """
    params = parse_manifest(world.config.harness["manifest.json"]).params
    answers: dict[int, list[str]] = {}
    for position, data in logged.items():
        body = data.body
        if body is None and data.blob is not None:
            body = msgspec.json.decode(await blobs.get(data.blob), type=Trajectory)
        answers[position] = _answers(body, params) if body is not None else []
    async with Scorer(world.config.task.name, world.config.task.params, sandbox=world.config.sandbox) as scorer:
        if scorer.episodes:
            return None

        async def best(position: int) -> float:
            example = logged[position].example
            verdicts = [await scorer.score("sealed", example, answer) for answer in answers[position]]
            return max((v.reward for v in verdicts if isinstance(v, Scored)), default=0.0)

        found = await asyncio.gather(*map(best, answers))
    return dict(zip(answers, found, strict=True))


def _answers(body: Trajectory, params: Mapping[str, Any]) -> list[str]:
    """The different answers of an episode's samples."""
    texts = [output.text for step in body.steps if isinstance(step, ModelCall) for output in step.outputs]
    how = params.get("extract", "whole")
    return list(dict.fromkeys(extract(text, how) or text.strip() for text in texts))
