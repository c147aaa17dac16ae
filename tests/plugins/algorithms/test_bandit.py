"""Every algorithm, on the trainer's own loop, raises the probability of the best answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bascule.plugins.algorithm import Algorithm
from bascule.plugins.algorithms.best_of_n import BestOfN, BestOfN1
from bascule.plugins.algorithms.dpo import Dpo
from bascule.plugins.algorithms.entropic import Entropic
from bascule.plugins.algorithms.grpo import Grpo, Grpo1
from bascule.plugins.algorithms.ppo import Ppo
from bascule.plugins.algorithms.reinforce import Reinforce
from tests.tiny_model import make_tiny_model
from tests.trainers.bandit import play_bandit

ALGORITHMS = (BestOfN(), BestOfN1(), Dpo(), Entropic(), Grpo(), Grpo1(), Ppo(), Reinforce())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_tiny_model(tmp_path_factory.mktemp("base"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.name}-{a.version}")
def test_the_best_answer_becomes_ten_times_as_likely(base: Path, algorithm: Algorithm) -> None:
    before, after = play_bandit(base, algorithm, updates=8)
    assert before < 0.05
    assert after > 10 * before
