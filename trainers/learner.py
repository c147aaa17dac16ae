"""What a job trains and how it computes: the base model with its adapter, the critic, the reference in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bascule.trainers.base_model import load_model, release
from bascule.trainers.critic import Critic
from bascule.trainers.distributed import Ranks
from bascule.trainers.forward import check_base
from bascule.trainers.fused import fuse
from bascule.trainers.lora import adapter_tensors, attach_lora, linear_layers, load_adapter, set_adapter_tensors
from bascule.trainers.params import TrainParams
from bascule.trainers.seeded import seeded

if TYPE_CHECKING:
    from peft import PeftModel

#: Trees whose activations take more bytes compute them again in the backward pass.
KEEP_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Learner:
    """A model that learns.

    Attributes:
        model: the base model with the adapter, in evaluation mode.
        critic: beside it, where the algorithm asks for values.
        promoted: the adapter's tensors that the reference model has; None if it has no adapter.
        dropout: whether the adapter has dropout in the passes with gradient.
        node_bytes: what the backward pass of a node keeps, roughly.
        recomputed: modules that can compute their activations again.
        dropouts: the adapter's.
    """

    model: PeftModel
    critic: Critic | None
    promoted: Mapping[str, Tensor] | None
    dropout: bool
    node_bytes: int
    recomputed: Sequence[torch.nn.Module]
    dropouts: Sequence[torch.nn.Module]

    @property
    def base(self) -> Any:
        """The base model, whose layers the adapter has entered."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return next(self.model.parameters()).device

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[torch.nn.Parameter]:
        """The critic's; none without one."""
        return [] if self.critic is None else list(self.critic.parameters())


def open_learner(
    base_folder: Path,
    params: TrainParams,
    seed: int,
    parent_adapter: Mapping[str, bytes] | None,
    processes: Ranks,
    *,
    with_critic: bool,
) -> Learner:
    """Load the base model and give it an adapter: the parent's, or a fresh one drawn from the seed.

    Raises:
        ConfigError: the base model is not usable, or lacks a target of the adapter.
        TrainError: the parent adapter is not usable.
    """
    base = load_model(base_folder)
    check_base(base)
    node_bytes = _activation_bytes(base)
    model = attach_lora(base, params, seed)
    fuse(model)
    if parent_adapter is not None:
        load_adapter(model, parent_adapter)
    model.eval()
    enable: Any = base.gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    critic = Critic(head.weight.shape[1], head.weight.device) if with_critic else None
    promoted = adapter_tensors(model) if params.kl_reference == "promoted" else None
    if processes.sharded:
        processes.shard(base)
        release(base)
    return Learner(
        model=model,
        critic=critic,
        promoted=promoted,
        dropout=params.lora_dropout > 0,
        node_bytes=node_bytes,
        recomputed=[m for m in base.modules() if getattr(m, "gradient_checkpointing", False)],
        dropouts=[m for name, m in model.named_modules() if "lora_dropout" in name],
    )


@contextlib.contextmanager
def reference_model(learner: Learner) -> Iterator[None]:
    """The reference model in the policy's place."""
    if learner.promoted is None:
        with learner.model.disable_adapter():
            yield
        return
    own = adapter_tensors(learner.model)
    set_adapter_tensors(learner.model, learner.promoted)
    try:
        yield
    finally:
        set_adapter_tensors(learner.model, own)


@contextlib.contextmanager
def training_mode(learner: Learner, nodes: int, seed: int) -> Iterator[None]:
    """Dropout of the adapter, and activations that are computed again where there are too many to keep.

    Args:
        learner: its other parts stay in evaluation mode.
        nodes: of the tree that is computed.
        seed: of the dropout; torch's own generators are left as they were.
    """
    # Checkpointing is active in training mode only. The parts of a layer stay out of it: routers add noise there.
    for module in learner.recomputed:
        module.training = nodes * learner.node_bytes > KEEP_BYTES
    for module in learner.dropouts:
        module.train()
    try:
        if not learner.dropout:
            yield
            return
        with seeded(seed):
            yield
    finally:
        learner.base.eval()


def _activation_bytes(base: torch.nn.Module) -> int:
    """What the backward pass of a node keeps, roughly: twice what goes into and out of the layers."""
    adapted = set(linear_layers(base))
    named = ((name.rpartition(".")[2], m) for name, m in base.named_modules())
    layers = [m for name, m in named if isinstance(m, torch.nn.Linear) and name in adapted]
    return 2 * sum((m.in_features + m.out_features) * m.weight.element_size() for m in layers)
