"""The golden corpus: raw payloads of every (type, version) that a log can hold are read, and read as what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from bascule.schemas import codec
from bascule.schemas.envelope import Recorded
from bascule.schemas.events import TYPES, Data
from bascule.schemas.upcasters import STEPS

FILES = sorted(Path(__file__).with_name("golden").glob("*.json"))
CURRENT = dict(TYPES.keys())


def version_of(path: Path) -> tuple[str, int]:
    """``bascule.trajectory.scored-v1-unscored.json`` is of ("bascule.trajectory.scored", 1)."""
    name, version, *_ = path.stem.split("-")
    return name, int(version.removeprefix("v"))


def decoded(path: Path) -> tuple[dict[str, Any], Recorded]:
    payload = path.read_bytes()
    raw: dict[str, Any] = json.loads(payload)
    return raw, codec.decode(1, raw["subject"], payload)


def unset(value: Any, raw: Any, path: str = "$") -> list[str]:
    """Where in a recorded value a field of a struct is missing, empty or null."""
    if isinstance(value, msgspec.Struct):
        fields = {f: f"{path}.{f}" for f in value.__struct_fields__}
        gone = [where for f, where in fields.items() if raw.get(f) in (None, "", [], {})]
        return gone + [u for f, where in fields.items() if f in raw for u in unset(getattr(value, f), raw[f], where)]
    if isinstance(value, dict):
        return [u for k, v in value.items() for u in unset(v, raw[k], f"{path}.{k}")]
    if isinstance(value, list | tuple):
        return [u for i, v in enumerate(value) if isinstance(raw, list) for u in unset(v, raw[i], f"{path}[{i}]")]
    return []


def declared(type_: Any, seen: set[type]) -> set[type]:
    """Every struct that can stand in ``type_``."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct) and type_ not in seen:
        seen.add(type_)
        for field in msgspec.structs.fields(type_):
            declared(field.type, seen)
    for inner in get_args(type_):
        declared(inner, seen)
    return seen


def used(value: Any, seen: set[type]) -> set[type]:
    """Every struct that does stand in a value."""
    inner: list[Any] = []
    if isinstance(value, msgspec.Struct):
        seen.add(type(value))
        inner = [getattr(value, f) for f in value.__struct_fields__]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    for item in inner:
        used(item, seen)
    return seen


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recorded_payload_is_read_and_says_the_same_when_written_again(path: Path) -> None:
    raw, event = decoded(path)
    type_, version = version_of(path)
    assert (raw["type"], raw["schemaversion"]) == (type_, version)
    assert isinstance(event.data, Data)
    assert type_ == event.data.TYPE
    if version == CURRENT[type_]:
        assert codec.canonical(event.data) == codec.canonical(raw["data"])
    assert msgspec.json.encode(event.envelope) == event.payload


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_a_golden_payload_every_field_is_set(path: Path) -> None:
    raw, event = decoded(path)
    if version_of(path)[1] == CURRENT[event.envelope.type]:
        assert unset(event.data, raw["data"]) == []


def test_every_version_that_a_log_can_hold_has_a_golden_payload() -> None:
    assert {version_of(p) for p in FILES} >= set(TYPES) | {(u.type, u.old) for u in STEPS}


def test_every_struct_that_an_event_can_hold_stands_in_a_golden_payload() -> None:
    wanted: set[type] = set()
    for type_ in TYPES.values():
        declared(type_, wanted)
    seen: set[type] = set()
    for path in FILES:
        used(decoded(path)[1].data, seen)
    assert wanted <= seen
