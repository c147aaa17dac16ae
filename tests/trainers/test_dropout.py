"""Dropout of the adapter: drawn from the seed, and in the passes with gradient only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.trainers.loop import TrainJob
from tests.trainers.bandit import PARAMS, alternating_credit, make_job, sample_batch, train


def dropped(base: Path, parent: dict[str, bytes], seed: int = 2, **params: Any) -> TrainJob:
    lax = {"max_kl": 1e9, "max_ratio": 1e9}
    return make_job(base, {**PARAMS, **lax, "lora_dropout": 0.2, "num_iterations": 2, **params}, seed, parent)


def test_dropout_is_drawn_from_the_seed_and_resumes(base: Path, parent: dict[str, bytes]) -> None:
    still = dropped(base, parent)
    batches = [sample_batch(still, seed=i) for i in range(3)]

    def go(job: TrainJob, first: int, last: int, torch_seed: int) -> TrainJob:
        torch.manual_seed(torch_seed)  # what others draw does not matter
        for i in range(first, last):
            train(job, batches[i], alternating_credit(batches[i]), i)
        return job

    one = go(dropped(base, parent), 0, 2, torch_seed=1)
    blob = one.checkpoint()
    go(one, 2, 3, torch_seed=2)
    assert go(dropped(base, parent), 0, 3, torch_seed=3).checkpoint() == one.checkpoint()
    resumed = dropped(base, parent)
    resumed.restore(blob)
    assert go(resumed, 2, 3, torch_seed=4).checkpoint() == one.checkpoint()
    for other in (dropped(base, parent, lora_dropout=0.0), dropped(base, parent, seed=3)):
        assert go(other, 0, 3, torch_seed=1).adapter_files() != one.adapter_files()


def test_the_ratio_with_dropout_is_to_the_policy_without_it(base: Path, parent: dict[str, bytes]) -> None:
    """The sampler has no dropout, so the figures that compare it with the trainer stay those of an equal policy."""
    job = dropped(base, parent, num_iterations=1, max_grad_norm=1e9)
    batch = sample_batch(job, seed=0)
    credit = [c for c in alternating_credit(batch) if c.component == "policy"]
    metrics = train(job, batch, credit, 0)
    assert metrics.kl == pytest.approx(0, abs=1e-6)
    assert metrics.ess == pytest.approx(1, abs=1e-4)
    assert metrics.clip_fraction > 0.1  # of tokens whose own probability dropout has moved by more than the bound
