"""Typed secrets: shown nowhere, written nowhere, and refused by name where an event holds one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from bascule.schemas import codec, subjects
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.errors import SchemaError
from bascule.schemas.events import ToolCalled
from bascule.schemas.secret import Secret, secret_path

PRODUCER = Producer(service="test", version="0", hash="0")


def test_a_secret_shows_itself_to_nobody_who_does_not_ask() -> None:
    secret = Secret("hunter22")
    shown = f"{secret} {secret!r} {secret!s} {[secret]} {secret:}"
    assert "hunter22" not in shown
    assert shown.count("[secret]") == 5
    assert secret.reveal() == "hunter22"
    assert secret == Secret("hunter22") != Secret("hunter23")
    assert bool(secret)
    assert not Secret("")


@pytest.mark.parametrize("write", ["json.dumps", "pickle.dumps", "copy.deepcopy", "msgspec.json.encode"])
def test_a_secret_is_not_written_by_anything(write: str) -> None:
    module, function = write.rsplit(".", 1)
    with pytest.raises((TypeError, SchemaError)) as caught:
        getattr(importlib.import_module(module), function)(Secret("hunter22"))
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"key": Secret("x")}, "$.arguments.key"),
        ({"a": [1, {"b": (Secret("x"),)}]}, "$.arguments.a[1].b[0]"),
        ({Secret("x"): 1}, r"$.arguments.[secret]"),
    ],
)
def test_an_event_with_a_secret_is_refused_and_the_place_named(arguments: dict[Any, Any], path: str) -> None:
    data = ToolCalled(session="s", ordinal=0, name="n", arguments=arguments)
    assert secret_path(data) == path
    draft = Draft(subject=subjects.call_outcome("r1", "s", 0), step=0, data=data)
    with pytest.raises(SchemaError) as caught:
        codec.encode(draft, run="r1", producer=PRODUCER, time="t", root=None)
    assert f"holds a secret in {path}," in str(caught.value)


def test_an_event_with_what_is_no_data_is_refused_by_name() -> None:
    data = ToolCalled(session="s", ordinal=0, name="n", arguments={"x": object()})
    draft = Draft(subject=subjects.call_outcome("r1", "s", 0), step=0, data=data)
    with pytest.raises(SchemaError, match=r"bascule\.r1\.call\..* cannot be encoded: .*object"):
        codec.encode(draft, run="r1", producer=PRODUCER, time="t", root=None)
