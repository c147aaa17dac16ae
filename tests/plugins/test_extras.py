"""The command that adds optional packages: pip understands it, and it asks no index for the name bascule."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from bascule.plugins import extras
from bascule.plugins.extras import install_command


def test_in_a_checkout_it_is_this_interpreters_pip_with_the_checkout_and_the_extra() -> None:
    root = Path(__file__).resolve().parents[2]
    assert shlex.split(install_command("rg")) == [sys.executable, "-m", "pip", "install", "-e", f"{root}[rg]"]


def test_outside_of_a_checkout_it_names_no_index_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "bascule" / "plugins" / "extras.py"))
    assert "install 'PATH[rg]', PATH being" in install_command("rg")
