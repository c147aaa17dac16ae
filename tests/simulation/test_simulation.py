"""Whatever the order of steps, delays, losses, crashes, pauses and clocks: the run ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime import work
from bascule.runtime.runner import Service, View
from bascule.runtime.services import trainer
from bascule.runtime.state import RunState
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import BasculeError
from tests.simulation.invariants import broken
from tests.simulation.schedule import calm, play

ROOT = Path(__file__).parents[2]
SCHEDULES = 2000
#: Schedules that found a mistake, by what it was; they do so as long as plans are drawn from seeds in the same way.
FOUND = {
    "an outage during one of several episodes counted as the episodes' own failure": (1, 9),
    "an episode was run again after its record had come in while an adapter was loaded": (46, 76),
    "an update was computed for a job that another trainer had taken over": (10, 234),
    "a trainer gave up its job for good when an append of its former self came in before its start": (1257,),
}


def test_thousands_of_schedules_keep_every_promise() -> None:
    """In processes of their own, with other hash seeds than this one."""
    command = [sys.executable, "-m", "tests.simulation", "--schedules", str(SCHEDULES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SCHEDULES} schedules" in done.stdout


def test_without_faults_the_run_has_no_problem_and_pulls_both_levers() -> None:
    assert broken(calm()) == []
    subjects = {e.subject.removeprefix("bascule.sim.") for e in calm().events}
    assert {"harness.g01.outcome", "train.g02.checkpointed-i001", "call.g01-author-001.outcome"} <= subjects


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_seed_gives_the_same_log_in_every_process(seed: int) -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed)]
    traces = {
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": salt}
        ).stdout
        for salt in ("1", "2")
    }
    assert len(traces) == 1
    assert [e.payload for e in play(seed).events] == [e.payload for e in play(seed).events]


@pytest.mark.parametrize("mistake", FOUND)
def test_what_was_found_stays_mended(mistake: str) -> None:
    for seed in FOUND[mistake]:
        assert broken(play(seed)) == []


Plant = Callable[[pytest.MonkeyPatch], None]


def decisions_skipped_at_recovery(patch: pytest.MonkeyPatch) -> None:
    follow = View._follow

    async def skipping(self: View, services: list[Service], *rest: Any) -> None:
        def after_the_end_was_read(service: Service) -> Service:
            def decide(state: RunState, event: Recorded, world: Any) -> list[Draft]:
                return service.decide(state, event, world) if self.caught_up or event.seq == 1 else []

            return Service(service.name, decide, service.effects)

        await follow(self, [after_the_end_was_read(s) for s in services], *rest)

    patch.setattr(View, "_follow", skipping)


def training_without_fence(patch: pytest.MonkeyPatch) -> None:
    append = View.append

    async def unfenced(self: View, service: str, drafts: list[Draft], *, fence: Any = None) -> list[Recorded]:
        return await append(self, service, drafts, fence=None if service == trainer.NAME else fence)

    patch.setattr(View, "append", unfenced)


def work_acknowledged_before_its_outcome(patch: pytest.MonkeyPatch) -> None:
    async def hasty(self: Any, item: Any) -> None:
        await item.done()
        await self.event(item.event)

    patch.setattr(work._Worker, "item", hasty)


def a_fold_that_counts_duplicates(patch: pytest.MonkeyPatch) -> None:
    apply = RunState.apply

    def counting(self: RunState, event: Recorded) -> None:
        if event.seq == self.seq:
            self.events += 1
        apply(self, event)

    patch.setattr(RunState, "apply", counting)


def an_outage_among_episodes_is_an_episodes_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(work, "ends_service", lambda error: isinstance(error, BasculeError))


MISTAKES = (
    decisions_skipped_at_recovery,
    training_without_fence,
    work_acknowledged_before_its_outcome,
    a_fold_that_counts_duplicates,
    an_outage_among_episodes_is_an_episodes_failure,
)


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda p: p.__name__)
def test_a_planted_mistake_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    calm()
    plant(monkeypatch)
    assert any(broken(play(seed)) for seed in range(SCHEDULES))
