"""LoRA adapters (arXiv 2106.09685) with PEFT: made, written as files that PEFT and vLLM read, and read without trust.

An adapter is two files, ``adapter_config.json`` and ``adapter_model.safetensors``, in PEFT's layout. The same weights
give the same bytes. The second file's metadata names the base model by its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from bascule.schemas.errors import ConfigError, TrainError
from bascule.trainers.base_model import IMPORTS, digest_of
from bascule.trainers.params import TrainParams
from bascule.trainers.seeded import seeded
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
_FREE = {"r", "lora_alpha", "target_modules", "target_parameters"}
_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.]+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")


def attach_lora(base: torch.nn.Module, params: TrainParams, seed: int) -> PeftModel:
    """Freeze ``base`` and add a fresh adapter of the rank, scale, dropout and targets that ``params`` name.

    A is drawn from ``seed``, whatever the state of torch's generators; B is 0, so the model's outputs do not change.
    Dropout acts in training mode only. For a parameter that is a stack of experts, each expert has factors of the rank;
    PEFT folds them into one A [experts * r, in] and one B [out, r * experts].

    Raises:
        ConfigError: a target is unknown or cannot be served, there is none, or dropout is asked for experts.
    """
    with IMPORTS:
        from peft import LoraConfig, get_peft_model

    modules, parameters = targets(base, params)
    base.requires_grad_(False)
    config = LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,  # type: ignore[arg-type]
        target_modules=modules,
        target_parameters=parameters or None,
        lora_dropout=params.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with seeded(seed):
        model = get_peft_model(base, config)
    if sorted(config.target_modules or ()) != modules:
        # For some mixture-of-experts models PEFT reads the names of an earlier layout into targets, at another rank.
        raise ConfigError(
            f"PEFT adapts other parts of this base model than lora_target_modules names: {', '.join(modules)}.",
            next_step="Name the attention's layers there, and the experts in lora_target_parameters.",
        )
    return model


def targets(base: torch.nn.Module, params: TrainParams) -> tuple[list[str], list[str]]:
    """The modules and parameters that ``params`` has adapted, sorted, under the names that PEFT knows them by.

    Raises:
        ConfigError: as :func:`attach_lora`.
    """
    linear, experts = linear_layers(base), expert_parameters(base)
    modules = linear if params.lora_target_modules is None else sorted(set(params.lora_target_modules))
    parameters = sorted(set(params.lora_target_parameters))
    embeddings = set(modules) & embedding_layers(base)
    if embeddings:
        raise ConfigError(
            f"lora_target_modules names {', '.join(sorted(embeddings))}: adapters of input or output embeddings "
            "cannot be served.",
            next_step=f"Name layers among {', '.join(linear)}.",
        )
    _known("lora_target_modules", modules, linear)
    _known("lora_target_parameters", parameters, experts)
    if not modules and not parameters:
        raise ConfigError(
            "lora_target_modules and lora_target_parameters name nothing to train.",
            next_step=f"Name layers among {', '.join(linear)}, or leave lora_target_modules out for all of them.",
        )
    if parameters and params.lora_dropout:
        raise ConfigError(
            f"lora_dropout is {params.lora_dropout:g}, but PEFT has none for lora_target_parameters.",
            next_step="Set lora_dropout to 0.",
        )
    return modules, parameters


def _known(setting: str, names: Iterable[str], there: list[str]) -> None:
    unknown = sorted(set(names) - set(there))
    if unknown:
        raise ConfigError(
            f"{setting} names {', '.join(unknown)}, which the base model does not have.",
            next_step=f"It has {', '.join(there) or 'none of this kind'}.",
        )


def linear_layers(base: torch.nn.Module) -> list[str]:
    """Sorted last names of the linear layers, as PEFT's ``target_modules`` has them; no embedding, no output head."""
    head = base.get_output_embeddings()  # type: ignore[operator]
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(names)


def embedding_layers(base: torch.nn.Module) -> set[str]:
    """Last names of the input and output embeddings."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())  # type: ignore[operator]
    return {n.rsplit(".", 1)[-1] for n, module in base.named_modules() if any(module is layer for layer in layers)}


def expert_parameters(base: torch.nn.Module) -> list[str]:
    """Sorted names, within a layer, of the stacks of experts' weights, as PEFT's ``target_parameters`` has them."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name, p in base.named_parameters() if p.ndim == 3})


def with_adapter(params: TrainParams, files: Mapping[str, bytes]) -> TrainParams:
    """``params`` with rank, scale and targets of the adapter that a job continues from.

    Raises:
        TrainError: the files are not usable (:func:`check_adapter`).
    """
    config, _ = check_adapter(files)
    return msgspec.structs.replace(
        params,
        lora_r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_target_modules=tuple(config["target_modules"]),
        lora_target_parameters=tuple(config["target_parameters"] or ()),
    )


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under PEFT's file keys, float32 on the CPU, sorted by key."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {key: state[key].detach().to("cpu", torch.float32, copy=True) for key in sorted(state)}


def adapter_files(model: PeftModel) -> dict[str, bytes]:
    """The adapter as the two files of PEFT's layout, by name.

    A base model from :func:`bascule.trainers.base_model.load_model` is named by its digest in the weights' metadata.
    """
    config: Any = model.peft_config["default"]
    text = json.dumps({**_FIXED, **_free(config)}, indent=2, sort_keys=True)
    digest = digest_of(model.get_base_model())
    return {
        CONFIG: text.encode() + b"\n",
        WEIGHTS: write_tensors(adapter_tensors(model), {"format": "pt", **({"base": digest} if digest else {})}),
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
    config, tensors, _ = _parsed(files)
    return config, tensors


def load_adapter(model: PeftModel, files: Mapping[str, bytes]) -> None:
    """Replace the weights of the model's adapter.

    Raises:
        TrainError: the files are not usable (:func:`check_adapter`), or belong to another rank, scale, target or base
            model.
    """
    config, tensors, base = _parsed(files)
    for key, value in _free(model.peft_config["default"]).items():
        if config[key] != value:
            raise _bad(f"its {key} = {config[key]!r} is not this job's, {value!r}")
    digest = digest_of(model.get_base_model())
    if base and digest and base != digest:
        raise _bad(
            f"it was trained on the base model {base[:12]}, not on this one, {digest[:12]}",
            next_step="Use the base model that it was trained on; its digest covers weights, configuration, tokenizer.",
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


def _parsed(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Configuration, weights, and the digest of the base model where it is recorded, else ''."""
    if set(files) != {CONFIG, WEIGHTS}:
        raise _bad(f"it has the files {', '.join(sorted(files)) or 'none'}, where {CONFIG} and {WEIGHTS} are due")
    config = _config(files[CONFIG])
    tensors, metadata = read_tensors(files[WEIGHTS], WEIGHTS)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or not _targeted(match["module"], match["nested"].count("."), config):
            raise _bad(f"{WEIGHTS} holds {key!r}, which is no LoRA weight of a target")
        rank = tensor.shape[match["factor"] == "B"] if tensor.ndim == 2 else 0
        # A stack of experts has the factors of all of them side by side.
        plain = match["module"].rsplit(".", 1)[-1] in config["target_modules"]
        if rank != config["r"] if plain else rank == 0 or rank % config["r"]:
            raise _bad(f"{WEIGHTS} holds {key!r} of shape {tuple(tensor.shape)} at rank {config['r']}")
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            raise _bad(f"{WEIGHTS} holds values in {key!r} that are not finite")
    return config, tensors, metadata.get("base", "")


def _free(config: Any) -> dict[str, Any]:
    """What differs between adapters, of PEFT's configuration."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules or ()),
        "target_parameters": sorted(config.target_parameters or ()) or None,
    }


def _config(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise _bad(f"{CONFIG} is no JSON object")
    config.setdefault("target_parameters", None)  # adapters of earlier versions do not have it
    if set(config) != set(_FIXED) | _FREE:
        odd = set(config) ^ (set(_FIXED) | _FREE)
        raise _bad(f"{CONFIG} has unknown or missing keys: {', '.join(sorted(odd))}")
    for key, value in _FIXED.items():
        if config[key] != value:
            raise _bad(f"{CONFIG} has {key} = {config[key]!r}, where only {value!r} is served")
    r, alpha = config["r"], config["lora_alpha"]
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise _bad(f"{CONFIG} has r = {r!r} and lora_alpha = {alpha!r}")
    modules, parameters = config["target_modules"], config["target_parameters"] or []
    for names in (modules, parameters):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _bad(f"{CONFIG} has targets that are no list of names")
    if not modules and not parameters:
        raise _bad(f"{CONFIG} has no targets")
    return config


def _targeted(module: str, nested: int, config: Mapping[str, Any]) -> bool:
    """Whether weights belong to a target; PEFT nests one wrapper for each target parameter of the same module."""
    if module.rsplit(".", 1)[-1] in config["target_modules"]:
        return nested == 0
    owners = [name.rpartition(".")[0] for name in config["target_parameters"] or ()]
    return nested < sum(f".{module}".endswith(f".{owner}") for owner in owners)


def _bad(reason: str, next_step: str = "Publish the adapter again from its job.") -> TrainError:
    return TrainError(f"The adapter is not usable: {reason}.", next_step=next_step)
