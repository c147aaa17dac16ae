"""LoRA adapters in PEFT's layout, merged into copies of the base weights.

A merged copy is computed from the kept base weights each time, so nothing drifts; switching between copies only swaps
references. Merged linear layers cost nothing per token, where PEFT's own forward pass adds two products to each.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bascule.schemas.errors import EngineError

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class Adapter:
    """One adapter: for each module its factors A [r, in] and B [out, r] and the scale of their product."""

    name: str
    digest: str
    factors: dict[str, tuple[Tensor, Tensor, float]]


def read_adapter(name: str, folder: Path, model: Any) -> Adapter:
    """Read and check a PEFT LoRA folder.

    Raises:
        EngineError: a file is missing or damaged, the adapter is of a kind that cannot be merged, or a tensor is
            unknown or of a wrong shape; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    again = "Publish the adapter again in PEFT's layout (adapter_config.json, adapter_model.safetensors)."
    try:
        raw_config = (folder / "adapter_config.json").read_bytes()
        raw = (folder / "adapter_model.safetensors").read_bytes()
        config: dict[str, Any] = json.loads(raw_config)
        tensors = load(raw)
        alpha = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EngineError(f"The adapter {name!r} in {folder} cannot be read: {error}.", next_step=again) from error
    refused = [key for key in _REFUSED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
        what = ", ".join(refused) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise EngineError(
            f"The adapter {name!r} in {folder} is no plain LoRA: {what}.", next_step="Train it as plain LoRA."
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise EngineError(f"The adapter {name!r} in {folder} has the unknown tensor {key!r}.", next_step=again)
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    factors = {}
    for module, pair in found.items():
        if module not in linear:
            raise EngineError(
                f"The adapter {name!r} in {folder} adapts {module!r}, which is no linear layer of the base model.",
                next_step="Serve it with the base model that it was trained on.",
            )
        a, b, layer = pair.get("A"), pair.get("B"), linear[module]
        shapes = {factor: tuple(t.shape) for factor, t in pair.items()}
        if (
            a is None
            or b is None
            or a.ndim != 2
            or shapes
            != {
                "A": (a.shape[0], layer.in_features),
                "B": (layer.out_features, a.shape[0]),
            }
        ):
            raise EngineError(
                f"The adapter {name!r} in {folder} has factors of shapes {shapes} for {module!r}, which is "
                f"{layer.out_features} x {layer.in_features}.",
                next_step="Serve it with the base model that it was trained on.",
            )
        # PEFT lets a pattern of module names override the general alpha.
        patterns: dict[str, float] = config.get("alpha_pattern") or {}
        own = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), alpha)
        scale = own / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
        factors[module] = (a.float(), b.float(), scale)
    if not factors:
        raise EngineError(f"The adapter {name!r} in {folder} holds no tensors.", next_step=again)
    return Adapter(name, hashlib.sha256(raw_config + b"\0" + raw).hexdigest(), factors)


class Adapters:
    """The adapters of one model, and the one whose weights are in place.

    Args:
        model: the base model; its linear layers' weights are swapped, never changed.
        kept: number of merged copies held; each is as large as the layers that its adapter targets.
    """

    def __init__(self, model: Any, kept: int = 2) -> None:
        self._modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self._base = {name: module.weight for name, module in self._modules.items()}
        self._kept = max(1, kept)
        self._known: dict[str, Adapter] = {}
        self._merged: OrderedDict[str, dict[str, torch.nn.Parameter]] = OrderedDict()
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
        held = self._known.setdefault(adapter.name, adapter)
        if held.digest != adapter.digest:
            raise EngineError(
                f"An adapter with other content is already loaded as {adapter.name!r} "
                f"({held.digest[:12]}, now {adapter.digest[:12]}).",
                next_step="Give every version of an adapter a name of its own.",
            )

    def remove(self, name: str) -> None:
        """Forget an adapter; harmless if it is not known. Not safe while the model computes."""
        if name == self._active:
            self.activate(None)
        self._known.pop(name, None)
        self._merged.pop(name, None)

    @torch.inference_mode()
    def activate(self, name: str | None) -> None:
        """Put the weights of an adapter, or of the base model, in place. Not safe while the model computes."""
        if name == self._active:
            return
        weights: dict[str, torch.nn.Parameter] = {}
        if name is not None:
            if name not in self._merged:
                while len(self._merged) >= self._kept:
                    dropped, _ = self._merged.popitem(last=False)
                    if dropped == self._active:  # it is still in place, and would be held until the swap below
                        self._place({})
                        self._active = None
                self._merged[name] = self._merge(self._known[name])
            self._merged.move_to_end(name)
            weights = self._merged[name]
        self._place(weights)
        self._active = name

    def _place(self, weights: dict[str, torch.nn.Parameter]) -> None:
        for module, layer in self._modules.items():
            layer.weight = weights.get(module, self._base[module])

    def _merge(self, adapter: Adapter) -> dict[str, torch.nn.Parameter]:
        merged = {}
        for module, (a, b, scale) in adapter.factors.items():
            base = self._base[module]
            # The sum is taken in float32 and rounded once, also where the base is bfloat16.
            weight = torch.addmm(base.float(), b.to(base.device), a.to(base.device), alpha=scale).to(base.dtype)
            merged[module] = torch.nn.Parameter(weight, requires_grad=False)
        return merged
