"""One tiny model and one adapter for most tests, on one thread: tiny models are faster so, also on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_tiny_model
from tests.trainers.bandit import PARAMS, alternating_credit, make_job, sample_batch, train


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def parent(base: Path) -> dict[str, bytes]:
    """An adapter whose two factors are both away from 0, so that all gradients are."""
    job = make_job(base, {**PARAMS, "learning_rate": 2e-2}, seed=2)
    for i in range(2):
        batch = sample_batch(job, seed=i)
        train(job, batch, alternating_credit(batch), i)
    return job.adapter_files()
