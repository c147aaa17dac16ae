"""LoRA adapters (arXiv 2106.09685) with PEFT: made, written as files that PEFT and vLLM read, and read without trust.

An adapter is two files, ``adapter_config.json`` and ``adapter_model.safetensors``, in PEFT's layout. The same weights
give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bascule.schemas.errors import TrainError
from bascule.trainers.base_model import IMPORTS
from bascule.trainers.tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FIXED: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
_FREE = {"r", "lora_alpha", "target_modules"}
_KEY = re.compile(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight")


def attach_lora(base: torch.nn.Module, r: int, lora_alpha: float, seed: int) -> PeftModel:
    """Freeze ``base`` and add a fresh adapter to all its linear layers but the output embedding.

    A is drawn from ``seed``, whatever the state of torch's generators; B is 0, so the model's outputs do not change.
    There is no dropout: it would make the trainer's log-probabilities differ from the sampler's.
    """
    with IMPORTS:
        from peft import LoraConfig, get_peft_model

    base.requires_grad_(False)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        target_modules=linear_layers(base),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return get_peft_model(base, config)


def linear_layers(base: torch.nn.Module) -> list[str]:
    """Sorted last names of the linear layers, as PEFT's ``target_modules`` has them; no embedding, no output head."""
    head = base.get_output_embeddings()  # type: ignore[operator]
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(names)


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under PEFT's file keys, float32 on the CPU, sorted by key."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {key: state[key].detach().to("cpu", torch.float32, copy=True) for key in sorted(state)}


def adapter_files(model: PeftModel) -> dict[str, bytes]:
    """The adapter as the two files of PEFT's layout, by name."""
    config: Any = model.peft_config["default"]
    text = json.dumps(
        {
            **_FIXED,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
        },
        indent=2,
        sort_keys=True,
    )
    return {
        CONFIG: text.encode() + b"\n",
        WEIGHTS: write_tensors(adapter_tensors(model), {"format": "pt"}),
    }


def adapter_hash(files: Mapping[str, bytes]) -> str:
    """Hexadecimal SHA-256 over the files' names, lengths and bytes."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def check_adapter(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Parse an adapter's files; nothing in them is executed.

    Returns:
        The configuration, and the weights by PEFT's keys.

    Raises:
        TrainError: there is another file (a pickle, say) or one too few, the configuration has unknown keys or asks
            for more than plain LoRA, or the weights have a bad header, unknown keys, or values that are not finite.
    """
    if set(files) != {CONFIG, WEIGHTS}:
        raise _bad(f"it has the files {', '.join(sorted(files)) or 'none'}, where {CONFIG} and {WEIGHTS} are due")
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or set(config) != set(_FIXED) | _FREE:
        odd = set(config) ^ (set(_FIXED) | _FREE) if isinstance(config, dict) else {"(no object)"}
        raise _bad(f"{CONFIG} has unknown or missing keys: {', '.join(sorted(odd))}")
    for key, value in _FIXED.items():
        if config[key] != value:
            raise _bad(f"{CONFIG} has {key} = {config[key]!r}, where only {value!r} is served")
    r, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not alpha > 0:
        raise _bad(f"{CONFIG} has r = {r!r} and lora_alpha = {alpha!r}")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise _bad(f"{CONFIG} has target_modules that are no list of names")
    tensors, _ = read_tensors(files[WEIGHTS], WEIGHTS)
    for key, tensor in tensors.items():
        if not _KEY.fullmatch(key) or key.split(".")[-3] not in targets:
            raise _bad(f"{WEIGHTS} holds {key!r}, which is no LoRA weight of a target module")
        if tensor.ndim != 2 or tensor.shape["lora_B" in key] != r:
            raise _bad(f"{WEIGHTS} holds {key!r} of shape {tuple(tensor.shape)} at rank {r}")
        if not bool(torch.isfinite(tensor).all()):
            raise _bad(f"{WEIGHTS} holds values in {key!r} that are not finite")
    return config, tensors


def load_adapter(model: PeftModel, files: Mapping[str, bytes]) -> None:
    """Replace the weights of the model's adapter.

    Raises:
        TrainError: the files are not usable (:func:`check_adapter`), or belong to another rank, scale or base model.
    """
    config, tensors = check_adapter(files)
    own: Any = model.peft_config["default"]
    if (config["r"], config["lora_alpha"]) != (own.r, own.lora_alpha):
        raise _bad(
            f"its r = {config['r']} and lora_alpha = {config['lora_alpha']} are not those of this job, "
            f"{own.r} and {own.lora_alpha}"
        )
    set_adapter_tensors(model, tensors)


def set_adapter_tensors(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the weights of the model's adapter by tensors under PEFT's file keys.

    Raises:
        TrainError: keys or shapes are not exactly those of the model.
    """
    from peft import set_peft_model_state_dict

    own = {key: tuple(value.shape) for key, value in adapter_tensors(model).items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if own != given:
        differing = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
        raise _bad(f"{len(differing)} of its weights do not fit this base model, the first being {differing[0]!r}")
    set_peft_model_state_dict(model, dict(tensors))


def _bad(reason: str) -> TrainError:
    return TrainError(f"The adapter is not usable: {reason}.", next_step="Publish the adapter again from its job.")
