"""What root is promised, an ordinary user is promised as well."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import ordinary_user

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an ordinary user runs these tests as they are")
def test_all_of_it_holds_for_an_ordinary_user() -> None:
    with ordinary_user.folder() as home:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--basetemp", str(home / "tests")]
        ran = ordinary_user.run(
            [*command, *(str(HERE / name) for name in ("test_front.py", "test_programs.py", "test_probe.py"))],
            home=home,
            seconds=3600,
        )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
