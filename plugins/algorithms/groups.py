"""What the algorithms ask of a group's samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from bascule.plugins.algorithm import Group, Sample
from bascule.schemas.errors import TrainError

NEXT_STEP = "Choose an algorithm that does not need them, or an engine and a trainer that supply them."


def scored(group: Group) -> list[tuple[Sample, float]]:
    """The samples that have a reward, and their rewards, in their order."""
    return [(s, s.reward) for s in group.samples if s.reward is not None]


def truncated(sample: Sample) -> bool:
    """Whether an output of the sample was cut at its token limit."""
    return any(turn.truncated for turn in sample.turns)


def token_ids(sample: Sample) -> tuple[int, ...]:
    """[T] sampled tokens of all turns."""
    return tuple(token for turn in sample.turns for token in turn.token_ids)


def token_logprobs(sample: Sample, of: Literal["behaviour", "policy", "reference"]) -> list[float]:
    """[T] log-probabilities of the sampled tokens of all turns.

    Raises:
        TrainError: there is not one for each token.
    """
    return _stream(sample, f"{of} log-probabilities", [p for turn in sample.turns for p in getattr(turn, of)])


def token_values(sample: Sample) -> list[float]:
    """[T] the critic's estimates from before the sampled tokens of all turns.

    Raises:
        TrainError: there is not one for each token.
    """
    return _stream(sample, "values", [v for turn in sample.turns for v in turn.values])


def distinct(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples of equal tokens together, in the order of the first of each; one without tokens is by itself."""
    alike: dict[object, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(token_ids(sample) or sample.trajectory, []).append(sample)
    return list(alike.values())


def _stream(sample: Sample, what: str, found: list[float]) -> list[float]:
    tokens = sum(len(turn.token_ids) for turn in sample.turns)
    if len(found) != tokens:
        raise TrainError(
            f"Trajectory {sample.trajectory} has {len(found)} {what} for {tokens} sampled tokens.", next_step=NEXT_STEP
        )
    return found
