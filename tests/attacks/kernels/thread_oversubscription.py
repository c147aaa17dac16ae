"""Takes more threads and cores than its own, and keeps the core busy while the reference is timed."""

import os
import threading

import torch

torch.set_num_threads(8)
try:
    os.sched_setaffinity(0, range(os.cpu_count()))
    FREE = len(os.sched_getaffinity(0)) > 1
except OSError:
    FREE = False
WORKING = threading.Event()


def spin():
    while True:
        if not WORKING.is_set():
            torch.ones(64, 64) @ torch.ones(64, 64)


for _ in range(2):
    threading.Thread(target=spin, daemon=True).start()


def custom_kernel(data):
    WORKING.set()
    try:
        return honest(data)  # noqa: F821 - the reference, in front of this
    finally:
        WORKING.clear()
