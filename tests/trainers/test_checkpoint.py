"""Checkpoints: a resumed training is the uninterrupted one, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.schemas.errors import TrainError
from bascule.trainers.base_model import model_digest
from bascule.trainers.loop import TrainJob
from bascule.trainers.tensorfile import read_tensors, write_tensors
from tests.trainers.bandit import PARAMS, alternating_credit, make_job, sample_batch, train


def go(job: TrainJob, first: int, last: int) -> None:
    for i in range(first, last):
        batch = sample_batch(job, seed=i)
        train(job, batch, alternating_credit(batch), i)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_resumed_training_gives_the_adapters_of_the_uninterrupted_one(base: Path, schedule: str) -> None:
    params = {**PARAMS, "lr_scheduler_type": schedule, "num_iterations": 2}
    job = make_job(base, params, seed=5)
    go(job, 0, 2)
    blob = job.checkpoint()
    go(job, 2, 4)
    resumed = make_job(base, params, seed=5)
    resumed.restore(blob)
    assert resumed.iteration == 2
    assert resumed.checkpoint() == blob
    go(resumed, 2, 4)
    assert resumed.adapter_files() == job.adapter_files()
    assert resumed.checkpoint() == job.checkpoint()


def test_a_checkpoint_before_the_first_update_restores_too(base: Path) -> None:
    job = make_job(base, PARAMS, seed=5)
    blob = job.checkpoint()
    go(job, 0, 1)
    moved = job.adapter_files()
    job.restore(blob)
    assert job.checkpoint() == blob
    go(job, 0, 1)
    assert job.adapter_files() == moved


def test_damaged_and_foreign_checkpoints_are_refused_and_change_nothing(base: Path) -> None:
    job = make_job(base, PARAMS, seed=5)
    go(job, 0, 1)
    blob = job.checkpoint()
    tensors, metadata = read_tensors(blob, "test")
    assert metadata["base"] == model_digest(base)
    moment = next(k for k in tensors if k.startswith("exp_avg/"))
    wide = make_job(base, {**PARAMS, "lora_r": 8}, seed=5)
    other = make_job(base, PARAMS, seed=6)
    for bad in (
        blob[:-1],
        b"\x80\x04N.",
        write_tensors(tensors, {**metadata, "format": "other"}),
        write_tensors(tensors, {"format": metadata["format"]}),
        write_tensors(tensors, {**metadata, "base": "0" * 64}),
        write_tensors({k: v for k, v in tensors.items() if k != moment}, metadata),
        write_tensors({**tensors, moment: tensors[moment][:1]}, metadata),
        wide.checkpoint(),
        other.checkpoint(),
    ):
        with pytest.raises(TrainError):
            job.restore(bad)
        assert job.checkpoint() == blob
