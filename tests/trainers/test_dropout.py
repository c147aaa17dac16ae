"""Dropout of the adapter: drawn from the seed, and in the passes with gradient only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bascule.plugins.algorithm import Component, Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.loop import TrainJob
from tests.trainers.bandit import PARAMS, make_job, sample_batch, train


def dropped(base: Path, parent: dict[str, bytes], seed: int = 2, **params: Any) -> TrainJob:
    lax = {"max_kl": 1e9, "max_ratio": 1e9}
    return make_job(base, {**PARAMS, **lax, "lora_dropout": 0.2, "num_iterations": 2, **params}, seed, parent)


def imitated(batch: Mapping[str, Trajectory]) -> list[Credit]:
    return [Credit(trajectory=t, component="imitation", advantage=1.0) for t in batch]


def test_dropout_is_drawn_from_the_seed_and_resumes(base: Path, parent: dict[str, bytes]) -> None:
    still = dropped(base, parent)
    batches = [sample_batch(still, seed=i) for i in range(3)]

    def go(job: TrainJob, first: int, last: int, torch_seed: int) -> TrainJob:
        torch.manual_seed(torch_seed)  # what others draw does not matter
        for i in range(first, last):
            train(job, batches[i], imitated(batches[i]), i)
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


def test_seeds_that_hash_alike_draw_another_dropout(base: Path, parent: dict[str, bytes]) -> None:
    one, other = (dropped(base, parent, seed=seed) for seed in (0, 2**61 - 1))
    assert hash(0) == hash(2**61 - 1)
    batch = sample_batch(one, seed=0)
    for job in (one, other):
        train(job, batch, imitated(batch), 0)
    assert one.adapter_files() != other.adapter_files()


@pytest.mark.parametrize("component", ["policy", "reinforce", "own"])
def test_a_loss_with_a_ratio_takes_no_dropout(base: Path, parent: dict[str, bytes], component: Component) -> None:
    job = dropped(base, parent)
    batch = sample_batch(job, seed=0)
    first, *others = imitated(batch)
    credit = [msgspec.structs.replace(first, component=component), *others]
    with pytest.raises(TrainError, match=rf"lora_dropout is 0\.2.*{component}"):
        train(job, batch, credit, 0)
    assert job.adapter_files() == parent
