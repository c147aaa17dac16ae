"""The algorithm protocol: who assigns credit, and what an algorithm may ask of the one training loop.

An algorithm is a pure function from scored groups to credit. What it needs of the data it declares in ``requires``,
what it needs of the model in ``streams``. One whose loss is none of the loop's brings its own (:class:`OwnLoss`);
one that trains by itself says so by being an :class:`OwnTraining`; :class:`OwnFigures` is for the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from bascule.schemas.trajectory import Trajectory

Stream = Literal["policy", "reference", "values"]
Component = Literal["policy", "reinforce", "imitation", "pair", "own"]


class Requires(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold of the data before an algorithm may be chosen.

    Attributes:
        behaviour_logprobs: every sampled token has the log-probability that it was sampled with.
        on_policy: the samples come from the adapter that is updated; a job samples anew for every iteration.
        group_size: scored samples that a group must have to count.
        reward_variance: a group whose rewards differ.
        winners: a sample that passed or, where the task has no pass, one with a reward above 0.
        pairs: two samples of one group of which the verifier ranks one above the other.
        step_rewards: rewards of single model calls.
    """

    behaviour_logprobs: bool = False
    on_policy: bool = False
    group_size: int = 1
    reward_variance: bool = False
    winners: bool = False
    pairs: bool = False
    step_rewards: bool = False


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled output of an episode, token for token.

    Attributes:
        token_ids: [T] sampled tokens.
        behaviour: [T] the sampler's log-probabilities; empty where they were not recorded.
        truncated: it was cut at its token limit.
        reward: of this model call alone, where the verifier gives step rewards.
        policy: [T] log-probabilities under the trained policy as it is before the update.
        reference: [T] log-probabilities under the reference model.
        values: [T] the critic's estimate of the return from before each token.

    The last three are empty unless the algorithm asks for them in ``streams``.
    """

    token_ids: tuple[int, ...]
    behaviour: tuple[float, ...] = ()
    truncated: bool = False
    reward: float | None = None
    policy: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One scored trajectory of a group, as credit assignment sees it.

    Attributes:
        trajectory: its id.
        reward: None if unscored; never to be read as 0.
        passed: pass/fail, where the task has it.
        tokens: number of sampled tokens, T over all turns.
        turns: its sampled outputs in the order of time; tokens of tools and environment are not among them.
    """

    trajectory: str
    reward: float | None
    passed: bool | None
    tokens: int
    turns: tuple[Turn, ...] = ()


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of one example under one harness and one adapter."""

    example: str
    samples: tuple[Sample, ...]


class Credit(msgspec.Struct, frozen=True, kw_only=True):
    """What one trajectory's sampled tokens are trained with.

    Attributes:
        trajectory: its id.
        component: ``policy`` (advantage times clipped ratio, arXiv 1707.06347), ``reinforce`` (advantage times
            log-probability under a truncated importance weight), ``imitation`` (weighted cross-entropy), ``pair``
            (preferred over the trajectory ``rejected``, arXiv 2305.18290), or ``own`` (the algorithm's loss).
        advantage: one number for all sampled tokens, or one for each of the trajectory's, in the order of time. A
            weight >= 0 for ``imitation`` and ``pair``, where it is one number.
        returns: what the critic is to predict before each sampled token, in the order of time; None trains no critic.
        rejected: id of the trajectory that a ``pair`` prefers this one to.
    """

    trajectory: str
    component: Component
    advantage: float | tuple[float, ...]
    returns: tuple[float, ...] | None = None
    rejected: str | None = None


class Algorithm(Protocol):
    """An algorithm on the one training loop.

    Attributes:
        name: as chosen by policies, e.g. ``grpo``.
        version: changes when its maths or its defaults do.
        requires: what must hold of the data before it may be chosen.
        streams: what the trainer computes for every sampled token before it asks for credit.
    """

    name: str
    version: str
    requires: Requires
    streams: frozenset[Stream]

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters under the field's names (TRL, verl) with their defaults."""
        ...

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """Assign credit; pure. Trajectories without credit are not trained on.

        Args:
            groups: with their unscored samples.
            params: the job's; ``kl_coef`` is the controller's present value where it adapts.
        """
        ...


@runtime_checkable
class OwnLoss(Protocol):
    """What an algorithm that gives ``own`` credit has as well."""

    def token_loss(self, inputs: Any, params: dict[str, Any]) -> Any:
        """The loss of each token: a tensor [M] from :class:`bascule.trainers.loss.LossInputs` of M tokens.

        The loop multiplies it by each token's share of the optimiser step, so the result does not depend on how the
        tokens are split.
        """
        ...


@runtime_checkable
class OwnFigures(Protocol):
    """What an algorithm whose credit has figures that are worth keeping has as well."""

    def figures(self, groups: Sequence[Group], credit: Sequence[Credit], params: dict[str, Any]) -> dict[str, float]:
        """Figures of the credit that these groups got, by name; pure. They stand among the update's metrics."""
        ...


@dataclass(frozen=True)
class TrainWork:
    """One update, for an algorithm that trains by itself.

    Attributes:
        base: folder of the base model.
        params: the job's.
        seed: the job's.
        iteration: from 0.
        groups: scored samples.
        trajectories: of all samples, by id.
        adapter: files of the adapter to continue from, None for a fresh one.
        state: what the update before left behind, None at first.
    """

    base: Path
    params: dict[str, Any]
    seed: int
    iteration: int
    groups: Sequence[Group]
    trajectories: Mapping[str, Trajectory]
    adapter: Mapping[str, bytes] | None
    state: bytes | None


@dataclass(frozen=True)
class Trained:
    """What such an update leaves: the adapter in PEFT's layout, what the next one continues from, and figures."""

    files: dict[str, bytes]
    state: bytes
    metrics: dict[str, float]


@runtime_checkable
class OwnTraining(Protocol):
    """What an algorithm that trains by itself has as well."""

    def train(self, work: TrainWork) -> Trained:
        """Make one update, and write nothing but what is returned.

        Raises:
            TrainError: the data or the figures do not allow it.
        """
        ...
