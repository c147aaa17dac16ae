"""Torch's generators are one per process, and threads share them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_turn = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers follow from ``seed`` in here, whatever other threads train, and go on as before after."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _turn, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
