"""What is known of every sampled token before an update: of the policy, of the reference, of the critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from bascule.plugins.algorithm import Group, Sample, Stream, Turn
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.batch import Floats, MicroBatch, probes, scattered
from bascule.trainers.forward import TokenFigures, token_figures
from bascule.trainers.learner import Learner, reference_model
from bascule.trainers.passes import Packed, Passes, packed

PerToken = Mapping[str, Floats]  # [T] of each trajectory's sampled tokens, in the order of time, by its id


@dataclass(frozen=True)
class Streams:
    """Figures of all tokens of a batch; None where nobody has asked for them.

    Attributes:
        policy: log-probabilities under the policy as it is before the update.
        reference: log-probabilities under the reference model.
        values: the critic's estimates of the return from before each token.
    """

    policy: PerToken | None = None
    reference: PerToken | None = None
    values: PerToken | None = None


def streams_of(
    wanted: Set[Stream],
    groups: Sequence[Group],
    trajectories: Mapping[str, Trajectory],
    learner: Learner,
    passes: Passes,
) -> Streams:
    """Compute what an algorithm asks for, of every scored sample's tokens.

    Raises:
        TrainError: a scored trajectory is missing, or memory ran out.
    """
    if not wanted:
        return Streams()
    scored = {s.trajectory for g in groups for s in g.samples if s.reward is not None}
    missing = sorted(scored - set(trajectories))
    if missing:
        raise TrainError(f"The batch lacks the trajectory {missing[0]}, which was scored.")
    batches = packed(probes({t: trajectories[t] for t in scored}))
    found: dict[str, PerToken] = {}
    if own := sorted(wanted & {"policy", "values"}):

        def figures(now: TokenFigures) -> Tensor:
            return torch.stack([now.logprobs if name == "policy" else _values(learner, now) for name in own])

        together = _each_token(figures, batches, learner, passes)
        found |= {name: {t: x[i] for t, x in together.items()} for i, name in enumerate(own)}
    if "reference" in wanted:
        found["reference"] = reference_logprobs(batches, learner, passes)
    return Streams(**found)


def policy_logprobs(batches: Packed, learner: Learner, passes: Passes) -> PerToken:
    """The policy's log-probability of every token, without dropout."""
    return _each_token(lambda now: now.logprobs, batches, learner, passes)


def reference_logprobs(batches: Packed, learner: Learner, passes: Passes) -> PerToken:
    """The reference model's log-probability of every token."""
    with reference_model(learner):
        return policy_logprobs(batches, learner, passes)


def with_streams(groups: Sequence[Group], streams: Streams) -> Sequence[Group]:
    """The groups with the streams in the turns of their samples."""
    known = {n: s for n in ("policy", "reference", "values") if (s := getattr(streams, n)) is not None}
    if not known:
        return groups

    def filled(sample: Sample) -> Sample:
        own = {name: values[sample.trajectory] for name, values in known.items() if sample.trajectory in values}
        turns: list[Turn] = []
        start = 0
        for turn in sample.turns:
            stop = start + len(turn.token_ids)
            turns.append(msgspec.structs.replace(turn, **{k: tuple(v[start:stop].tolist()) for k, v in own.items()}))
            start = stop
        return msgspec.structs.replace(sample, turns=tuple(turns))

    return [msgspec.structs.replace(g, samples=tuple(filled(s) for s in g.samples)) for g in groups]


@torch.no_grad()
def _each_token(
    figure: Callable[[TokenFigures], Tensor], batches: Packed, learner: Learner, passes: Passes
) -> dict[str, Floats]:
    """A figure [..., M] of every token of a micro-batch, without gradient, as [..., T] of whole trajectories."""

    def compute(_index: int, batch: MicroBatch, _counts: bool) -> Floats:
        return figure(token_figures(learner.base, batch)).cpu().numpy().astype(np.float64)

    found = passes.each(batches, compute)
    return scattered(batches(passes.max_nodes), found)


def _values(learner: Learner, now: TokenFigures) -> Tensor:
    assert learner.critic is not None
    return learner.critic(now.hidden)  # type: ignore[no-any-return]
