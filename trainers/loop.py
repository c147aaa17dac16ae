"""The one training loop: blind to the algorithm, deterministic, resumable between any two updates.

For equal inputs (base model, parameters, seed, trajectories, credits, thread count, library versions) it gives equal
bytes, in any process and from any checkpoint on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bascule.plugins.algorithm import Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.base_model import load_model
from bascule.trainers.batch import Floats, MicroBatch, batch_rows, denominators, micro_batches
from bascule.trainers.checkpoint import Counters, read_checkpoint, write_checkpoint
from bascule.trainers.forward import hidden_states, pieces, token_logprobs
from bascule.trainers.lora import adapter_files, attach_lora, check_adapter, load_adapter
from bascule.trainers.loss import (
    LossInputs,
    LossSums,
    PolicyParams,
    add_sums,
    effective_sample_size,
    imitation_loss,
    policy_loss,
)
from bascule.trainers.params import TrainParams, scheduled_rate, train_params

if TYPE_CHECKING:
    from peft import PeftModel


#: Larger trees compute activations again in the backward pass: kept, they are 3 MB a node at 135M parameters.
KEEP_NODES = 512


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update; of its last optimiser step where there are several.

    Attributes:
        loss: sum of the components' losses.
        kl: mean over policy tokens of the k3 estimate of KL(sampler || policy) before the update.
        kl_reference: mean k2 estimate of the divergence to the base model; 0 where ``beta`` is 0.
        clip_fraction: share of policy tokens whose gradient the clip cut.
        entropy: mean entropy in nats of the policy's next-token distribution at trained tokens.
        ess: effective sample size of the importance weights as a share of the policy tokens.
        grad_norm: before clipping.
        learning_rate: as scheduled.
        trained_tokens: tokens that entered the loss.
        nodes: tokens that were computed.
        optimizer_steps: taken in this update.
        seconds: wall time.
    """

    loss: float
    kl: float
    kl_reference: float
    clip_fraction: float
    entropy: float
    ess: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    nodes: int
    optimizer_steps: int
    seconds: float


class TrainJob:
    """One LoRA adapter on its way through K updates.

    Args:
        base_folder: the base model.
        params: the algorithm's parameters (:class:`TrainParams`).
        seed: of the adapter's first weights.
        parent_adapter: files of the adapter to continue from (its rank and scale win over ``params``), or None.

    Raises:
        ConfigError: a parameter or the base model is not usable.
        TrainError: the parent adapter is not usable.
    """

    def __init__(
        self, base_folder: Path, params: Mapping[str, Any], seed: int, parent_adapter: Mapping[str, bytes] | None = None
    ) -> None:
        self.params: TrainParams = train_params(params)
        r, alpha = self.params.lora_r, self.params.lora_alpha
        if parent_adapter is not None:
            config, _ = check_adapter(parent_adapter)
            r, alpha = config["r"], config["lora_alpha"]
        self._model: PeftModel = attach_lora(load_model(base_folder), r, alpha, seed)
        if parent_adapter is not None:
            load_adapter(self._model, parent_adapter)
        self._base: Any = self._model.get_base_model()
        self._device = next(self._model.parameters()).device
        self._model.eval()
        enable: Any = self._base.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        p = self.params
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=p.learning_rate,
            betas=(p.adam_beta1, p.adam_beta2),
            eps=p.adam_epsilon,
            weight_decay=p.weight_decay,
            foreach=False,
        )
        self._policy = PolicyParams(p.epsilon, p.epsilon_high, p.importance_cap, p.beta)
        self._counters = Counters(iteration=0, optimizer_step=0, seed=seed)

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
        return write_checkpoint(self._model, self._optimizer, self._counters)

    def restore(self, data: bytes) -> None:
        """Continue from a checkpoint.

        Raises:
            TrainError: the checkpoint is damaged or of another job.
        """
        self._counters = read_checkpoint(self._model, self._optimizer, data, self._counters.seed)

    def update(self, trajectories: Mapping[str, Trajectory], credit: Sequence[Credit], iteration: int) -> UpdateMetrics:
        """Train on one batch.

        Without credit nothing changes but the count of updates. A failed update leaves the job unusable: start a new
        one from the last checkpoint.

        Args:
            trajectories: by id; in any order, and more than are credited may be there.
            credit: what to train on.
            iteration: of this update, counted from 0; a guard against doing one twice.

        Raises:
            TrainError: the iteration is not the next one, the data are not usable, the sampler's policy is not the
                trainer's (``max_kl``, ``max_ratio``), or the loss or gradient is not finite.
        """
        started = time.perf_counter()
        if iteration != self._counters.iteration:
            raise TrainError(f"Update {iteration} was asked for, but the next one is {self._counters.iteration}.")
        rows = batch_rows(credit, trajectories)
        batches = micro_batches(rows, self.params.max_nodes)
        steps = self.params.num_iterations if batches else 0
        old = [token_logprobs(self._base, b) for b in batches] if steps > 1 else None
        reference = None
        if self.params.beta > 0:
            with self._model.disable_adapter():
                reference = [token_logprobs(self._base, b) for b in batches]
        steps_done = [self._optimizer_step(batches, denominators(rows), old, reference) for _ in range(steps)]
        self._counters = replace(self._counters, iteration=iteration + 1)
        last = steps_done[-1] if steps_done else _NOTHING
        return UpdateMetrics(
            loss=last.loss,
            kl=steps_done[0].kl if steps_done else 0.0,
            kl_reference=last.kl_reference,
            clip_fraction=last.clip_fraction,
            entropy=last.entropy,
            ess=last.ess,
            grad_norm=last.grad_norm,
            learning_rate=last.learning_rate,
            trained_tokens=sum(len(r.trained) for r in rows),
            nodes=sum(len(b.tree.tokens) for b in batches),
            optimizer_steps=steps,
            seconds=time.perf_counter() - started,
        )

    def _optimizer_step(
        self,
        batches: Sequence[MicroBatch],
        totals: tuple[float, float],
        old: Sequence[Tensor] | None,
        reference: Sequence[Tensor] | None,
    ) -> _StepFigures:
        self._optimizer.zero_grad(set_to_none=True)
        loss = entropy = 0.0
        sums: list[LossSums] = []
        for i, batch in enumerate(batches):
            part = self._backward(batch, totals, old[i] if old else None, reference[i] if reference else None)
            loss += part[0]
            entropy += part[1]
            sums.append(part[2])
        policy = add_sums(sums)
        tokens = max(policy.tokens, 1.0)
        kl = policy.kl_behaviour / tokens
        if kl > self.params.max_kl:
            raise TrainError(
                f"The sampler's policy is {kl:.3g} nats (KL) from the trainer's, over the bound max_kl = "
                f"{self.params.max_kl:g}.",
                next_step=_SAME_POLICY,
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.params.max_grad_norm, foreach=False))
        if not math.isfinite(norm):
            raise TrainError(f"The gradient's norm is {norm} at loss {loss:.4g}.", next_step="Lower learning_rate.")
        rate = scheduled_rate(self.params, self._counters.optimizer_step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._counters = replace(self._counters, optimizer_step=self._counters.optimizer_step + 1)
        return _StepFigures(
            loss=loss,
            kl=kl,
            kl_reference=policy.kl_reference / tokens,
            clip_fraction=policy.clipped / tokens,
            entropy=entropy / max(sum(len(b.target) for b in batches), 1),
            ess=effective_sample_size(policy),
            grad_norm=norm,
            learning_rate=rate,
        )

    def _backward(
        self, batch: MicroBatch, totals: tuple[float, float], old: Tensor | None, reference: Tensor | None
    ) -> tuple[float, float, LossSums]:
        """Add one micro-batch's gradient; returns its loss, its summed entropy and its policy tokens' sums.

        The head's backward pass runs piece by piece into the gradient of the hidden states, so that the logits of one
        piece only are alive at a time.
        """
        # Checkpointing is active in training mode only; every dropout is 0.
        self._base.train(len(batch.tree.tokens) > KEEP_NODES)
        hidden = hidden_states(self._base, batch)
        leaf = hidden.detach().requires_grad_()
        loss = entropy = 0.0
        sums: list[LossSums] = []
        for piece in pieces(self._base, batch, leaf):
            where = piece.tokens
            inputs = LossInputs(
                logprobs=piece.logprobs,
                old=piece.logprobs.detach() if old is None else old[where],
                behaviour=self._tensor(batch.behaviour[where]),
                advantage=self._tensor(batch.advantage[where]),
                mask=torch.from_numpy(batch.policy[where]).to(self._device),
                reference=None if reference is None else reference[where],
            )
            check_ratio(inputs, self.params.max_ratio)
            policy = policy_loss(inputs, self._policy, totals[0])
            imitation = imitation_loss(replace(inputs, mask=~inputs.mask), totals[1])
            share = policy.loss + imitation.loss
            share.backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
            entropy += piece.entropy
            sums.append(policy.sums)
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        self._base.eval()
        return loss, entropy, add_sums(sums)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self._device, torch.float32)


def check_ratio(inputs: LossInputs, bound: float) -> None:
    """Refuse tokens that the sampler can hardly have drawn from this policy.

    Raises:
        TrainError: a probability ratio of policy and sampler, or its inverse, is over ``bound``.
    """
    drift = torch.where(inputs.mask, inputs.old - inputs.behaviour, 0.0).abs()
    worst = math.exp(min(float(drift.max()), 700.0)) if drift.numel() else 1.0
    if worst > bound:
        raise TrainError(
            f"A token's probability differs between sampler and trainer by a factor of {worst:.3g}, over the bound "
            f"max_ratio = {bound:g}.",
            next_step=_SAME_POLICY,
        )


@dataclass(frozen=True)
class _StepFigures:
    loss: float = 0.0
    kl: float = 0.0
    kl_reference: float = 0.0
    clip_fraction: float = 0.0
    entropy: float = 0.0
    ess: float = 1.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0


_NOTHING = _StepFigures()
_SAME_POLICY = "Check that the engine serves this job's current adapter."
