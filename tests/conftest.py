"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import settings

from tests import oracles

# A busy machine is no failure.
settings.register_profile("bascule", deadline=None)
settings.load_profile("bascule")


@pytest.fixture(autouse=True)
def _no_log_output() -> Iterator[None]:
    """Service logs of in-process runs stay out of the test report."""
    with structlog.testing.capture_logs():
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over the deviations that its tests saw."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deviations"] = oracles.seen()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    oracles.take(getattr(node, "workeroutput", {}).get("deviations", ()))  # none of a worker that died


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How far figures were from their oracles."""
    if lines := oracles.table():
        terminalreporter.section("deviations from oracles")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, here and in processes that are started; a shell lets what it starts behind it ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
