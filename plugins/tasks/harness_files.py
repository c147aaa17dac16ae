"""The files of a first harness: the general reference code with a task's prompt and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bascule.schemas.harness import HarnessManifest

REFERENCE = Path(__file__).with_name("reference_harness.py")


def manifest_text(manifest: HarnessManifest) -> str:
    """``manifest.json`` with sorted parameters, so that equal manifests have equal bytes."""
    ordered = msgspec.to_builtins(manifest, order="sorted")
    return msgspec.json.format(msgspec.json.encode(ordered, order="sorted"), indent=2).decode() + "\n"


def reference_files(*, name: str, system_prompt: str, params: dict[str, Any]) -> dict[str, str]:
    """The harness directory of ``reference_harness.py`` under ``params``; see that module for what they mean."""
    return {
        "harness.py": REFERENCE.read_text(encoding="utf-8"),
        "manifest.json": manifest_text(HarnessManifest(name=name, params=params)),
        "system_prompt.md": system_prompt.strip() + "\n",
    }
