"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _no_log_output() -> Iterator[None]:
    """Service logs of in-process runs stay out of the test report."""
    with structlog.testing.capture_logs():
        yield
