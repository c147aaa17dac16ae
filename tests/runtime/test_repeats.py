"""Counting what was done again."""

from __future__ import annotations

import json
from pathlib import Path

from bascule.runtime.audit.repeats import Outcomes
from bascule.schemas import codec, subjects
from bascule.schemas import events as ev
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.landscape import Measured

NOW = "2026-01-01T00:00:10.000000Z"


def logged(name: str) -> Recorded:
    data = ev.TrajectoryLogged(
        trajectory=name, evaluation="g00-dev", example="e", position=0, sample=0, answer="7", error=None,
        prompt_tokens=1, output_tokens=1, measured=Measured(),
    )  # fmt: skip
    subject = subjects.trajectory_logged("r", name)
    producer = Producer(service="rollout", version="0", hash="h")
    draft = Draft(subject=subject, step=0, data=data)
    return codec.decode(1, subject, codec.encode(draft, run="r", producer=producer, time=NOW, root=None))


def started(name: str, time: str) -> str:
    return json.dumps({"event": "episode.started", "trajectory": name, "timestamp": time}) + "\n"


def repeated_work(path: Path, events: list[Recorded]) -> tuple[int, int]:
    outcomes = Outcomes()
    for event in events:
        outcomes.add(event)
    return outcomes.repeated(path)


def test_an_episode_started_after_its_record_is_counted_and_one_before_is_not(tmp_path: Path) -> None:
    path = tmp_path / "services.jsonl"
    path.write_text(
        started("g00-dev-0000-n0", "2026-01-01T00:00:09Z")
        + started("g00-dev-0000-n0", "2026-01-01T00:00:09.5Z")  # lost in a crash before it was recorded
        + started("g00-dev-0001-n0", "2026-01-01T00:00:30Z")  # never recorded
        + started("g00-dev-0000-n0", "garbage")
        + started("g00-dev-0000-n0", "2026-01-01T00:00:30")  # without a zone
        + '{"event": "episode.sta'  # cut short by a kill
    )
    assert repeated_work(path, [logged("g00-dev-0000-n0")]) == (0, 0)
    with path.open("a") as file:
        file.write("\n" + started("g00-dev-0000-n0", "2026-01-01T00:00:11Z"))
    assert repeated_work(path, [logged("g00-dev-0000-n0")]) == (1, 0)


def test_a_run_without_a_service_log_counts_nothing(tmp_path: Path) -> None:
    assert repeated_work(tmp_path / "none.jsonl", [logged("g00-dev-0000-n0")]) == (0, 0)
