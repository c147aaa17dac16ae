"""The one training loop: blind to the algorithm, deterministic, resumable between any two updates.

For equal inputs (base model, parameters, seed, trajectories, credits, thread count, library versions) it gives equal
bytes, in any process and from any checkpoint on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bascule.plugins.algorithm import Algorithm, Credit, Group
from bascule.schemas.errors import TrainError
from bascule.schemas.events import AdapterProbe
from bascule.schemas.trajectory import Trajectory, unpack_floats
from bascule.trainers.batch import WITH_RATIO, Unit, check_ids, sampled_logprobs, split, units_of, weighed
from bascule.trainers.checkpoint import Counters, read_checkpoint, write_checkpoint
from bascule.trainers.credit import credit_of, figures_of, report_to
from bascule.trainers.critic import explained_variance
from bascule.trainers.distributed import ranks
from bascule.trainers.forward import vocabulary
from bascule.trainers.learner import open_learner
from bascule.trainers.lora import adapter_files, with_adapter
from bascule.trainers.loss import effective_sample_size
from bascule.trainers.params import TrainParams, scheduled_rate, train_params
from bascule.trainers.passes import Packed, Passes, packed
from bascule.trainers.probe import probe_ids, probe_learner
from bascule.trainers.step import Objective, check_kl, check_moved, moved_between, step_gradient
from bascule.trainers.streams import Streams, policy_logprobs, reference_logprobs, streams_of, with_streams

if TYPE_CHECKING:
    from peft import PeftModel

    from bascule.trainers.jobs import Progress


#: How many times ``max_kl`` the tokens' log-probabilities may have changed after an update, on average.
OF_CHANGE = 4.0


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update; of its last optimiser step where there are several.

    Attributes:
        loss: sum of the components' losses.
        kl: mean over tokens with a ratio of the k3 estimate of KL(sampler || policy) before the update.
        kl_update: mean over the trained tokens of the k3 estimate of KL(policy before the update || policy), as the
            step found it; where imitation and pairs have no figures from before, it begins with the first step on the
            same tokens, and those of theirs that became likelier count as 0. The noise of dropout is in it.
        moved_after: after the last step, by how many nats the log-probability of the smallest group's tokens has
            changed, on average; 0 where that group is more than a quarter of the update. Where that is too far, all
            tokens are held against what the sampler said of them.
        kl_reference: mean over the tokens that were compared with it of the estimate, by ``kl_estimator``, of the
            divergence to the reference.
        kl_coef: of the KL divergence in the reward.
        clip_fraction: share of policy tokens whose gradient the clip cut.
        entropy: mean entropy in nats of the policy's next-token distribution at trained tokens.
        ess: effective sample size of the importance weights as a share of their tokens.
        explained_variance: of the returns by the critic, before the update.
        pair_accuracy: share of pairs whose preferred trajectory has the higher implicit reward.
        pair_margin: mean difference of the implicit rewards of a pair.
        grad_norm: of the adapter's gradient before clipping.
        learning_rate: as scheduled.
        trained_tokens: tokens that entered the loss.
        nodes: tokens that were computed in one pass.
        max_nodes: of a micro-batch; smaller than asked for once memory ran out.
        optimizer_steps: taken in this update.
        seconds: wall time.
        own: the algorithm's figures of its credit.
    """

    loss: float = 0.0
    kl: float = 0.0
    kl_update: float = 0.0
    moved_after: float = 0.0
    kl_reference: float = 0.0
    kl_coef: float = 0.0
    clip_fraction: float = 0.0
    entropy: float = 0.0
    ess: float = 1.0
    explained_variance: float = 0.0
    pair_accuracy: float = 0.0
    pair_margin: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    trained_tokens: int = 0
    nodes: int = 0
    max_nodes: int = 0
    optimizer_steps: int = 0
    seconds: float = 0.0
    own: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """All of them by name."""
        given = asdict(self)
        return {name: float(value) for name, value in {**given.pop("own"), **given}.items()}


class TrainJob:
    """One LoRA adapter on its way through K updates.

    Args:
        base_folder: the base model.
        algorithm: gives the credit.
        params: the algorithm's parameters (:class:`TrainParams`).
        seed: of the adapter's first weights and of dropout.
        parent_adapter: files of the adapter to continue from, or None; its rank, scale and targets win over ``params``.

    Raises:
        ConfigError: a parameter or the base model is not usable.
        TrainError: the parent adapter is not usable.
    """

    def __init__(
        self,
        base_folder: Path,
        algorithm: Algorithm,
        params: Mapping[str, Any],
        seed: int,
        parent_adapter: Mapping[str, bytes] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.params: TrainParams = train_params(params)
        if parent_adapter is not None:
            self.params = with_adapter(self.params, parent_adapter)
        p = self.params
        self._objective = Objective(p, algorithm, dict(params))
        self._passes = Passes(ranks(), p.max_nodes)
        self._base_folder = base_folder
        self._base_probe: list[float] | None = None
        self._learner = open_learner(
            base_folder, p, seed, parent_adapter, self._passes.processes, with_critic="values" in algorithm.streams
        )
        adapter, critic = self._learner.adapter_parameters(), self._learner.critic_parameters()
        groups: list[dict[str, Any]] = [{"params": adapter, "lr": p.learning_rate}]
        if critic:
            groups.append({"params": critic, "lr": p.critic_learning_rate})
        self._optimizer = torch.optim.AdamW(
            groups,
            betas=(p.adam_beta1, p.adam_beta2),
            eps=p.adam_epsilon,
            weight_decay=p.weight_decay,
            fused=True,
        )
        self._counters = Counters(0, 0, seed, kl_coef=p.kl_coef, max_nodes=p.max_nodes)

    @property
    def model(self) -> PeftModel:
        """The base model with the adapter as it stands, to be read only."""
        return self._learner.model

    @property
    def iteration(self) -> int:
        """Number of updates done."""
        return self._counters.iteration

    def adapter_files(self) -> dict[str, bytes]:
        """The adapter as it stands, in PEFT's layout."""
        return adapter_files(self.model)

    def checkpoint(self) -> bytes:
        """The job's whole state."""
        return write_checkpoint(self.model, self._learner.critic, self._optimizer, self._counters)

    def probe(self) -> AdapterProbe:
        """What an engine that serves the adapter as it stands must say of a fixed text."""
        ids = probe_ids(self._base_folder)
        probe = probe_learner(self._learner, self._passes, ids, self._base_probe)
        self._base_probe = unpack_floats(probe.base)
        return probe

    def restore(self, data: bytes) -> None:
        """Continue from a checkpoint.

        Raises:
            TrainError: the checkpoint is damaged or of another job.
        """
        critic, seed = self._learner.critic, self._counters.seed
        self._counters = read_checkpoint(self.model, critic, self._optimizer, data, seed)
        self._passes.max_nodes = self._counters.max_nodes

    def update(
        self,
        groups: Sequence[Group],
        trajectories: Mapping[str, Trajectory],
        iteration: int,
        progress: Progress = lambda _: None,
    ) -> UpdateMetrics:
        """Train on one batch.

        Without credit nothing changes but the count of updates. A failed update leaves the job unusable: start a new
        one from the last checkpoint.

        Args:
            groups: scored samples.
            trajectories: of these samples, by id; in any order.
            iteration: of this update, counted from 0; a guard against doing one twice.
            progress: is told the figures of every optimiser step, and the ``tokens_per_second`` that it trained.

        Raises:
            TrainError: the iteration is not the next one, the algorithm failed, the data are not usable, the sampler's
                policy is not the trainer's (``max_kl``, ``max_ratio``), the update runs away from the policy that it
                began with (``max_kl``), a loss with a ratio was to have dropout, the loss or gradient is not finite, or
                memory ran out again after the micro-batches were halved.
        """
        started = time.perf_counter()
        if iteration != self._counters.iteration:
            raise TrainError(f"Update {iteration} was asked for, but the next one is {self._counters.iteration}.")
        check_ids(trajectories, vocabulary(self._learner.base))
        kl_coef = self._counters.kl_coef
        streams = streams_of(self.algorithm.streams, groups, trajectories, self._learner, self._passes)
        informed, params = with_streams(groups, streams), {**self._objective.given, "kl_coef": kl_coef}
        credit = credit_of(self.algorithm, informed, params)
        own = figures_of(self.algorithm, informed, credit, params)
        units = self._units(credit, trajectories)
        self._check_dropout(units)
        group_of = _group_of(units, groups)
        parts = split(units, self.params.num_mini_batches, group_of)
        batches = [packed(weighed(part, self.params)) for part in parts]
        known = [self._completed(streams, units, batches)] * len(batches)
        probe = _smallest_group(units, group_of)
        probed = packed(probe)
        before = policy_logprobs(probed, self._learner, self._passes) if probe else {}
        metrics = UpdateMetrics(
            kl_coef=kl_coef,
            explained_variance=explained_variance(credit, streams.values or {}),
            max_nodes=self._passes.max_nodes,
            own=own,
        )
        for step in range(self.params.num_iterations * len(batches)):
            part, began = step % len(batches), time.perf_counter()
            figures, known[part] = self._optimizer_step(batches[part], known[part], metrics)
            now = time.perf_counter()
            metrics = replace(figures, optimizer_steps=step + 1, seconds=now - started)
            progress({**metrics.figures(), "tokens_per_second": metrics.trained_tokens / (now - began)})
        if probe and metrics.optimizer_steps:
            moved_after = moved_between(before, policy_logprobs(probed, self._learner, self._passes))
            if moved_after > OF_CHANGE * self.params.max_kl:  # a sound update moves few tokens so far, too
                whole = moved_between(
                    sampled_logprobs(units), policy_logprobs(packed(units), self._learner, self._passes)
                )
                moved = moved_after if math.isnan(whole) else whole
                check_moved(moved, metrics.optimizer_steps, self.params.max_kl, OF_CHANGE)
            metrics = replace(metrics, moved_after=moved_after)
        self._counters = replace(
            self._counters,
            iteration=iteration + 1,
            kl_coef=_adapted_kl_coef(kl_coef, streams, self.params) if units else kl_coef,
            max_nodes=self._passes.max_nodes,
        )
        return replace(
            metrics,
            trained_tokens=sum(share.tokens for unit in units for share in unit),
            nodes=sum(_nodes(part, self._passes.max_nodes) for part in batches),
            seconds=time.perf_counter() - started,
        )

    def _units(self, credit: Sequence[Credit], trajectories: Mapping[str, Trajectory]) -> list[Unit]:
        try:
            return units_of(credit, trajectories)
        except TrainError as error:
            raise TrainError(error.message, next_step=error.next_step or report_to(self.algorithm)) from error

    def _check_dropout(self, units: Sequence[Unit]) -> None:
        """Refuse dropout where the policy's figures are compared with those that were computed without.

        Raises:
            TrainError: a component has a ratio.
        """
        ratio = sorted({share.component for unit in units for share in unit} & set(WITH_RATIO))
        if self.params.lora_dropout and ratio:
            raise TrainError(
                f"lora_dropout is {self.params.lora_dropout:g}, and the loss {ratio[0]} of {self.algorithm.name} "
                "compares the policy with itself without dropout.",
                next_step="Set lora_dropout to 0, or choose an algorithm that imitates or compares pairs.",
            )

    def _completed(self, streams: Streams, units: Sequence[Unit], parts: Sequence[Packed]) -> Streams:
        """The streams, with those that the losses need and the algorithm did not ask for."""
        components = {share.component for unit in units for share in unit}
        whole = parts[0] if len(parts) == 1 else packed(units)
        moves = len(parts) * self.params.num_iterations > 1
        if streams.policy is None and moves and components & set(WITH_RATIO):
            streams = replace(streams, policy=policy_logprobs(whole, self._learner, self._passes))
        compared = "pair" in components or (self.params.beta > 0 and components & {"policy", "reinforce"})
        if streams.reference is None and compared:
            streams = replace(streams, reference=reference_logprobs(whole, self._learner, self._passes))
        return streams

    def _optimizer_step(
        self, batches: Packed, streams: Streams, before: UpdateMetrics
    ) -> tuple[UpdateMetrics, Streams]:
        """Take one step; the figures of the update so far, with this step's, and the streams for the part's next."""
        seed = (self._counters.seed, self._counters.optimizer_step)
        done, streams = step_gradient(batches, streams, self._objective, self._learner, self._passes, seed)
        sums = done.sums
        tokens = max(sums.tokens, 1.0)
        kl = sums.kl_behaviour / tokens
        kl_update = done.moved / max(done.tokens, 1)
        check_kl(kl, self.params)
        check_moved(kl_update, before.optimizer_steps, self.params.max_kl)
        norm = self._clipped_norm(done.loss)
        rate = scheduled_rate(self.params, self._counters.optimizer_step)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._counters = replace(self._counters, optimizer_step=self._counters.optimizer_step + 1)
        figures = replace(
            before,
            loss=done.loss,
            kl=kl,
            kl_update=kl_update,
            kl_reference=sums.kl_reference / tokens,
            clip_fraction=sums.clipped / tokens,
            entropy=done.entropy / max(done.tokens, 1),
            ess=effective_sample_size(sums),
            pair_accuracy=sums.pair_accuracy / max(sums.pairs, 1.0),
            pair_margin=sums.pair_margin / max(sums.pairs, 1.0),
            grad_norm=norm,
            learning_rate=rate,
            trained_tokens=done.tokens,
            nodes=_nodes(batches, self._passes.max_nodes),
            max_nodes=self._passes.max_nodes,
        )
        return figures, streams

    def _clipped_norm(self, loss: float) -> float:
        """Clip the gradients, the critic's by themselves; the adapter's norm before."""
        adapter, critic = self._learner.adapter_parameters(), self._learner.critic_parameters()
        if critic and self._counters.iteration < self.params.critic_warmup:
            for p in adapter:
                p.grad = None
        limit = self.params.max_grad_norm
        norms = [float(torch.nn.utils.clip_grad_norm_(part, limit, foreach=False)) for part in (adapter, critic)]
        if not all(map(math.isfinite, norms)):
            raise TrainError(
                f"The gradient's norm is {max(norms)} at loss {loss:.4g}.",
                next_step="Lower learning_rate.",
                figures={"loss": loss},
            )
        return norms[0]


def _group_of(units: Sequence[Unit], groups: Sequence[Group]) -> dict[str, str]:
    """The group of each scored trajectory.

    Raises:
        TrainError: there is one among the units that has no score.
    """
    found = {s.trajectory: g.example for g in groups for s in g.samples if s.reward is not None}
    unscored = sorted({share.trajectory for unit in units for share in unit} - set(found))
    if unscored:
        raise TrainError(f"Credit was given to trajectory {unscored[0]}, which has no score in this batch.")
    return found


def _smallest_group(units: Sequence[Unit], group_of: Mapping[str, str]) -> list[Unit]:
    """The units of the group with the fewest tokens; none if these are more than a quarter of all."""
    sizes: Counter[str] = Counter()
    for unit in units:
        sizes[group_of[unit[0].trajectory]] += sum(len(row.tokens) for share in unit for row in share.rows)
    if not sizes:
        return []
    smallest = min(sizes, key=lambda name: (sizes[name], name))
    if 4 * sizes[smallest] > sizes.total():
        return []
    return [unit for unit in units if group_of[unit[0].trajectory] == smallest]


def _nodes(batches: Packed, max_nodes: int) -> int:
    return sum(len(b.tree.tokens) for b in batches(max_nodes))


def _adapted_kl_coef(coefficient: float, streams: Streams, params: TrainParams) -> float:
    """``kl_coef``, moved towards the wanted divergence (arXiv 1909.08593, section 2.2)."""
    if params.target_kl is None or not streams.policy or streams.reference is None:
        return coefficient
    reference = streams.reference
    sums = [float((p - reference[t]).sum()) for t, p in streams.policy.items()]
    error = min(max(math.fsum(sums) / len(sums) / params.target_kl - 1, -0.2), 0.2)
    return max(coefficient * (1 + error * len(sums) / params.horizon), 0.0)
