"""Installs a plugin as pip would lay it out, in a folder that PYTHONPATH then names."""

from __future__ import annotations

from pathlib import Path


def install_plugin(site: Path, name: str, source: str) -> None:
    """The distribution ``bascule-<name>`` with the module ``bascule_<name>`` behind the entry point ``<name>``."""
    info = site / f"bascule_{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bascule-{name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[bascule.plugins]\n{name} = bascule_{name}\n")
    (site / f"bascule_{name}.py").write_text(source)
