"""What engines are held against: a model's own log-probabilities under each adapter; two versions of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bascule.trainers.base_model import load_model
from bascule.trainers.lora import adapter_files, attach_lora
from bascule.trainers.params import TrainParams

Oracle = Callable[[Sequence[int], Sequence[int], float, str | None], list[float]]
#: How large the weights of the two versions are beside one another: a training step apart.
VERSIONS = {"v1": 1.0, "v2": 1.1}


def oracle_of(base: Path, adapters: Mapping[str, Path]) -> Oracle:
    """The log-probabilities of ``ids`` after ``prompt``, by transformers and PEFT, in double precision."""
    from peft import PeftModel

    @cache
    def model(adapter: str | None) -> Any:
        plain = load_model(base)
        return plain if adapter is None else PeftModel.from_pretrained(plain, adapters[adapter]).eval()

    @torch.inference_mode()
    def oracle(prompt: Sequence[int], ids: Sequence[int], temperature: float, adapter: str | None) -> list[float]:
        logits = model(adapter)(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        found: torch.Tensor = (logits.double() / temperature).log_softmax(-1)
        return [float(row[i]) for row, i in zip(found, ids, strict=True)]

    return oracle


def version_files(base: Path, scale: float) -> dict[str, bytes]:
    """An adapter's files; those of two scales are versions of one adapter."""
    model = attach_lora(load_model(base), TrainParams(lora_r=4, lora_alpha=8.0), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator).mul_(scale if "lora_B" in name else 1.0)
    return adapter_files(model)


def write_versions(base: Path, folder: Path) -> dict[str, Path]:
    """Both versions, each in a folder of its name."""
    found = {}
    for name, scale in VERSIONS.items():
        found[name] = folder / name
        found[name].mkdir()
        for file, data in version_files(base, scale).items():
            (found[name] / file).write_bytes(data)
    return found
