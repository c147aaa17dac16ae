"""What the trainer's own forward pass says of a fixed text under an adapter, to compare a served one with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bascule.schemas.events import AdapterProbe
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.trainers.base_model import load_model, load_tokenizer, release
from bascule.trainers.batch import micro_batches, probes, scattered
from bascule.trainers.forward import check_base, token_figures
from bascule.trainers.learner import Learner
from bascule.trainers.lora import attach_lora, load_adapter, with_adapter
from bascule.trainers.params import TrainParams
from bascule.trainers.passes import Passes, packed
from bascule.trainers.streams import policy_logprobs

#: What every adapter is probed with: prose, a chat's beginning, figures, code, so that any training moves some of it.
TEXT = (
    "A bascule is a balance with two arms: when one of them rises, the other falls.\n"
    "Question: What is 12 + 13? Think step by step.\nAnswer: 12 + 13 = 25. The answer is 25.\n"
    "def solve(x):\n    return x + 1\n"
)
_MOST_TOKENS = 96
_NAME = "probe"
_NODES = 1024  # of a tree that is computed at a time


@torch.inference_mode()
def _logprobs(base: torch.nn.Module, trajectories: Mapping[str, Trajectory]) -> list[float]:
    """Of the sampled tokens, trajectory by trajectory in the order of time."""
    batches = micro_batches(probes(trajectories), _NODES)
    values = [token_figures(base, batch).logprobs.double().cpu().numpy() for batch in batches]
    found = scattered(batches, values)
    return [float(x) for name in trajectories for x in found[name]]


@lru_cache(maxsize=8)
def probe_ids(base_folder: Path) -> tuple[int, ...]:
    """The probe's tokens for a base model, by its own tokenizer."""
    tokenizer: Any = load_tokenizer(base_folder)
    return tuple(tokenizer.encode(TEXT))[:_MOST_TOKENS]


def probe_learner(learner: Learner, passes: Passes, ids: Sequence[int], base: Sequence[float] | None) -> AdapterProbe:
    """What the model that learns says of the probe as it stands; all processes that train together take part.

    Args:
        base: the same of the base model, where it is known from an earlier probe.

    Raises:
        TrainError: memory ran out.
    """
    batches = packed(probes(_trajectories(ids)))
    own = policy_logprobs(batches, learner, passes)[_NAME]
    if base is None:
        with learner.model.disable_adapter():
            base = policy_logprobs(batches, learner, passes)[_NAME].tolist()
    return _probe(ids, own.tolist(), base, learner.base)


def probe_files(base_folder: Path, files: Mapping[str, bytes], ids: Sequence[int]) -> AdapterProbe:
    """What the base model with an adapter's files says of the probe.

    Raises:
        ConfigError: the base model is not usable.
        TrainError: the files are not.
    """
    base = load_model(base_folder)
    check_base(base)
    model = attach_lora(base, with_adapter(TrainParams(), files), 0)
    load_adapter(model, files)
    model.eval()
    try:
        own = _logprobs(base, _trajectories(ids))
        with model.disable_adapter():
            plain = _logprobs(base, _trajectories(ids))
    finally:
        release(base)
    return _probe(ids, own, plain, base)


def _trajectories(ids: Sequence[int]) -> dict[str, Trajectory]:
    """The probe as an episode whose prompt is its first token."""
    output = Output(token_ids=pack_ids(ids[1:]), logprobs=b"", text="")
    call = ModelCall(kind="completion", asked="", prompt_ids=pack_ids(ids[:1]), outputs=(output,), sampling=Sampling())
    return {_NAME: Trajectory(steps=(call,))}


def _probe(ids: Sequence[int], own: Sequence[float], base: Sequence[float], model: Any) -> AdapterProbe:
    return AdapterProbe(
        ids=pack_ids(ids),
        logprobs=pack_floats(own),
        base=pack_floats(base),
        dtype=str(model.dtype).removeprefix("torch."),
    )
