"""Bytes to events and back: what is recorded is kept, what is unknown is kept or stops, equal decisions are equal."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.schemas import codec, subjects
from bascule.schemas.envelope import Draft, Envelope, Producer, Recorded, Unknown
from bascule.schemas.errors import Corrupt, SchemaError
from bascule.schemas.events import TYPES, AdapterServed, CandidateProposed, Data, RunPaused, ToolCalled
from bascule.schemas.landscape import Measured

PRODUCER = Producer(service="test", version="0", hash="0")
PAUSED = "bascule.run.paused"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def recorded(
    data: Data, subject: str, *, seq: int = 1, time: str = "2026-01-01T00:00:00Z", attempt: int = 0
) -> Recorded:
    draft = Draft(subject=subject, step=0, data=data, attempt=attempt)
    payload = codec.encode(draft, run=subject.split(".")[1], producer=PRODUCER, time=time, root=None)
    return codec.decode(seq, subject, payload)


def stored(type_: str, version: int, data: dict[str, Any], subject: str = "bascule.r1.run.pause-001.paused") -> bytes:
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
            data=msgspec.Raw(msgspec.json.encode(data)),
        )
    )


# --- decoding --------------------------------------------------------------------------------------------------------


@given(st.text())
def test_data_comes_back_as_it_was_encoded(reason: str) -> None:
    event = recorded(RunPaused(reason=reason), subjects.run_paused("r1", 1), attempt=3)
    assert event.data == RunPaused(reason=reason)
    assert (event.envelope.attempt, event.envelope.type) == (3, PAUSED)
    assert json.loads(event.payload)["data"] == {"reason": reason}


def test_every_event_is_a_cloud_event() -> None:
    event = json.loads(recorded(RunPaused(reason="x"), subjects.run_paused("r1", 1)).payload)
    # specversion and datacontenttype have these defaults in the format itself.
    assert {"id", "source", "type", "subject", "time"} <= set(event)
    assert all(name.isalnum() and name.islower() for name in event)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.integers(1, 9))
def test_data_of_an_unknown_type_is_kept_byte_for_byte(data: dict[str, Any], version: int) -> None:
    payload = stored("x.somebody.else", version, data)
    event = codec.decode(7, "bascule.r1.run.pause-001.paused", payload)
    assert event.data == Unknown(msgspec.json.encode(data))
    assert event.payload == payload


def test_unknown_fields_of_a_known_type_are_ignored() -> None:
    payload = stored(PAUSED, 1, {"reason": "x", "mood": "grey"})
    assert codec.decode(1, "bascule.r1.run.pause-001.paused", payload).data == RunPaused(reason="x")


def test_an_unknown_version_of_a_known_type_stops() -> None:
    with pytest.raises(SchemaError, match=r"run\.paused version 2 is newer than this code, which knows version 1"):
        codec.decode(1, "bascule.r1.run.pause-001.paused", stored(PAUSED, 2, {"reason": "x"}))


def test_data_that_does_not_fit_its_type_stops_and_is_named() -> None:
    with pytest.raises(SchemaError, match=r"pause-001.*version 1.*reason"):
        codec.decode(1, "bascule.r1.run.pause-001.paused", stored(PAUSED, 1, {"reason": 4}))


@pytest.fixture
def version_three(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if RunPaused were at version 3 and two older versions were in logs."""
    for table in (TYPES, codec._decoders):
        monkeypatch.delitem(table, (PAUSED, 1))
    monkeypatch.setitem(TYPES, (PAUSED, 3), RunPaused)
    monkeypatch.setitem(codec._decoders, (PAUSED, 3), msgspec.json.Decoder(RunPaused))
    monkeypatch.setitem(codec.UPCASTERS, (PAUSED, 1), lambda d: {"text": d["why"]})
    monkeypatch.setitem(codec.UPCASTERS, (PAUSED, 2), lambda d: {"reason": d["text"]})
    return monkeypatch


def test_an_old_version_is_brought_to_the_current_one_step_by_step(version_three: pytest.MonkeyPatch) -> None:
    for version, data in ((1, {"why": "x"}), (2, {"text": "x"}), (3, {"reason": "x"})):
        payload = stored(PAUSED, version, data)
        event = codec.decode(1, "bascule.r1.run.pause-001.paused", payload)
        assert event.data == RunPaused(reason="x")
        assert event.payload == payload


def test_a_gap_in_the_upcasters_is_named(version_three: pytest.MonkeyPatch) -> None:
    version_three.delitem(codec.UPCASTERS, (PAUSED, 2))
    with pytest.raises(SchemaError, match="version 1 needs an upcaster from version 2 to 3, and there is none"):
        codec.decode(1, "bascule.r1.run.pause-001.paused", stored(PAUSED, 1, {"why": "x"}))


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b"\xff\x00", b'{"id":'])
def test_bytes_that_are_no_envelope_are_corrupt(payload: bytes) -> None:
    with pytest.raises(Corrupt, match="sequence 7"):
        codec.decode(7, "bascule.r1.run.pause-001.paused", payload)


def test_an_event_under_another_subject_than_its_own_is_corrupt() -> None:
    payload = stored(PAUSED, 1, {"reason": "x"})
    with pytest.raises(Corrupt, match=r"pause-002.* says it is .*pause-001"):
        codec.decode(7, "bascule.r1.run.pause-002.paused", payload)


def test_an_event_that_is_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(SchemaError, match="limit is 524288"):
        recorded(RunPaused(reason="x" * codec.MAX_EVENT_BYTES), subjects.run_paused("r1", 1))


# --- canonical JSON --------------------------------------------------------------------------------------------------


@given(json_values)
def test_canonical_json_of_canonical_json_is_the_same(value: Any) -> None:
    once = codec.canonical(value)
    assert codec.canonical(msgspec.json.decode(once)) == once


@given(st.dictionaries(st.text(), json_values, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert codec.canonical(dict(items)) == codec.canonical(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_figure_keeps_twelve_digits(value: float) -> None:
    back = msgspec.json.decode(codec.canonical(value))
    assert math.isclose(back, value, rel_tol=1e-11, abs_tol=5e-324)


def test_figures_that_differ_in_rounding_only_are_equal() -> None:
    assert codec.canonical({"p": 0.1 + 0.2}) == codec.canonical({"p": 0.3})
    assert codec.canonical({"p": 0.3}) != codec.canonical({"p": 0.30000001})


# --- the decision hash -----------------------------------------------------------------------------------------------


def proposed(run: str, generation: int, **options: Any) -> Recorded:
    data = CandidateProposed(generation=generation, harness=options.pop("harness", "h"))
    return recorded(data, subjects.candidate_proposed(run, generation), **options)


def test_the_decision_hash_ignores_time_attempt_place_order_and_the_name_of_the_run() -> None:
    a = [proposed("r1", g, seq=g) for g in (1, 2)]
    b = [proposed("r2", g, seq=9 - g, time="2027-07-07T07:07:07Z", attempt=4) for g in (2, 1)]
    assert codec.decision_hash(a) == codec.decision_hash(b)


class Weighed(Data, frozen=True, kw_only=True):
    TYPE = "test.weighed"
    KIND = "decision"
    measured: Measured
    weight: int = 0


def test_the_decision_hash_ignores_measured_costs() -> None:
    subject = subjects.candidate_proposed("r1", 1)
    event = proposed("r1", 1)
    hashes = {
        (seconds, weight): codec.decision_hash(
            [msgspec.structs.replace(event, data=Weighed(measured=Measured(seconds=seconds), weight=weight))]
        )
        for seconds in (1.0, 2.0)
        for weight in (1, 2)
    }
    assert event.subject == subject
    assert hashes[1.0, 1] == hashes[2.0, 1] != hashes[1.0, 2]


def test_the_decision_hash_sees_data_subject_and_number_of_decisions() -> None:
    base = [proposed("r1", 1)]
    others = [[], [proposed("r1", 1, harness="k")], [proposed("r1", 2)], base * 2, [*base, proposed("r1", 2)]]
    hashes = [codec.decision_hash(events) for events in (base, *others)]
    assert len(set(hashes)) == len(hashes)


def test_the_decision_hash_ignores_commands_outcomes_and_unknown_types() -> None:
    base = [proposed("r1", 1)]
    noise = [
        recorded(RunPaused(reason="x"), subjects.run_paused("r1", 1)),
        recorded(AdapterServed(adapter="g01-i001", sha256="0", engine="e"), subjects.adapter_served("r1", "g01-i001")),
        recorded(ToolCalled(session="s", ordinal=1, name="n", arguments={}), subjects.call_outcome("r1", "s", 1)),
        codec.decode(1, "bascule.r1.run.pause-001.paused", stored("x.somebody.else", 1, {})),
    ]
    assert codec.decision_hash(base + noise) == codec.decision_hash(base)
