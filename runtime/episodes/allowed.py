"""What a harness may ask for in its manifest: no more than its task allows."""

from __future__ import annotations

import re

from bascule.plugins.task import PublicFace
from bascule.schemas.harness import HarnessManifest


def refusal(manifest: HarnessManifest, public: PublicFace) -> str | None:
    """Why a harness with this manifest must not run on the task, in one sentence; None if it may.

    Pure: the same at the proposal of a harness, at its trial and before its episodes.
    """
    allows = public.allows
    task = f"the task {public.name}" + (f" in its regime {public.regime}" if public.regime else "")
    if manifest.data == "train":
        if not allows.data:
            return f"The harness asks for the train items with their answers; {task} does not give them to harnesses."
        if manifest.isolation != "batch":
            return "The harness asks for the train items, which only prepare gets: set isolation to batch."
    known = {_normalised(name) for name in allows.packages}
    if odd := [name for name in manifest.packages if _normalised(name) not in known]:
        offered = ", ".join(allows.packages) or "none"
        return f"The harness asks for the package {odd[0]!r}; {task} allows {offered}."
    asked = [("memory_mb", "MiB of memory"), ("disk_mb", "MiB of disk")]
    if manifest.isolation == "batch":
        asked.append(("prepare_seconds", "seconds for prepare"))
    for name, what in asked:
        wanted, most = getattr(manifest, name), getattr(allows, name)
        if wanted > most:
            return f"The harness asks for {wanted:g} {what} ({name}); {task} allows {most:g}."
    return None


def _normalised(name: str) -> str:
    """A distribution's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
