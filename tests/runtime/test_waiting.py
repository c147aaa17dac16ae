"""What a service tells of calls that wait."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import structlog

from bascule.plugins.models.attempts import LOGGER
from bascule.runtime.services.waiting import told_of_waiting


def test_what_many_wait_for_is_told_once_and_by_whoever_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    source = logging.getLogger(LOGGER)
    first, second = ExitStack(), ExitStack()
    for service in (first, second):
        service.enter_context(told_of_waiting(structlog.get_logger()))
    for _ in range(75):
        source.warning("m at https://waiting.example: retry 1 of 4")
    first.close()
    source.warning("m at https://waiting.example has not answered yet")
    second.close()
    source.warning("nobody listens")
    said = capsys.readouterr().err
    assert said.count("retry 1 of 4") == 1
    assert said.count("has not answered yet") == 1
    assert "bascule: nobody listens" not in said
