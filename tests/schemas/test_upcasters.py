"""Upcasters: every version that a log can hold leads to the current one, which is proven before anything is decoded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from bascule.schemas import codec, subjects
from bascule.schemas.envelope import Envelope, Producer
from bascule.schemas.errors import SchemaError
from bascule.schemas.events import TYPES, RunPaused, TrajectoryLogged
from bascule.schemas.landscape import WorkMeasured
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.schemas.upcasters import STEPS, Upcast, prove

PRODUCER = Producer(service="test", version="0", hash="0")
AT_THREE = [("a.b", 3), ("c.d", 1)]


def step(data: dict[str, Any]) -> dict[str, Any]:
    return data


ONE, TWO = Upcast("a.b", 1, 2, step), Upcast("a.b", 2, 3, step)


def stored(type_: str, version: int, data: bytes, subject: str) -> bytes:
    return msgspec.json.encode(
        Envelope(
            id=subjects.event_id(subject),
            type=type_,
            source="/bascule/test",
            subject=subject,
            time="2026-01-01T00:00:00Z",
            run="r1",
            step=0,
            schemaversion=version,
            producer=PRODUCER,
            data=msgspec.Raw(data),
        )
    )


# --- the proof -------------------------------------------------------------------------------------------------------


def test_a_chain_that_leads_to_the_current_version_is_proven() -> None:
    assert prove(AT_THREE, [TWO, ONE]) == {("a.b", 1): step, ("a.b", 2): step}


@pytest.mark.parametrize(
    ("types", "upcasts", "fault"),
    [
        (AT_THREE, [ONE], "a.b has no step from version 2 to 3"),
        (AT_THREE, [TWO], "a.b has no step from version 1 to 2"),
        (AT_THREE, [ONE, TWO, ONE], "the step of a.b from version 1 is there twice"),
        (AT_THREE, [ONE, TWO, Upcast("a.b", 2, 1, step)], "from version 2 goes to version 1, not to 3"),
        (AT_THREE, [Upcast("a.b", 1, 1, step), TWO], "from version 1 goes to version 1, not to 2"),
        (AT_THREE, [Upcast("a.b", 1, 3, step), TWO], "from version 1 goes to version 3, not to 2"),
        (AT_THREE, [ONE, TWO, Upcast("x.y", 1, 2, step)], "the step of x.y from version 1 is for an unknown type"),
        (AT_THREE, [ONE, TWO, Upcast("a.b", 3, 4, step)], "from version 3 starts at no older version than .* 3"),
        (AT_THREE, [ONE, TWO, Upcast("c.d", 1, 2, step)], "the step of c.d from version 1 starts at no older version"),
        (AT_THREE, [ONE, TWO, Upcast("a.b", 0, 1, step)], "from version 0 starts at no older version"),
        ([("a.b", 1), ("a.b", 2)], [ONE], "a.b is declared in versions 1 and 2"),
    ],
)
def test_each_kind_of_defect_is_named(types: list[tuple[str, int]], upcasts: list[Upcast], fault: str) -> None:
    with pytest.raises(SchemaError, match=fault):
        prove(types, upcasts)


def test_all_defects_are_listed_at_once() -> None:
    with pytest.raises(SchemaError) as caught:
        prove(AT_THREE, [Upcast("x.y", 1, 2, step), Upcast("a.b", 2, 9, step), Upcast("a.b", 2, 3, step)])
    for fault in ("unknown type", "goes to version 9", "is there twice", "no step from version 1 to 2"):
        assert fault in str(caught.value)


def test_the_steps_of_this_code_lead_to_its_versions() -> None:
    assert prove(TYPES, STEPS) == codec.UPCASTERS


def test_a_process_with_a_gap_in_its_steps_does_not_start() -> None:
    program = (
        "from bascule.schemas import events\n"
        "events.RunPaused.VERSION = 2\n"
        "events.TYPES['bascule.run.paused', 2] = events.TYPES.pop(('bascule.run.paused', 1))\n"
        "import bascule.schemas.codec\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "bascule.run.paused has no step from version 1 to 2" in done.stderr


# --- a worked example ------------------------------------------------------------------------------------------------


def at_version(monkeypatch: pytest.MonkeyPatch, type_: type[Any], version: int, *upcasts: Upcast) -> None:
    """As if ``type_`` were at ``version`` and ``upcasts`` alone led there."""
    key = (type_.TYPE, type_.VERSION)
    for table in (TYPES, codec._decoders):
        monkeypatch.delitem(table, key)
    monkeypatch.setitem(TYPES, (type_.TYPE, version), type_)
    monkeypatch.setitem(codec._decoders, (type_.TYPE, version), msgspec.json.Decoder(type_))
    others = [s for s in STEPS if s.type != type_.TYPE]
    for at, function in prove(TYPES, (*others, *upcasts)).items():
        monkeypatch.setitem(codec.UPCASTERS, at, function)


def test_a_trajectory_of_version_one_is_read_by_code_at_version_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 had ``tokens`` for both counts together, version 2 called the position ``index``."""
    type_, subject = TrajectoryLogged.TYPE, subjects.trajectory_logged("r1", "g00-dev-0004-n0")
    output = Output(token_ids=pack_ids([7, 8]), logprobs=pack_floats([-0.5, -0.25]), text="25")
    call = ModelCall(kind="chat", asked="0", prompt_ids=pack_ids([1, 2, 70000]), outputs=(output,), sampling=Sampling())
    current = TrajectoryLogged(
        trajectory="g00-dev-0004-n0",
        evaluation="g00-dev",
        example="dev-4",
        position=4,
        sample=0,
        answer="25",
        error=None,
        prompt_tokens=3,
        output_tokens=2,
        measured=WorkMeasured(seconds=0.5),
        body=Trajectory(steps=(call,), answer="25"),
    )

    def split_tokens(data: dict[str, Any]) -> dict[str, Any]:
        prompt, output = data.pop("tokens")
        return data | {"prompt_tokens": prompt, "output_tokens": output}

    def name_position(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"position": data.pop("index")}

    two = msgspec.json.decode(msgspec.json.encode(current))
    two["index"] = two.pop("position")
    one = dict(two, tokens=[two["prompt_tokens"], two["output_tokens"]])
    del one["prompt_tokens"], one["output_tokens"]

    at_version(monkeypatch, TrajectoryLogged, 3, Upcast(type_, 1, 2, split_tokens), Upcast(type_, 2, 3, name_position))
    for version, data in ((1, one), (2, two), (3, msgspec.json.decode(msgspec.json.encode(current)))):
        payload = stored(type_, version, msgspec.json.encode(data), subject)
        event = codec.decode(1, subject, payload)
        assert event.data == current
        assert event.payload == payload  # what is stored, hashed and exported never changes


def test_a_step_that_gives_what_does_not_fit_is_named_with_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    at_version(monkeypatch, RunPaused, 2, Upcast(RunPaused.TYPE, 1, 2, lambda data: {"reason": 4}))
    subject = subjects.run_paused("r1", 1)
    with pytest.raises(SchemaError, match=r"pause-001.*version 1.*reason"):
        codec.decode(1, subject, stored(RunPaused.TYPE, 1, b'{"reason":"x"}', subject))
