"""Training again what was trained: what is found the same, what is named when it is not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.audit.retrain import Retraining, distance, find_job, retrain
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.errors import Corrupt, NotFound, TrainError
from bascule.schemas.trajectory import Note, Scored, Trajectory, Unscored
from tests.runtime.training import ONE, RUN, WIN, Backend, asked, call, outcome, output

LOSE = Scored(reward=0.0, passed=False)
OTHER = Trajectory(steps=(call(output(9)),))


@pytest.fixture
def view(make_view: Callable[[MemoryLog], View], started_log: MemoryLog) -> View:
    return make_view(started_log)


async def again(view: View, backend: Backend, what: str = "1", **values: Any) -> Retraining:
    job = await find_job(RUN, view.log.read(f"bascule.{RUN}.>"), what)
    return await retrain(job, view, plugins().registry, backend, **values)


async def trained(view: View, *, blobs: bool = False, backend: Backend | None = None) -> list[ev.BlobRef]:
    """A job that has made its one update."""
    refs = await asked(view, [(ONE, WIN), (OTHER, LOSE)], blobs=blobs)
    assert isinstance(await outcome(view, backend or Backend(), "checkpointed-i000"), ev.AdapterCheckpointed)
    return refs


REQUESTED = "bascule.small.train.g01.requested"


@pytest.mark.parametrize("what", ["1", "train.g01.requested", REQUESTED, subjects.event_id(REQUESTED)])
async def test_equal_inputs_threads_and_versions_give_the_same_adapter(view: View, what: str) -> None:
    await trained(view)
    head = await view.log.head("bascule.>")
    found = await again(view, Backend(), what)
    assert (found.same, found.same_threads, found.differing, found.distance) == (True, True, {}, None)
    assert [i.trajectories for i in found.iterations] == [2]
    assert await view.log.head("bascule.>") == head


async def test_another_thread_count_gives_another_adapter_and_its_distance(view: View) -> None:
    await trained(view)
    found = await again(view, Backend(), threads=2)
    assert (found.same, found.same_threads) == (False, False)
    assert (found.iterations[0].threads, found.iterations[0].recorded_threads) == (2, 1)
    assert found.distance is not None
    assert found.distance.max_abs == 0.125
    assert found.distance.relative_l2 == pytest.approx(0.125 / (2.125**2 + 4.0**2) ** 0.5)


async def test_without_the_recorded_adapter_the_difference_is_still_found(view: View) -> None:
    await trained(view)
    job = await find_job(RUN, view.log.read(f"bascule.{RUN}.>"), "1")
    for ref in job.checkpoints[0].files.values():
        await view.blobs.discard(ref)
    found = await again(view, Backend(), threads=2)
    assert (found.same, found.distance) == (False, None)


async def test_what_computes_otherwise_now_is_named(view: View) -> None:
    await trained(view)
    assert (await again(view, Backend(version="2"))).differing == {"torch": ("1", "2")}


async def test_smaller_micro_batches_after_memory_ran_out_are_named_as_what_differs(view: View) -> None:
    await trained(view, backend=Backend(metrics={"max_nodes": 1024.0}))
    assert (await again(view, Backend(metrics={"max_nodes": 1024.0}))).same_nodes
    found = await again(view, Backend(metrics={"max_nodes": 2048.0}))
    assert (found.differing, found.same_nodes) == ({"max_nodes": ("1024", "2048")}, False)


async def test_an_update_that_is_recorded_is_made_again_even_if_it_took_no_step(view: View) -> None:
    """Earlier code has let it pass."""
    await trained(view)
    assert (await again(view, Backend(metrics={"optimizer_steps": 0.0}))).same


async def test_other_trajectories_than_those_that_were_trained_from_are_refused(view: View) -> None:
    refs = await trained(view, blobs=True)
    real = view.blobs.get

    async def get(ref: ev.BlobRef) -> bytes:
        if ref == refs[0]:
            return msgspec.json.encode(Trajectory(steps=(*ONE.steps, Note(text="another"))))
        return await real(ref)

    job = await find_job(RUN, view.log.read(f"bascule.{RUN}.>"), "1")
    job.checkpoints[0] = msgspec.structs.replace(job.checkpoints[0], base="b" * 64)
    view.blobs.get = get  # type: ignore[method-assign]
    with pytest.raises(Corrupt, match="g00-train are not those that g01-i000 was trained from"):
        await retrain(job, view, plugins().registry, Backend())


async def test_another_algorithm_is_asked_for_as_many_updates_with_its_own_parameters(view: View) -> None:
    await trained(view)
    backend = Backend()
    found = await again(view, backend, algorithm="dpo")
    assert (found.algorithm, found.recorded_algorithm, found.same) == ("dpo", "best_of_n", None)
    assert backend.asked is not None
    defaults = plugins().registry.algorithms.get("dpo").defaults()
    assert backend.asked.params == {**defaults, "steps": 1}


async def test_an_algorithm_that_the_samples_do_not_allow_is_refused_before_a_model_is_opened(view: View) -> None:
    await trained(view)
    backend = Backend()
    with pytest.raises(TrainError, match=r"entropic cannot train.*none of 1 groups has 3 scored samples"):
        await again(view, backend, algorithm="entropic")
    assert backend.opened == 0


async def test_a_job_that_failed_fails_as_it_is_recorded_to(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(updates="The sampler is far away."))
    assert isinstance(failed, ev.TrainFailed)
    found = await again(view, Backend(updates="The sampler is far away."))
    assert (found.failed, found.iterations, found.same) == (failed.reason, (), None)
    with pytest.raises(TrainError, match="something else"):
        await again(view, Backend(updates="It is something else."))


async def test_a_failure_that_does_not_come_again_is_a_difference(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(updates="Memory ran out."))
    assert isinstance(failed, ev.TrainFailed)
    found = await again(view, Backend())
    assert (found.failed, found.survived, found.same, found.last) == (None, failed.reason, None, None)


async def test_a_job_that_failed_by_accident_fails_as_it_is_recorded_to(view: View) -> None:
    version = plugins().registry.algorithms.get("best_of_n").version
    await asked(view, [(ONE, WIN)], algorithm_version=version)
    failed = await outcome(view, Backend(updates=IndexError("out of range")))
    assert isinstance(failed, ev.TrainFailed)
    assert (await again(view, Backend(updates=IndexError("out of range")))).failed == failed.reason


async def test_a_job_that_was_refused_is_refused_again(view: View) -> None:
    await asked(view, [(ONE, Unscored(reason="it broke"))])
    failed = await outcome(view, Backend())
    assert isinstance(failed, ev.TrainFailed)
    assert (await again(view, Backend())).failed == failed.reason


async def test_a_job_that_is_not_there_lists_those_that_are(view: View) -> None:
    await trained(view)
    with pytest.raises(NotFound, match=r"no training job '7'.*generation 1 \(best_of_n\)"):
        await again(view, Backend(), "7")


def test_adapters_of_different_shapes_have_no_distance() -> None:
    import torch

    from bascule.trainers.lora import WEIGHTS
    from bascule.trainers.tensorfile import write_tensors

    one, two = ({WEIGHTS: write_tensors({"a": torch.zeros(n)}, {})} for n in (1, 2))
    assert distance(one, two) is None
    assert distance(one, one) is not None
