"""Scoring holds the same promises for an ordinary user, who has no rights to give up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import ordinary_user

HERE = Path(__file__).parent


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root; the tests themselves run as an ordinary user here")
def test_programs_and_processes_of_a_scorer_as_an_ordinary_user() -> None:
    files = [str(HERE / name) for name in ("test_scoring_programs.py", "test_privileges.py", "test_canaries.py")]
    with ordinary_user.folder() as home:
        arguments = ["-p", "no:cacheprovider", "--basetemp", str(home / "tests"), *files]
        done = ordinary_user.run([sys.executable, "-m", "pytest", *arguments], home=home, seconds=3600)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
