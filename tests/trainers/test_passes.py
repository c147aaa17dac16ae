"""Passes are made that a loss needs, in micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bascule.plugins.algorithm import Credit, Stream
from bascule.schemas.errors import TrainError
from bascule.trainers import passes
from bascule.trainers.batch import MicroBatch, Unit, micro_batches
from bascule.trainers.loop import TrainJob
from tests.oracles import within
from tests.trainers.bandit import PARAMS, alternating_credit, grouped, make_job, sample_batch, train
from tests.trainers.gradients import EXACT, adapter, decoder, gradients, limit_nodes

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, lambda: RuntimeError(ALLOCATOR), MemoryError])
@pytest.mark.parametrize("streams", [frozenset(), frozenset({"policy"})])
def test_memory_that_runs_out_halves_the_micro_batches_once(
    base: Path,
    parent: dict[str, bytes],
    error: Callable[[], BaseException],
    streams: frozenset[Stream],
) -> None:
    params = {**EXACT, "max_nodes": 64}
    job, small = (make_job(base, {**params, "max_nodes": n}, 2, parent) for n in (64, 32))
    job.algorithm.streams = small.algorithm.streams = streams
    batch = sample_batch(job, seed=7)
    credit = alternating_credit(batch)
    train(small, batch, credit, 0)
    limit = limit_nodes(job, 32, error)
    metrics = train(job, batch, credit, 0)
    assert metrics.max_nodes == 32
    within("adapter after memory ran out", "the smaller micro-batches", distance(job, small), 1e-5)
    assert gradients(job).keys() == gradients(small).keys()
    assert all(torch.equal(g, gradients(small)[n]) for n, g in gradients(job).items())

    resumed = make_job(base, params, 2, parent)
    resumed.restore(job.checkpoint())
    limit.remove()
    for again in (job, resumed):
        limit_nodes(again, 16, error)
        with pytest.raises(TrainError, match=r"micro-batches of 32 nodes.*max_nodes below 32"):
            train(again, batch, credit, 1)


def test_a_micro_batch_of_one_node_is_not_halved(base: Path) -> None:
    job = make_job(base, {**PARAMS, "max_nodes": 1}, seed=1)
    batch = sample_batch(job, seed=0)
    limit_nodes(job, 0, torch.OutOfMemoryError)
    with pytest.raises(TrainError, match="Memory ran out"):
        train(job, batch, alternating_credit(batch), 0)


def test_a_trajectory_that_alone_is_too_large_is_named_instead_of_a_smaller_bound(base: Path) -> None:
    job = make_job(base, {**PARAMS, "max_nodes": 8}, seed=1)
    batch = sample_batch(job, seed=0)
    limit_nodes(job, 4, torch.OutOfMemoryError)
    with pytest.raises(TrainError, match=r"Memory ran out on p\d-s\d, [78] nodes that no max_nodes splits") as caught:
        train(job, batch, alternating_credit(batch), 0)
    assert "max_nodes" not in (caught.value.next_step or "")


def test_another_error_of_torch_is_not_taken_for_one_of_memory(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    limit_nodes(job, 0, lambda: RuntimeError("sizes of tensors must match"))
    with pytest.raises(RuntimeError, match="sizes"):
        train(job, batch, alternating_credit(batch), 0)


#: Of groups so few none is computed once more after the last step.
THREE = ((3, 1), (4, 1), (5, 1))


def test_what_is_trained_on_is_packed_once_for_all_passes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(units: Sequence[Unit], max_nodes: int) -> list[MicroBatch]:
        sizes.append(max_nodes)
        return micro_batches(units, max_nodes)

    monkeypatch.setattr(passes, "micro_batches", spy)
    job = make_job(base, {**PARAMS, "num_iterations": 3, "beta": 0.1, "max_nodes": 32}, seed=1)
    batch = sample_batch(job, seed=0, prompts=THREE)
    train(job, batch, alternating_credit(batch), 0)
    assert sizes == [32]
    limit_nodes(job, 16, torch.OutOfMemoryError)
    train(job, batch, alternating_credit(batch), 1)
    assert sizes == [32, 32, 16]


def test_the_nodes_of_an_update_are_those_of_its_mini_batches(base: Path) -> None:
    job = make_job(base, {**PARAMS, "num_iterations": 2, "num_mini_batches": 3}, seed=1)
    batch = sample_batch(job, seed=0)
    job.algorithm.given = alternating_credit(batch)  # type: ignore[attr-defined]
    nodes: list[float] = []
    metrics = job.update(
        grouped(batch, dict.fromkeys(batch, 0.0)), batch, 0, lambda figures: nodes.append(figures["nodes"])
    )
    assert nodes[:3] == nodes[3:]
    assert min(nodes) > 0
    assert sum(nodes[:3]) == metrics.nodes


def distance(one: TrainJob, other: TrainJob) -> float:
    theirs = adapter(other)
    return max(float((x - theirs[k]).abs().max()) for k, x in adapter(one).items())


def test_no_pass_is_made_for_figures_that_no_loss_reads(base: Path) -> None:
    gradients_on: list[bool] = []

    for component, before in (("imitation", 0), ("policy", 1)):
        gradients_on.clear()
        job = make_job(base, {**PARAMS, "num_iterations": 2, "max_nodes": 4096}, seed=1)
        batch = sample_batch(job, seed=0, prompts=THREE)
        decoder(job).register_forward_pre_hook(lambda *_: gradients_on.append(torch.is_grad_enabled()))
        train(job, batch, [Credit(trajectory=t, component=component, advantage=1.0) for t in batch], 0)
        assert gradients_on == [False] * before + [True] * 2
