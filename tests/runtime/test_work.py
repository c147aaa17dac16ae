"""Poison: tried again, set aside once, in nobody's way, and tried once more on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from bascule.runtime import work
from bascule.runtime.log.dead_letters import DeadLetter
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.runner import Service, View, serve
from bascule.runtime.services import rollout, verifier
from bascule.runtime.services.catalog import SERVICES
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import decision_hash
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ScoringError
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import Trajectory, Verdict
from bascule.verifiers.scoring import Scorer

Make = Callable[[MemoryLog], View]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(work, "IDLE_SECONDS", 0.01)


def orphan() -> Draft:
    """A trajectory of an evaluation that nobody asked for."""
    data = ev.TrajectoryLogged(
        trajectory="g77-dev-0000-n0", evaluation="g77-dev", example="e", position=0, sample=0, answer="7", error=None,
        prompt_tokens=1, output_tokens=1, measured=Measured(),
    )  # fmt: skip
    return Draft(subject=subjects.trajectory_logged("small", "g77-dev-0000-n0"), step=77, data=data)


async def letters(log: MemoryLog) -> list[DeadLetter]:
    return await log.letters.list("small")


async def test_a_poison_event_gets_one_dead_letter_and_the_run_ends_as_without_it(
    make_view: Make, started_log: MemoryLog
) -> None:
    clean = MemoryLog()
    async for event in started_log.read("bascule.small.>"):
        await clean.append([_new(event)])
    await serve(make_view(clean), list(SERVICES.values()))
    await make_view(started_log).append("rollout", [orphan()])
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    (found,) = await letters(started_log)
    assert (found.service, found.subject, found.dead) == ("verifier", orphan().subject, True)
    assert "KeyError" in found.error
    assert isinstance(view.state.end, ev.RunCompleted)
    hashes = [decision_hash([e async for e in log.read("bascule.small.>")]) for log in (clean, started_log)]
    assert hashes[0] == hashes[1]


async def test_a_dead_letter_is_not_touched_again_until_somebody_asks(make_view: Make, started_log: MemoryLog) -> None:
    await make_view(started_log).append("rollout", [orphan()])
    await serve(make_view(started_log), list(SERVICES.values()))
    (first,) = await letters(started_log)
    ablation = ev.AblationRequested(name="constant", arm="constant-engine", generation=0, answer="9")
    draft = Draft(subject=subjects.ablation_requested("small", "constant"), step=0, data=ablation)
    await make_view(started_log).append("cli", [draft])
    await serve(make_view(started_log), list(SERVICES.values()))  # everything is delivered again
    assert await letters(started_log) == [first]
    await started_log.letters.retry(first)
    assert [(found.dead, found.retries) for found in await letters(started_log)] == [(False, 1)]


class Moody:
    """Scores as the real process does, except for one trajectory as long as ``broken`` is set."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.broken = True

    def __call__(self, task: str, params: dict[str, Any]) -> Moody:
        self._scorer = Scorer(task, params)
        return self

    async def __aenter__(self) -> Moody:
        await self._scorer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scorer.close()

    async def opinions(
        self,
        split: ev.Split,
        example: str,
        answer: str | None,
        episode: Trajectory | None = None,
        *,
        second: bool = True,
    ) -> tuple[Verdict, Verdict | None]:
        if self.broken and split == "dev":
            raise self.error
        return await self._scorer.opinions(split, example, answer, episode, second=second)


def services(scoring: Moody) -> list[Service]:
    verify = Service(verifier.NAME, verifier.decide, lambda: verifier.Verifier(scoring))
    return [verify if s.name == verifier.NAME else s for s in SERVICES.values()]


async def test_a_run_that_waits_for_dead_letters_alone_stops_and_goes_on_after_a_retry(
    make_view: Make, started_log: MemoryLog
) -> None:
    moody = Moody(ValueError("a bad mood"))
    with pytest.raises(ExceptionGroup) as caught:
        await serve(make_view(started_log), services(moody))
    stopped = _leaf(caught.value)
    assert isinstance(stopped, work.DeadLettered)
    assert "g00-dev" in str(stopped)
    assert "a bad mood" in str(stopped)
    assert len(await letters(started_log)) == 20
    moody.broken = False
    for letter in await letters(started_log):
        await started_log.letters.retry(letter)
    view = make_view(started_log)
    await serve(view, services(moody))
    assert isinstance(view.state.end, ev.RunCompleted)
    assert not any(letter.dead for letter in await letters(started_log))


async def test_a_retry_reaches_a_service_that_runs(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    await view.append("rollout", [orphan()])
    task = asyncio.create_task(serve(view, [SERVICES["verifier"]]))
    while not await letters(started_log):
        await asyncio.sleep(0)
    await started_log.letters.retry((await letters(started_log))[0])
    while [(found.dead, found.retries) for found in await letters(started_log)] != [(True, 1)]:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def test_what_is_wrong_around_an_event_ends_the_service_instead(make_view: Make, started_log: MemoryLog) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await serve(make_view(started_log), services(Moody(ScoringError("The scoring process is gone."))))
    assert isinstance(_leaf(caught.value), ScoringError)
    assert await letters(started_log) == []


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _new(event: Recorded) -> NewEvent:
    return NewEvent(subject=event.subject, payload=event.payload)


async def test_a_retry_while_no_service_ran_is_worked_off_by_the_next_one(
    make_view: Make, started_log: MemoryLog
) -> None:
    """The delivery was acknowledged when it was set aside: no queue brings it again."""
    moody = Moody(ValueError("a bad mood"))
    with pytest.raises(ExceptionGroup):
        await serve(make_view(started_log), services(moody))
    moody.broken = False
    for letter in await letters(started_log):
        await started_log.letters.retry(letter)
    view = make_view(started_log)
    view.fresh = False
    await serve(view, services(moody))
    assert isinstance(view.state.end, ev.RunCompleted)


async def test_dead_letters_of_two_services_together_stop_the_run(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    moody = Moody(ValueError("a bad mood"))

    class HalfDead(rollout.Rollout):
        async def _shard(self, view: View, episodes: rollout.Episodes, event: Recorded) -> None:
            data = event.data
            if isinstance(data, ev.EpisodesRequested) and data.split == "train":
                raise ValueError("no such harness")
            await super()._shard(view, episodes, event)

    both = [Service(rollout.NAME, rollout.decide, HalfDead) if s.name == "rollout" else s for s in services(moody)]
    with pytest.raises(ExceptionGroup) as caught:
        await serve(view, both)
    assert isinstance(_leaf(caught.value), work.DeadLettered)
    assert {letter.service for letter in await letters(started_log)} == {"rollout", "verifier"}


class Twice:
    """A log whose queue delivers its one event twice, and then nothing."""

    def __init__(self, log: MemoryLog, event: Recorded) -> None:
        self._items = [[_Item(event)], [_Item(event)]]
        self.letters = log.letters
        self.drained = asyncio.Event()

    async def work(self, *_: object, **__: object) -> Twice:
        return self

    async def next(self, limit: int, wait: float) -> list[_Item]:
        if self._items:
            return self._items.pop()
        self.drained.set()
        await asyncio.sleep(wait)
        return []

    async def close(self) -> None:
        pass


class _Item:
    def __init__(self, event: Recorded) -> None:
        self.event = event

    async def done(self) -> None:
        pass


async def test_a_trigger_that_is_delivered_twice_is_handled_once(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    (event,) = [e async for e in started_log.read("bascule.small.run.>")]
    view.state.apply(event)
    twice, release = Twice(started_log, event), asyncio.Event()
    view._writers = {"verifier": twice}  # type: ignore[dict-item]
    handled: list[int] = []

    async def handle(event: Recorded) -> None:
        handled.append(event.seq)
        await release.wait()

    task = asyncio.create_task(work.work_off(view, "verifier", "bascule.small.run.>", handle, slots=4))
    await twice.drained.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert handled == [event.seq]
    release.set()
    task.cancel()
    await asyncio.wait([task])
