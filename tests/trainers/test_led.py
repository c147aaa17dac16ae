"""What the first of several processes has the others do: the same jobs, the same updates, one after the other."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bascule.schemas.errors import ConfigError, OutOfStep, TrainError
from bascule.trainers import distributed
from bascule.trainers.distributed import LedJob, Ranks, follow, in_step, leading
from bascule.trainers.jobs import Update


class Two(Ranks):
    """One of two processes, without the other.

    Args:
        rank: of this one.
        orders: what it is told, where it is not the first.
        other: what fails in the other.
    """

    size = 2

    def __init__(self, rank: int, orders: Any = (), other: Exception | None = None) -> None:
        self.rank = rank
        self.orders = iter(orders)
        self.other = other
        self.sent: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]

    def told(self, value: Any) -> Any:
        self.sent.append(value)
        return value if self.rank == 0 else next(self.orders)


class Job:
    """Notes its updates; one of an iteration below 0 fails."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []

    def update(self, groups: Any, trajectories: Any, iteration: int, progress: Any) -> Update:
        del groups, trajectories, progress
        if iteration < 0:
            raise TrainError("There is no such update.")
        self.done.append((iteration, torch.get_num_threads()))
        return Update({}, str(iteration), b"", {})


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Callable[[Two], Two]:
    def placed(process: Two) -> Two:
        monkeypatch.setattr(distributed, "ranks", lambda: process)
        return process

    return placed


def silent(figures: Any) -> None:
    del figures


def test_what_the_first_process_orders_the_others_do(among: Callable[[Two], Two]) -> None:
    before = torch.get_num_threads()
    first = among(Two(0))
    with leading():
        own = Job()
        job = LedJob(lambda: own, ("a job",))
        assert job.update((), {}, 0, silent).sha256 == "0"
        with pytest.raises(TrainError, match="no such update"):
            job.update((), {}, -1, silent)
        torch.set_num_threads(before + 1)
        job.update((), {}, 1, silent)
    torch.set_num_threads(before)
    among(Two(1, first.sent))
    opened: dict[str, Job] = {}
    follow(lambda name: opened.setdefault(name, Job()))
    assert opened["a job"].done == own.done == [(0, before), (1, before + 1)]
    torch.set_num_threads(before)


def test_a_job_that_the_first_process_lets_go_of_is_let_go_of_by_all(among: Callable[[Two], Two]) -> None:
    first = among(Two(0))
    with leading():
        jobs = [LedJob(Job, (name,)) for name in "ab"]
        jobs[1].update((), {}, 0, silent)
        del jobs[0]
        gc.collect()
        jobs[0].update((), {}, 1, silent)
    alive: list[set[str]] = []
    held: dict[str, Any] = {}

    class Watched(Job):
        def update(self, *given: Any) -> Update:
            gc.collect()
            alive.append({name for name, ref in held.items() if ref() is not None})
            return super().update(*given)

    def opening(name: str) -> Job:
        made = Watched()
        held[name] = weakref.ref(made)
        return made

    among(Two(1, first.sent))
    follow(opening)
    assert alive == [{"a", "b"}, {"b"}]


def test_a_job_that_cannot_be_opened_in_another_process_is_not_opened(among: Callable[[Two], Two]) -> None:
    among(Two(0, other=ConfigError("There is no base model.")))
    with pytest.raises(ConfigError, match="no base model"):
        LedJob(Job, ())


def test_an_unforeseen_failure_ends_the_work_of_all(among: Callable[[Two], Two]) -> None:
    def broken() -> Job:
        raise RuntimeError("Connection closed by peer")

    first = among(Two(0))
    with pytest.raises(OutOfStep, match=r"Process 0 of 2.*closed by peer"), leading():
        LedJob(broken, ())
    assert None not in first.sent  # the others wait for something else, and would not hear it
    among(Two(1, first.sent))
    with pytest.raises(OutOfStep, match="Process 1 of 2"):
        follow(broken)


def test_a_process_alone_fails_as_it_does() -> None:
    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_step(broken)
    assert in_step(lambda: 3) == 3


def test_a_job_is_wanted_from_its_opening_on(among: Callable[[Two], Two]) -> None:
    """Whatever another thread has the others do next."""
    first = among(Two(0))
    job = LedJob(Job, ())
    assert first.sent[0].alive >= {first.sent[0].job}
    del job


def test_jobs_of_several_threads_take_turns(among: Callable[[Two], Two]) -> None:
    among(Two(0))
    inside = 0
    most = 0
    entered = threading.Barrier(2)

    class Slow(Job):
        def update(self, *given: Any) -> Update:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            for _ in range(1000):
                torch.ones(10).sum()
            inside -= 1
            return super().update(*given)

    jobs: list[LedJob] = []
    openers = [threading.Thread(target=lambda i=i: jobs.append(LedJob(Slow, (i,)))) for i in range(2)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()

    def work(job: LedJob) -> None:
        entered.wait()
        for i in range(20):
            job.update((), {}, i, silent)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
