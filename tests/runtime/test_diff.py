"""Comparing runs and folding them: by content, wherever they lie."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from bascule.runtime.audit.diff import Comparison, brief, compare
from bascule.runtime.audit.fold import fold
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import decode
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import NotFound
from tests.runtime import sample
from tests.runtime.sample import new_event


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


async def stream(events: Sequence[NewEvent], first: int = 1, gap: int = 1) -> AsyncIterator[Recorded]:
    for n, event in enumerate(events):
        yield decode(first + n * gap, event.subject, event.payload)


async def compared(a: Sequence[NewEvent], b: Sequence[NewEvent]) -> Comparison:
    return compare(await brief("a", stream(a)), await brief("b", stream(b, 100)))


async def test_a_run_is_equal_to_itself_wherever_it_lies(blobs: FileBlobs) -> None:
    events = await sample.sample(blobs)
    found = await compared(events, events)
    assert found.equal
    assert found.events == (9, 9)
    assert found.decisions_differ == found.outcomes_differ == found.measured_differ == 0


async def test_other_times_measurements_and_names_are_no_difference_in_decisions(blobs: FileBlobs) -> None:
    found = await compared(await sample.sample(blobs), await sample.sample(blobs, run="other", seconds=9.0))
    assert not found.equal
    assert (found.decisions_differ, found.outcomes_differ, found.measured_differ) == (0, 0, 9)
    assert found.decisions == (2, 2)


async def test_the_first_decision_that_differs_is_named_with_its_place_and_both_values(blobs: FileBlobs) -> None:
    found = await compared(await sample.sample(blobs), await sample.sample(blobs, reward=0.0))
    assert (found.decisions_differ, found.outcomes_differ) == (1, 1)
    assert found.first is not None
    assert (found.first.subject, found.first.path) == ("decision.g01.lever", "$.options[0].score")
    assert (found.first.a, found.first.b) == (0.333333333333, 0.0)


async def test_figures_that_agree_to_twelve_digits_are_equal(blobs: FileBlobs) -> None:
    found = await compared((await sample.sample(blobs))[4:5], (await sample.sample(blobs, reward=1.0 + 1e-15))[4:5])
    assert (found.decisions_differ, found.measured_differ) == (0, 1)


async def test_a_decision_that_only_one_run_made_is_a_difference(blobs: FileBlobs) -> None:
    events = await sample.sample(blobs)
    for a, b, values in ((events, events[:7], (True, False)), (events[:7], events, (False, True))):
        found = await compared(a, b)
        assert (found.decisions_differ, found.outcomes_differ) == (1, 1)
        assert found.first is not None
        assert (found.first.subject, found.first.path) == ("train.g01.outcome", "")
        assert (found.first.a is not None, found.first.b is not None) == values


async def test_the_order_of_independent_events_and_checkpoints_of_the_log_are_no_difference(blobs: FileBlobs) -> None:
    events = await sample.sample(blobs)
    noted = new_event("verifier", subjects.log_checkpointed("sample", 9), ev.LogCheckpointed(count=9, head="0" * 64))
    found = await compared([*events, noted], [events[0], events[2], events[1], *events[3:]])
    assert not found.equal
    assert (found.decisions_differ, found.outcomes_differ) == (0, 0)


@pytest.mark.parametrize("count", range(1, 10))
async def test_a_fold_is_the_state_after_that_many_events_of_the_run(blobs: FileBlobs, count: int) -> None:
    events = await sample.sample(blobs)
    found = await fold("sample", stream(events, 50, 3), at=count)
    wanted = RunState.of("sample", [decode(n, e.subject, e.payload) for n, e in enumerate(events[:count], 1)])
    assert bytes(found.state) == wanted.digest()
    assert (found.count, found.events, found.subject) == (count, 9, events[count - 1].subject)
    assert found.hash == (await fold("sample", stream(events), at=count)).hash


async def test_a_fold_at_a_step_ends_with_its_lever_choice(blobs: FileBlobs) -> None:
    events = await sample.sample(blobs)
    found = await fold("sample", stream(events), step=1)
    assert (found.count, found.subject) == (5, "bascule.sample.decision.g01.lever")
    assert [(g.generation, g.lever, g.algorithm, g.outcome) for g in found.generations] == [
        (1, "weights", "grpo", "open")
    ]
    whole = await fold("sample", stream(events))
    assert whole.count == 9
    assert whole.hash != found.hash


async def test_a_fold_beyond_the_run_says_what_there_is(blobs: FileBlobs) -> None:
    events = await sample.sample(blobs)
    with pytest.raises(NotFound, match="has 9 events, not 10"):
        await fold("sample", stream(events), at=10)
    with pytest.raises(NotFound, match="Steps with a choice: 1"):
        await fold("sample", stream(events), step=4)
