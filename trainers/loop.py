"""The one training loop: blind to the algorithm, deterministic, resumable between any two updates.

For equal inputs (base model, parameters, seed, trajectories, credits, thread count, library versions) it gives equal
bytes, in any process and from any checkpoint on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from bascule.plugins.algorithm import Algorithm, Component, Credit, Group, OwnLoss, Sample, Turn
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.base_model import load_model
from bascule.trainers.batch import (
    COMPONENTS,
    Floats,
    MicroBatch,
    Unit,
    gathered,
    micro_batches,
    probes,
    scattered,
    split,
    units_of,
    weighed,
)
from bascule.trainers.checkpoint import Counters, read_checkpoint, write_checkpoint
from bascule.trainers.critic import Critic, explained_variance
from bascule.trainers.distributed import ranks
from bascule.trainers.forward import TokenFigures, check_base, token_figures
from bascule.trainers.fused import fuse
from bascule.trainers.lora import (
    adapter_files,
    adapter_tensors,
    attach_lora,
    linear_layers,
    load_adapter,
    set_adapter_tensors,
    with_adapter,
)
from bascule.trainers.loss import (
    LossInputs,
    LossOutputs,
    LossSums,
    add_sums,
    effective_sample_size,
    imitation_loss,
    pair_loss,
    policy_loss,
    reinforce_loss,
    value_loss,
)
from bascule.trainers.params import TrainParams, scheduled_rate, train_params

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")
Streams = dict[str, Floats]  # per-token figures of whole trajectories, by id
Progress = Callable[[dict[str, float]], None]

#: Larger trees compute activations again in the backward pass.
KEEP_BYTES = 4 * 2**30


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update; of its last optimiser step where there are several.

    Attributes:
        loss: sum of the components' losses.
        kl: mean over tokens with a ratio of the k3 estimate of KL(sampler || policy) before the update.
        kl_reference: mean over the tokens that were compared with it of the k2 estimate of the divergence to the
            reference.
        kl_coef: of the KL divergence in the reward.
        clip_fraction: share of policy tokens whose gradient the clip cut.
        entropy: mean entropy in nats of the policy's next-token distribution at trained tokens.
        ess: effective sample size of the importance weights as a share of their tokens.
        explained_variance: of the returns by the critic, before the update.
        pair_accuracy: share of pairs whose preferred trajectory has the higher implicit reward.
        grad_norm: before clipping.
        learning_rate: as scheduled.
        trained_tokens: tokens that entered the loss.
        nodes: tokens that were computed in one pass.
        max_nodes: of a micro-batch; smaller than asked for once memory ran out.
        optimizer_steps: taken in this update.
        seconds: wall time.
    """

    loss: float = 0.0
    kl: float = 0.0
    kl_reference: float = 0.0
    kl_coef: float = 0.0
    clip_fraction: float = 0.0
    entropy: float = 0.0
    ess: float = 1.0
    explained_variance: float = 0.0
    pair_accuracy: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    trained_tokens: int = 0
    nodes: int = 0
    max_nodes: int = 0
    optimizer_steps: int = 0
    seconds: float = 0.0


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
        self._given = dict(params)
        self.params: TrainParams = train_params(params)
        if parent_adapter is not None:
            self.params = with_adapter(self.params, parent_adapter)
        self._ranks = ranks()
        base = load_model(base_folder)
        check_base(base)
        self._node_bytes = _activation_bytes(base)
        self._model: PeftModel = attach_lora(base, self.params, seed)
        fuse(self._model)
        if parent_adapter is not None:
            load_adapter(self._model, parent_adapter)
        self._base: Any = self._model.get_base_model()
        self._device = next(self._model.parameters()).device
        self._model.eval()
        enable: Any = self._base.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._recomputed = [m for m in self._base.modules() if getattr(m, "gradient_checkpointing", False)]
        self._dropouts = [m for n, m in self._model.named_modules() if "lora_dropout" in n]
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._critic: Critic | None = None
        if "values" in algorithm.streams:
            head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
            self._critic = Critic(head.weight.shape[1], self._device)
        self._promoted = adapter_tensors(self._model) if self.params.kl_reference == "promoted" else None
        self._ranks.shard(self._base)
        p = self.params
        groups: list[dict[str, Any]] = [{"params": self._trained, "lr": p.learning_rate}]
        if self._critic is not None:
            groups.append({"params": list(self._critic.parameters()), "lr": p.critic_learning_rate})
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
        return self._model

    @property
    def iteration(self) -> int:
        """Number of updates done."""
        return self._counters.iteration

    def adapter_files(self) -> dict[str, bytes]:
        """The adapter as it stands, in PEFT's layout."""
        return adapter_files(self._model)

    def checkpoint(self) -> bytes:
        """The job's whole state."""
        return write_checkpoint(self._model, self._critic, self._optimizer, self._counters)

    def restore(self, data: bytes) -> None:
        """Continue from a checkpoint.

        Raises:
            TrainError: the checkpoint is damaged or of another job.
        """
        self._counters = read_checkpoint(self._model, self._critic, self._optimizer, data, self._counters.seed)

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
            progress: is told the figures of every optimiser step.

        Raises:
            TrainError: the iteration is not the next one, the data are not usable, the sampler's policy is not the
                trainer's (``max_kl``, ``max_ratio``), the loss or gradient is not finite, or memory ran out again
                after the micro-batches were halved.
        """
        started = time.perf_counter()
        if iteration != self._counters.iteration:
            raise TrainError(f"Update {iteration} was asked for, but the next one is {self._counters.iteration}.")
        streams = self._streams(groups, trajectories)
        params = {**self._given, "kl_coef": self._counters.kl_coef}
        credit = self.algorithm.credit(_with_streams(groups, streams), params)
        units = units_of(credit, trajectories)
        explained = _explained(credit, streams.get("values"))
        group_of = {s.trajectory: g.example for g in groups for s in g.samples if s.reward is not None}
        unscored = sorted({s.trajectory for u in units for s in u} - set(group_of))
        if unscored:
            raise TrainError(f"Credit was given to trajectory {unscored[0]}, which has no score in this batch.")
        parts = [weighed(p, self.params) for p in split(units, self.params.num_mini_batches, group_of)]
        old = streams.get("policy")
        moves = len(parts) * self.params.num_iterations > 1 or self._dropouts_on()
        if old is None and moves and _components(units) & {"policy", "reinforce", "own"}:
            old = self._each_token(units, lambda f: f.logprobs)
        reference = streams.get("reference")
        if reference is None and _needs_reference(units, self.params):
            with self._reference():
                reference = self._each_token(units, lambda f: f.logprobs)
        metrics = UpdateMetrics(kl_coef=self._counters.kl_coef, explained_variance=explained)
        for _ in range(self.params.num_iterations):
            for part in parts:
                step = self._optimizer_step(part, old, reference, streams.get("values"))
                metrics = replace(
                    step,
                    kl_coef=metrics.kl_coef,
                    explained_variance=explained,
                    optimizer_steps=metrics.optimizer_steps + 1,
                )
                done = replace(metrics, seconds=time.perf_counter() - started)
                progress({k: float(getattr(done, k)) for k in done.__dataclass_fields__})
        self._adapt(streams)
        self._counters = replace(self._counters, iteration=iteration + 1)
        return replace(
            metrics,
            trained_tokens=sum(s.tokens for u in units for s in u),
            nodes=sum(len(b.tree.tokens) for part in parts for b in micro_batches(part, self._counters.max_nodes)),
            max_nodes=self._counters.max_nodes,
            seconds=time.perf_counter() - started,
        )

    def _streams(self, groups: Sequence[Group], trajectories: Mapping[str, Trajectory]) -> dict[str, Streams]:
        """What the algorithm asks for, of every scored sample's tokens."""
        wanted = self.algorithm.streams
        if not wanted:
            return {}
        scored = {s.trajectory for g in groups for s in g.samples if s.reward is not None}
        missing = sorted(scored - set(trajectories))
        if missing:
            raise TrainError(f"The batch lacks the trajectory {missing[0]}, which was scored.")
        units = probes({t: trajectories[t] for t in scored})
        out: dict[str, Streams] = {}
        if wanted & {"policy", "values"}:
            both = self._each_token(units, lambda f: torch.stack([f.logprobs, self._values(f)]))
            out["policy"] = {t: x[0] for t, x in both.items()}
            out["values"] = {t: x[1] for t, x in both.items()}
        if "reference" in wanted:
            with self._reference():
                out["reference"] = self._each_token(units, lambda f: f.logprobs)
        return {name: values for name, values in out.items() if name in wanted}

    def _values(self, figures: TokenFigures) -> Tensor:
        return torch.zeros_like(figures.logprobs) if self._critic is None else self._critic(figures.hidden)

    @torch.no_grad()
    def _each_token(self, units: Sequence[Unit], figure: Callable[[TokenFigures], Tensor]) -> Streams:
        """A figure [..., M] of every token, without gradient, as [..., T] of whole trajectories."""

        def compute(max_nodes: int) -> tuple[list[MicroBatch], dict[int, Floats]]:
            batches = micro_batches(units, max_nodes)
            turns = self._ranks.turns(len(batches))
            figures = {i: figure(token_figures(self._base, batches[i])) for i, _ in turns}
            return batches, {i: x.cpu().numpy().astype(np.float64) for i, x in figures.items()}

        batches, mine = self._fitting(compute)
        every = {i: x for part in self._ranks.gather(mine) for i, x in part.items()}
        return scattered(batches, [every[i] for i in range(len(batches))])

    @contextlib.contextmanager
    def _reference(self) -> Iterator[None]:
        """The reference model in the policy's place."""
        if self._promoted is None:
            with self._model.disable_adapter():
                yield
            return
        own = adapter_tensors(self._model)
        set_adapter_tensors(self._model, self._promoted)
        try:
            yield
        finally:
            set_adapter_tensors(self._model, own)

    def _fitting(self, work: Callable[[int], T]) -> T:
        """Do this process's part of some work in micro-batches that fit.

        Where memory runs out, on any process, all of them halve the micro-batches, once in a job. Where the base
        weights are split, one process cannot leave a pass alone, so there it ends with the error of torch.

        Raises:
            TrainError: memory runs out again, or the work failed, on any process.
        """
        while True:
            result, failure = self._tried(work)
            failures = [f for f in self._ranks.gather(failure) if f is not None]
            if not failures:
                return result  # type: ignore[return-value]
            final = [f for f in failures if not isinstance(f, _OutOfMemory)]
            if final or self._counters.max_nodes < self.params.max_nodes or self.params.max_nodes == 1:
                raise (final or failures)[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._counters = replace(self._counters, max_nodes=self.params.max_nodes // 2)

    def _tried(self, work: Callable[[int], T]) -> tuple[T | None, TrainError | None]:
        nodes = self._counters.max_nodes
        try:
            return work(nodes), None
        except TrainError as error:
            return None, error
        except RuntimeError as error:
            if not _out_of_memory(error) or self._ranks.sharded:
                raise
        failure = _OutOfMemory(
            f"Memory ran out, also with micro-batches of {nodes} nodes.",
            next_step=f"Set max_nodes below {nodes}, or use a larger device.",
        )
        return None, failure

    def _optimizer_step(
        self, units: Sequence[Unit], old: Streams | None, reference: Streams | None, values: Streams | None
    ) -> UpdateMetrics:
        figures = self._gradients(units, old, reference, values)
        sums = figures.sums
        tokens = max(sums.tokens, 1.0)
        kl = sums.kl_behaviour / tokens
        if kl > self.params.max_kl:
            raise TrainError(
                f"The sampler's policy is {kl:.3g} nats (KL) from the trainer's, over the bound max_kl = "
                f"{self.params.max_kl:g}.",
                next_step=_SAME_POLICY,
                figures={"kl": kl},
            )
        norm = self._clipped_norm(figures.loss)
        rate = scheduled_rate(self.params, self._counters.optimizer_step)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._counters = replace(self._counters, optimizer_step=self._counters.optimizer_step + 1)
        return UpdateMetrics(
            loss=figures.loss,
            kl=kl,
            kl_reference=sums.kl_reference / tokens,
            clip_fraction=sums.clipped / tokens,
            entropy=figures.entropy / max(figures.tokens, 1),
            ess=effective_sample_size(sums),
            pair_accuracy=sums.pair_accuracy / max(sums.pairs, 1.0),
            grad_norm=norm,
            learning_rate=rate,
            trained_tokens=figures.tokens,
            max_nodes=self._counters.max_nodes,
        )

    def _clipped_norm(self, loss: float) -> float:
        """Clip the gradients, the critic's by themselves; the adapter's norm before."""
        if self._counters.iteration < self.params.critic_warmup and self._critic is not None:
            for p in self._trained:
                p.grad = None
        limit = self.params.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, limit, foreach=False))
        if self._critic is not None:
            norms = [norm, float(torch.nn.utils.clip_grad_norm_(self._critic.parameters(), limit, foreach=False))]
        else:
            norms = [norm]
        if not all(map(math.isfinite, norms)):
            raise TrainError(
                f"The gradient's norm is {max(norms)} at loss {loss:.4g}.",
                next_step="Lower learning_rate.",
                figures={"loss": loss},
            )
        return norm

    def _gradients(
        self, units: Sequence[Unit], old: Streams | None, reference: Streams | None, values: Streams | None
    ) -> _Figures:
        """The gradient of one optimiser step, summed over micro-batches and processes."""

        def compute(max_nodes: int) -> list[_Figures]:
            self._optimizer.zero_grad(set_to_none=True)
            batches = micro_batches(units, max_nodes)
            found: list[_Figures] = []
            failures: list[TrainError] = []
            for i, counts in self._ranks.turns(len(batches)):
                try:
                    figures = self._backward(i, batches[i], counts, old, reference, values)
                except TrainError as error:
                    failures.append(error)
                    if not self._ranks.sharded:
                        break
                    continue
                if counts:
                    found.append(figures)
            if failures:
                raise failures[0]
            return found

        mine = self._fitting(compute)
        if self._ranks.size > 1:
            parameters = [*self._trained, *(self._critic.parameters() if self._critic is not None else ())]
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._ranks.add([p.grad for p in parameters if p.grad is not None])
        every = [f for part in self._ranks.gather(mine) for f in part]
        return _Figures(
            math.fsum(f.loss for f in every),
            math.fsum(f.entropy for f in every),
            sum(f.tokens for f in every),
            add_sums(f.sums for f in every),
        )

    def _backward(
        self,
        index: int,
        batch: MicroBatch,
        counts: bool,
        old: Streams | None,
        reference: Streams | None,
        values: Streams | None,
    ) -> _Figures:
        """Add one micro-batch's gradient, or nothing where it does not count."""
        with self._training(len(batch.tree.tokens), index):
            figures = token_figures(self._base, batch, entropy_gradient=self.params.entropy_coef > 0)
            try:
                outputs = self._losses(figures, batch, old, reference, values)
                loss = torch.stack([o.loss for o in outputs]).sum()
            except TrainError:
                if self._ranks.sharded:  # the other processes wait in this pass
                    (0 * figures.logprobs.sum()).backward()  # type: ignore[no-untyped-call]
                raise
            (loss if counts else 0 * loss).backward()  # type: ignore[no-untyped-call]
        return _Figures(
            float(loss.detach()),
            float(figures.entropy.detach().sum(dtype=torch.float64)),
            len(batch.target),
            add_sums(o.sums for o in outputs),
        )

    def _losses(
        self,
        figures: TokenFigures,
        batch: MicroBatch,
        old: Streams | None,
        reference: Streams | None,
        values: Streams | None,
    ) -> list[LossOutputs]:
        """The losses of one micro-batch, with gradient."""
        then = figures.logprobs.detach() if old is None else self._tensor(gathered(old, batch))
        ref = None if reference is None else self._tensor(gathered(reference, batch))
        check_ratio(then, self._tensor(batch.behaviour), batch, self.params.max_ratio)
        outputs = []
        for code, component in enumerate(COMPONENTS):
            chosen = np.flatnonzero(batch.component == code)
            if not len(chosen):
                continue
            at = torch.from_numpy(chosen).to(self._device)
            inputs = LossInputs(
                logprobs=figures.logprobs[at],
                old=then[at],
                behaviour=self._tensor(batch.behaviour[chosen]),
                advantage=self._tensor(batch.advantage[chosen]),
                weight=self._tensor(batch.weight[chosen]),
                sequence=torch.from_numpy(batch.sequence[chosen]).to(self._device),
                sequences=int(batch.sequence[chosen].max()) + 1,
                reference=None if ref is None else ref[at],
                entropy=figures.entropy[at] if self.params.entropy_coef > 0 else None,
            )
            outputs.append(self._loss(component, inputs))
        if values is not None and self._critic is not None:
            known = np.flatnonzero(np.isfinite(batch.returns))
            before = self._tensor(gathered(values, batch)[known])
            now = self._critic(figures.hidden[torch.from_numpy(known).to(self._device)])
            returns, weight = self._tensor(batch.returns[known]), self._tensor(batch.value_weight[known])
            outputs.append(value_loss(now, before, returns, weight, self.params))
        return outputs

    def _loss(self, component: str, inputs: LossInputs) -> LossOutputs:
        match component:
            case "policy":
                return policy_loss(inputs, self.params)
            case "reinforce":
                return reinforce_loss(inputs, self.params)
            case "imitation":
                return imitation_loss(inputs)
            case "pair":
                return pair_loss(inputs, self.params)
        if not isinstance(self.algorithm, OwnLoss):
            raise TrainError(f"The algorithm {self.algorithm.name} gives credit for a loss of its own and has none.")
        per_token = self.algorithm.token_loss(inputs, self._given)
        if per_token.shape != inputs.weight.shape:
            raise TrainError(
                f"The loss of {self.algorithm.name} has the shape {tuple(per_token.shape)} for {len(inputs.weight)} "
                "tokens, not one for each.",
            )
        loss = (inputs.weight * per_token).sum()
        if not bool(torch.isfinite(loss)):
            raise TrainError(f"The loss of {self.algorithm.name} is {float(loss.detach())}.")
        return LossOutputs(loss, LossSums())

    @contextlib.contextmanager
    def _training(self, nodes: int, index: int) -> Iterator[None]:
        """Dropout of the adapter, and activations that are computed again where there are too many to keep."""
        # Checkpointing is active in training mode only. The parts of a layer stay out of it: routers add noise there.
        for module in self._recomputed:
            module.training = nodes * self._node_bytes > KEEP_BYTES
        for module in self._dropouts:
            module.train()
        try:
            if not self._dropouts_on():
                yield
                return
            devices = [self._device] if self._device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(hash((self._counters.seed, self._counters.optimizer_step, index)) % 2**63)
                yield
        finally:
            self._base.eval()

    def _dropouts_on(self) -> bool:
        return self.params.lora_dropout > 0

    def _adapt(self, streams: Mapping[str, Streams]) -> None:
        """Move ``kl_coef`` towards the wanted divergence (arXiv 1909.08593, section 2.2)."""
        if self.params.target_kl is None or "policy" not in streams or "reference" not in streams:
            return
        sums = [float((p - streams["reference"][t]).sum()) for t, p in streams["policy"].items()]
        if not sums:
            return
        error = min(max(math.fsum(sums) / len(sums) / self.params.target_kl - 1, -0.2), 0.2)
        coefficient = self._counters.kl_coef * (1 + error * len(sums) / self.params.horizon)
        self._counters = replace(self._counters, kl_coef=coefficient)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self._device, torch.float32)


def check_ratio(old: Tensor, behaviour: Tensor, batch: MicroBatch, bound: float) -> None:
    """Refuse tokens that the sampler can hardly have drawn from this policy.

    Raises:
        TrainError: a probability ratio of policy and sampler, or its inverse, is over ``bound``.
    """
    ratio = np.isin(batch.component, [COMPONENTS.index(c) for c in ("policy", "reinforce", "own")])
    drift = (old - behaviour).abs()[torch.from_numpy(ratio).to(old.device)]
    worst = math.exp(min(float(drift.max()), 700.0)) if drift.numel() else 1.0
    if worst > bound:
        raise TrainError(
            f"A token's probability differs between sampler and trainer by a factor of {worst:.3g}, over the bound "
            f"max_ratio = {bound:g}.",
            next_step=_SAME_POLICY,
            figures={"ratio": worst},
        )


@dataclass(frozen=True)
class _Figures:
    """Sums over micro-batches."""

    loss: float
    entropy: float
    tokens: int
    sums: LossSums


def _activation_bytes(base: torch.nn.Module) -> int:
    """What the backward pass of a token keeps, roughly: twice what goes into and out of the layers."""
    adapted = set(linear_layers(base))
    named = ((name.rpartition(".")[2], m) for name, m in base.named_modules())
    layers = [m for name, m in named if isinstance(m, torch.nn.Linear) and name in adapted]
    return 2 * sum((m.in_features + m.out_features) * m.weight.element_size() for m in layers)


def _with_streams(groups: Sequence[Group], streams: Mapping[str, Streams]) -> Sequence[Group]:
    """The groups with the streams in their samples' turns."""
    if not streams:
        return groups

    def filled(sample: Sample) -> Sample:
        own = {name: values[sample.trajectory] for name, values in streams.items() if sample.trajectory in values}
        turns: list[Turn] = []
        start = 0
        for turn in sample.turns:
            stop = start + len(turn.token_ids)
            turns.append(msgspec.structs.replace(turn, **{k: tuple(v[start:stop].tolist()) for k, v in own.items()}))
            start = stop
        return msgspec.structs.replace(sample, turns=tuple(turns))

    return [msgspec.structs.replace(g, samples=tuple(filled(s) for s in g.samples)) for g in groups]


def _explained(credit: Sequence[Credit], values: Streams | None) -> float:
    known = [c for c in credit if c.returns is not None and values is not None and c.trajectory in values]
    if values is None or not known:
        return 0.0
    return explained_variance([values[c.trajectory] for c in known], [np.asarray(c.returns) for c in known])


def _components(units: Sequence[Unit]) -> set[Component]:
    return {s.component for u in units for s in u}


def _needs_reference(units: Sequence[Unit], params: TrainParams) -> bool:
    components = _components(units)
    return "pair" in components or (params.beta > 0 and bool(components & {"policy", "reinforce"}))


class _OutOfMemory(TrainError):
    """Smaller micro-batches may help."""


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


_SAME_POLICY = "Check that the engine serves this job's current adapter."
