"""Files and records whose bytes are no UTF-8 are refused as any other that cannot be read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.runtime.audit.repeats import lines
from bascule.runtime.log.access import read_credentials
from bascule.runtime.log.bucket import Bucket
from bascule.runtime.redaction import Redaction
from bascule.schemas.errors import ConfigError, Corrupt, PluginError
from bascule.schemas.events import RunPaused


def test_credentials(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_bytes(b'{"rollout": {"password": "\xff"}}')
    with pytest.raises(ConfigError, match="holds no credentials"):
        read_credentials(path)


def test_a_line_of_a_service_log_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "services.jsonl"
    good = b'{"event": "update.started", "timestamp": "2026-01-01T00:00:00Z"}\n'
    path.write_bytes(b'{"event": "\xff", "timestamp": "2026-01-01T00:00:00Z"}\n' + good)
    assert [line.event for line in lines(path)] == ["update.started"]


async def test_the_description_of_an_object() -> None:
    about: dict[str, Any] = {
        "name": "r/a",
        "bucket": "b",
        "nuid": "n",
        "size": 1,
        "chunks": 1,
        "digest": "",
        "mtime": "",
    }
    data = msgspec.json.encode(about).replace(b'"r/a"', b'"\xff"')

    class Damaged(Bucket):
        async def _message(self, request: dict[str, Any]) -> dict[str, Any] | None:
            return {"seq": 1, "data": base64.b64encode(data).decode(), "time": "2026-01-01T00:00:00Z"}

    with pytest.raises(Corrupt, match="description of r/a"):
        await Damaged(None).entry("r/a")  # type: ignore[arg-type]


def test_what_a_redactor_leaves() -> None:
    class Breaking:
        name, version = "breaking", "1"

        def redact(self, text: str, key: str | None) -> str:
            return "\ud800"

    with pytest.raises(PluginError, match="left of RunPaused does not fit"):
        Redaction([Breaking()]).value(RunPaused(reason="a"))
