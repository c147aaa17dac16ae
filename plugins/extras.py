"""The command that adds one of bascule's optional sets of packages to where it is installed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def install_command(extra: str) -> str:
    """The pip command for an extra of ``pyproject.toml``, right in any shell: with this interpreter and this checkout.

    The bare name ``bascule`` is never asked of an index, which may hold something else under it.

    Args:
        extra: its name, as ``rg``.
    """
    root = Path(__file__).resolve().parent.parent
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (root / "pyproject.toml").is_file():
        return f"{pip} -e {shlex.quote(f'{root}[{extra}]')}"
    return f"{pip} 'PATH[{extra}]', PATH being the checkout or the wheel that bascule was installed from"
