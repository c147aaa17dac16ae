"""LoRA adapters in PEFT's layout, merged into copies of the base weights.

A merged copy is computed from the kept base weights each time, so nothing drifts; switching between copies only swaps
references. Merged weights cost nothing per token, where PEFT's own forward pass adds two products to each layer, and
to a stack of experts the product of its factors.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bascule.runtime.engines.refusals import PUBLISH, other_content
from bascule.schemas.errors import EngineError, TrainError
from bascule.trainers.base_model import digest_of
from bascule.trainers.tensorfile import read_tensors

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication")
_OTHER_BASE = "Serve it with the base model that it was trained on."


@dataclass(frozen=True)
class Slot:
    """A weight that an adapter can change: of a linear layer, or of a stack of experts.

    Attributes:
        owner: the module that computes with it.
        name: of the parameter in its owner.
        experts: their number; 1 for a linear layer.
        outputs: width of what each computes.
        inputs: width of what it computes from.
        transposed: kept as [experts, inputs, outputs], not [experts, outputs, inputs].
    """

    owner: torch.nn.Module
    name: str
    experts: int
    outputs: int
    inputs: int
    transposed: bool = False

    def delta(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices, or stacks of them, whose product an adapter adds to the weight.

        Args:
            a: [experts * r, inputs].
            b: [outputs, r * experts]; PEFT has the experts' columns interleaved.
        """
        if getattr(self.owner, self.name).ndim == 2:
            return b, a
        lower = a.reshape(self.experts, -1, self.inputs)
        upper = b.reshape(self.outputs, -1, self.experts).permute(2, 0, 1)
        return (lower.transpose(1, 2), upper.transpose(1, 2)) if self.transposed else (upper, lower)


def slots(model: torch.nn.Module) -> dict[str, Slot]:
    """What adapters can change, by name: linear layers as modules, stacks of experts as parameters."""
    found: dict[str, Slot] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = Slot(module, "weight", 1, module.out_features, module.in_features)
            continue
        transposed = bool(getattr(module, "is_transposed", False))  # set by transformers on modules of experts
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                experts, first, second = parameter.shape
                outputs, inputs = (second, first) if transposed else (first, second)
                found[f"{name}.{own}"] = Slot(module, own, experts, outputs, inputs, transposed)
    return found


@dataclass(frozen=True)
class Adapter:
    """One adapter: for each slot its factors A [experts * r, in] and B [out, r * experts] and their product's scale."""

    name: str
    factors: dict[str, tuple[Tensor, Tensor, float]]


def read_adapter(name: str, folder: Path, model: Any) -> Adapter:
    """Read and check a PEFT LoRA folder.

    Raises:
        EngineError: a file is missing or damaged, the adapter is of a kind that cannot be merged, a tensor is
            unknown, of a wrong shape or not finite, or the adapter was trained on another base model; the message
            names it.
    """
    where = f"The adapter {name!r} in {folder}"
    weights = "adapter_model.safetensors"
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
        tensors, metadata = read_tensors((folder / weights).read_bytes(), weights)
        alpha = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, TrainError) as error:
        raise EngineError(f"{where} cannot be read: {error}.", next_step=PUBLISH) from error
    _check_kind(config, alpha, where)
    base, served = metadata.get("base"), digest_of(model)
    if base and served and base != served:
        raise EngineError(
            f"{where} was trained on the base model {base[:12]}, not on the one that is served, {served[:12]}.",
            next_step=_OTHER_BASE,
        )
    factors = _factors(tensors, config, slots(model), where)
    if not factors:
        raise EngineError(f"{where} holds no tensors.", next_step=PUBLISH)
    return Adapter(name, factors)


def _check_kind(config: dict[str, Any], alpha: float, where: str) -> None:
    refused = [key for key in _REFUSED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
        what = ", ".join(refused) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise EngineError(f"{where} is no plain LoRA: {what}.", next_step="Train it as plain LoRA.")
    if not math.isfinite(alpha):
        raise EngineError(f"{where} has lora_alpha = {alpha}.", next_step=PUBLISH)


def _factors(
    tensors: dict[str, Tensor], config: dict[str, Any], there: dict[str, Slot], where: str
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A file's tensors by the slots that they change, with their scales."""
    parameters = config.get("target_parameters") or ()
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise EngineError(f"{where} has the unknown tensor {key!r}.", next_step=PUBLISH)
        changed = _slot_name(match["module"], match["nested"].count("."), parameters, there)
        if changed is None:
            raise EngineError(
                f"{where} adapts {match['module']!r}, which is no linear layer or stack of experts of the base model.",
                next_step=_OTHER_BASE,
            )
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            raise EngineError(f"{where} has values in {key!r} that are not finite.", next_step=PUBLISH)
        found.setdefault(changed, {})[match["factor"]] = tensor
    # PEFT lets a pattern of names override the general alpha.
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    factors = {}
    for changed, pair in found.items():
        a, b = (pair.get(factor, torch.empty(0)) for factor in "AB")
        slot = there[changed]
        shapes = {factor: tuple(t.shape) for factor, t in pair.items()}
        rank = a.shape[0] // slot.experts if a.ndim else 0
        folded = rank * slot.experts
        if not rank or shapes != {"A": (folded, slot.inputs), "B": (slot.outputs, folded)}:
            size = f"{slot.outputs} x {slot.inputs}" + (f", {slot.experts} times" if slot.experts > 1 else "")
            raise EngineError(
                f"{where} has factors of shapes {shapes} for {changed!r}, which is {size}.", next_step=_OTHER_BASE
            )
        alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", changed)), config["lora_alpha"])
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[changed] = (a.float(), b.float(), scale)
    return factors


def _equal(one: Adapter, other: Adapter) -> bool:
    if one is other:
        return True
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(a, other_a) and torch.equal(b, other_b) and scale == other_scale
        for name, (a, b, scale) in one.factors.items()
        for other_a, other_b, other_scale in [other.factors[name]]
    )


def _slot_name(module: str, nested: int, parameters: Sequence[str], there: dict[str, Slot]) -> str | None:
    """The slot of a file's weights.

    PEFT wraps a module once for each of its target parameters, in their order there, so that the first one's weights
    stand under the most ``.base_layer``.
    """
    if module in there:
        return module if nested == 0 else None
    own = [
        name
        for name in there
        if name.rpartition(".")[0] == module and any(f".{name}".endswith(f".{target}") for target in parameters)
    ]
    return own[len(own) - 1 - nested] if nested < len(own) else None


class Adapters:
    """The adapters of one model, and the one whose weights are in place.

    Args:
        model: the base model; its weights are swapped, never changed.
        kept: number of merged copies held; each is as large as the weights that its adapter targets. The memory of one
            that is dropped is kept as well, for the next: fresh memory costs more time than the sum.
    """

    def __init__(self, model: Any, kept: int = 2) -> None:
        self._slots = slots(model)
        self._base: dict[str, torch.nn.Parameter] = {n: getattr(s.owner, s.name) for n, s in self._slots.items()}
        self._kept = max(1, kept)
        self._known: dict[str, Adapter] = {}
        self._merged: OrderedDict[str, dict[str, torch.nn.Parameter]] = OrderedDict()
        self._spare: dict[str, torch.nn.Parameter] = {}  # only where fewer than ``kept`` are held
        self._active: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def names(self) -> list[str]:
        return sorted(self._known)

    def add(self, adapter: Adapter) -> None:
        """Make an adapter known; the same one again changes nothing.

        Raises:
            EngineError: another adapter has the name.
        """
        if not _equal(self._known.setdefault(adapter.name, adapter), adapter):
            raise other_content(adapter.name)

    def remove(self, name: str) -> None:
        """Forget an adapter; harmless if it is not known. Not safe while the model computes."""
        if name == self._active:
            self.activate(None)
        self._known.pop(name, None)
        self._spare = self._merged.pop(name, self._spare)

    @torch.inference_mode()
    def activate(self, name: str | None) -> None:
        """Put the weights of an adapter, or of the base model, in place. Not safe while the model computes."""
        if name == self._active:
            return
        weights: dict[str, torch.nn.Parameter] = {}
        if name is not None:
            if name not in self._merged:
                self._place({})  # what is in place may be dropped
                self._active = None
                while len(self._merged) >= self._kept:
                    _, self._spare = self._merged.popitem(last=False)
                self._merged[name] = self._merge(self._known[name])
            self._merged.move_to_end(name)
            weights = self._merged[name]
        self._place(weights)
        self._active = name

    def _place(self, weights: dict[str, torch.nn.Parameter]) -> None:
        for name, slot in self._slots.items():
            setattr(slot.owner, slot.name, weights.get(name, self._base[name]))

    def _merge(self, adapter: Adapter) -> dict[str, torch.nn.Parameter]:
        spare, self._spare = self._spare, {}
        merged = {}
        for name, (a, b, scale) in adapter.factors.items():
            base = self._base[name]
            into = spare.pop(name, None)
            if into is None:
                into = torch.nn.Parameter(torch.empty_like(base), requires_grad=False)
            left, right = self._slots[name].delta(a.to(base.device), b.to(base.device))
            product = torch.addmm if base.ndim == 2 else torch.baddbmm
            if base.dtype == torch.float32:
                product(base, left, right, alpha=scale, out=into)
            else:  # the sum is taken in float32 and rounded once
                into.copy_(product(base.float(), left, right, alpha=scale))
            merged[name] = into
        return merged
