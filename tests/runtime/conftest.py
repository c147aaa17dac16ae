"""A small run in memory: the real services, harness processes and scoring process, an engine without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft

RUN = "small"
SMALL: dict[str, Any] = {
    "task": {"name": "arith"},
    "engine": {"name": "constant", "params": {"text": "7"}},
    # Where all answers are the same no edit is better: the first one is taken untried.
    "author": {"name": "operators", "params": {"episodes": 0}},
    "levers": ["harness"],
    "max_generations": 2,
    "evaluation": {"dev_examples": 20, "sealed_examples": 20, "train_groups": 4, "train_samples": 2},
}


@pytest.fixture
def make_view(tmp_path: Path) -> Callable[[MemoryLog], View]:
    def make(log: MemoryLog) -> View:
        return View(log, FileBlobs(tmp_path / "blobs"), plugins(), RUN, producer, home=tmp_path, fresh=True)

    return make


@pytest.fixture
async def started_log(make_view: Callable[[MemoryLog], View]) -> MemoryLog:
    log = MemoryLog()
    started = preflight(configure(SMALL, [], plugins()), plugins())
    await make_view(log).append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=started)])
    return log
