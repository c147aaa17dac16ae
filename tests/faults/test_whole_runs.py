"""What holds a disturbed run against an undisturbed one would notice each way in which it can differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bascule.schemas import subjects
from bascule.schemas.codec import decode, encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.events import KNOWN_TYPES, Data, ModelCalled, RunForked, RunPaused
from tests.faults import verdict
from tests.faults.kills import uncovered
from tests.faults.launcher import MOMENTS, Acked, Point, lines_of, write_lines, written_by
from tests.faults.verdict import CALLS, LEDGER, Performed, judged

NAME = "r"
REPORT = {
    "run": NAME,
    "seed": 1,
    "status": "completed",
    "decision_hash": "h",
    "repeated_rollouts": 0,
    "repeated_updates": 0,
}


def recorded(seq: int, subject: str, data: Data, cause: str | None = None) -> Recorded:
    draft, time = Draft(subject=subject, step=0, data=data, cause=cause), "2026-01-01T00:00:10Z"
    producer = Producer(service="feedback", version="0", hash="0")
    return decode(seq, subject, encode(draft, run=NAME, producer=producer, time=time, root=None))


PAUSED = recorded(1, subjects.run_paused(NAME, 1), RunPaused(reason="x"))
CALLED = recorded(
    2,
    subjects.call_outcome(NAME, "g01-policy", 0),
    ModelCalled(session="g01-policy", ordinal=0, model="oracle", request={"key": "k"}, answer={}),
)
DECIDED = recorded(3, subjects.run_paused(NAME, 2), RunPaused(reason="as answered"), cause=CALLED.envelope.id)


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The undisturbed run holds the two events above."""
    decisions = frozenset({PAUSED.subject, CALLED.subject})
    monkeypatch.setattr(verdict, "undisturbed", lambda seed: ({"decision_hash": "h"}, decisions))


def outcome(home: Path, *events: Recorded, **report: Any) -> Any:
    return judged({**REPORT, **report}, events, home, injected=1)


@pytest.mark.usefixtures("same")
def test_a_run_that_lost_doubled_or_changed_anything_breaks_the_promise(tmp_path: Path) -> None:
    assert outcome(tmp_path, PAUSED, CALLED).kept
    assert outcome(tmp_path, PAUSED).lost == 1
    assert outcome(tmp_path, PAUSED, CALLED, CALLED).duplicated == 1
    assert outcome(tmp_path, PAUSED, CALLED, decision_hash="other").equal is False
    assert outcome(tmp_path, PAUSED, CALLED, repeated_rollouts=2, repeated_updates=1).duplicated == 3
    assert outcome(tmp_path, PAUSED, CALLED, status="paused").broken


@pytest.mark.usefixtures("same")
def test_an_acknowledged_event_with_other_bytes_in_the_log_is_lost(tmp_path: Path) -> None:
    write_lines(tmp_path / LEDGER, [Acked(1, PAUSED.subject, PAUSED.payload.decode())])
    assert outcome(tmp_path, PAUSED, CALLED).kept
    write_lines(tmp_path / LEDGER, [Acked(2, CALLED.subject, "other")])
    assert outcome(tmp_path, PAUSED, CALLED).lost == 1


@pytest.mark.usefixtures("same")
def test_a_call_is_repeated_only_if_it_was_made_after_something_was_decided_on_its_answer(tmp_path: Path) -> None:
    at = 1767225610.0  # the time of the events
    write_lines(tmp_path / CALLS, [Performed("k", at - 5), Performed("k", at - 1), Performed("other", at + 9)])
    assert outcome(tmp_path, PAUSED, CALLED, DECIDED).duplicated == 0
    write_lines(tmp_path / CALLS, [Performed("k", at + 1)])
    assert outcome(tmp_path, PAUSED, CALLED).duplicated == 0
    assert outcome(tmp_path, PAUSED, CALLED, DECIDED).duplicated == 1


def test_kills_at_every_moment_of_every_type_leave_nothing_uncovered() -> None:
    every = [Point("cli", t, m) for t in KNOWN_TYPES for m in MOMENTS]
    assert uncovered(every) == ()
    assert "acked" not in uncovered(every[:-1])[0]
    without = [p for p in every if p.type != "bascule.run.failed"]
    assert uncovered(without) == ("no kill at bascule.run.failed",)


def test_what_a_fork_repeats_is_not_an_event_of_the_services_that_first_wrote_it() -> None:
    own = PAUSED.payload
    repeated = b'{"origin":"whatif",' + own[1:]
    forked = repeated.replace(b"bascule.run.paused", RunForked.TYPE.encode())
    assert written_by([own]) == {("feedback", "bascule.run.paused")}
    assert written_by([repeated]) == set()
    assert written_by([repeated, forked]) == {("feedback", RunForked.TYPE)}


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    points = [Point("meta", "t", m) for m in MOMENTS]
    write_lines(tmp_path / "p", points[:1])
    write_lines(tmp_path / "p", points[1:])
    assert lines_of(tmp_path / "p", Point) == points
