"""Two updates of some cases, as one of the processes that a launcher starts; run by ``test_distributed.py``.

The folder holds ``batch.json`` (trajectories) and ``cases.json``. Each process writes what it ends with into a file for
each case, named by the number of processes and its rank: the state, the figures and how many base weights it holds, or
the words with which training was refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

from bascule.plugins.algorithms.best_of_n import BestOfN
from bascule.plugins.algorithms.dpo import Dpo
from bascule.plugins.algorithms.grpo import Grpo
from bascule.plugins.algorithms.ppo import Ppo
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers import learner
from bascule.trainers.distributed import ranks
from bascule.trainers.loop import TrainJob
from tests.trainers.bandit import grouped
from tests.trainers.gradients import limit_nodes

ALGORITHMS: dict[str, type[Any]] = {"ppo": Ppo, "grpo": Grpo, "dpo": Dpo, "best_of_n": BestOfN}


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained.

    Attributes:
        base: folder of the base model.
        algorithm: among :data:`ALGORITHMS`.
        params: over the algorithm's defaults.
        rewards: of each trajectory.
        parent: folder of the adapter to continue from.
        nodes: the process of rank 1 has memory for trees of so many.
        recompute: activations are computed again in the backward pass.
        dies: the process of rank 1 ends before the second update.
    """

    base: str
    algorithm: str
    params: dict[str, Any]
    rewards: dict[str, float | None]
    parent: str | None = None
    nodes: int | None = None
    recompute: bool = False
    dies: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a process ends with."""

    state: bytes = b""
    metrics: list[dict[str, float]] = []
    weights: int = 0
    refused: str = ""


def run_case(case: Case, batch: dict[str, Trajectory]) -> Outcome:
    """Two updates on the same batch."""
    algorithm = ALGORITHMS[case.algorithm]()
    parent = None if case.parent is None else {p.name: p.read_bytes() for p in Path(case.parent).iterdir()}
    job = TrainJob(Path(case.base), algorithm, {**algorithm.defaults(), **case.params}, 1, parent)

    if ranks().rank == 1 and case.nodes is not None:
        limit_nodes(job, case.nodes, torch.OutOfMemoryError)
    keep = learner.KEEP_BYTES
    learner.KEEP_BYTES = 0 if case.recompute else keep
    metrics = []
    try:
        for i in range(2):
            if case.dies and i == 1 and ranks().rank == 1:
                raise SystemExit(3)
            metrics.append(job.update(grouped(batch, case.rewards), batch, i).figures())
    except TrainError as error:
        return Outcome(refused=str(error))
    finally:
        learner.KEEP_BYTES = keep
    held = [p.to_local() if hasattr(p, "to_local") else p for p in job.model.parameters() if not p.requires_grad]
    return Outcome(state=job.checkpoint(), metrics=metrics, weights=sum(p.numel() for p in held))


def main(folder: Path) -> None:
    """Run the cases that the folder names."""
    cases = msgspec.json.decode((folder / "cases.json").read_bytes(), type=dict[str, Case])
    batch = msgspec.json.decode((folder / "batch.json").read_bytes(), type=dict[str, Trajectory])
    for name, case in cases.items():
        outcome = run_case(case, batch)
        (folder / f"{name}-{ranks().size}-{ranks().rank}.json").write_bytes(msgspec.json.encode(outcome))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
