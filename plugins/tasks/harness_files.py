"""The files of a first harness: the general reference code with a task's prompt and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bascule.schemas.harness import HarnessManifest

#: Fields that every manifest shows.
ALWAYS = ("name", "timeout_seconds", "max_model_calls", "max_tool_calls", "max_output_bytes", "tools", "params")
REFERENCE = Path(__file__).with_name("reference_harness.py")


def manifest_text(manifest: HarnessManifest) -> str:
    """``manifest.json`` with sorted parameters, so that equal manifests have equal bytes."""
    ordered = msgspec.to_builtins(manifest, order="sorted")
    # Harnesses of recorded runs are known by their bytes: what came later is left out where it is as it was then.
    usual = msgspec.to_builtins(HarnessManifest(name=""))
    ordered = {k: v for k, v in ordered.items() if k in ALWAYS or v != usual[k]}
    return msgspec.json.format(msgspec.json.encode(ordered, order="sorted"), indent=2).decode() + "\n"


def reference_files(*, name: str, system_prompt: str, params: dict[str, Any]) -> dict[str, str]:
    """The harness directory of ``reference_harness.py`` under ``params``; see that module for what they mean."""
    return {
        "harness.py": REFERENCE.read_text(encoding="utf-8"),
        "manifest.json": manifest_text(HarnessManifest(name=name, params=params)),
        "system_prompt.md": system_prompt.strip() + "\n",
    }
