"""The harness of ``sia-dir``: runs a SIA directory's own agent, unchanged, and hands in the files that it leaves.

The agent gets what SIA gives it: ``--dataset_dir`` with the public files and ``--working_dir``. Its model calls go to
the episode's model (``sdk.py``). There are no keys: names such as ``OPENAI_API_KEY`` that it looks for are set to a
text that says so. Parameters: ``entry`` and ``files`` of the agent in this harness; ``submission``, ``fields`` and
``compress`` of what is handed in; ``longest_pause``, seconds: pauses for rate limits that do not exist here are cut to
that.
"""

from __future__ import annotations

import asyncio
import base64
import builtins
import os
import re
import runpy
import sys
import tempfile
import time
import traceback
from typing import Any

NO_KEY = "none-in-the-sandbox"
_KEYS = re.compile(r"\b[A-Z][A-Z0-9_]*_API_KEY\b")


def lay_out(root: str, public: list[dict[str, str]], context: Any, names: list[str]) -> tuple[str, str, str]:
    """Write the public files and the agent's; returns the folders of data, work and agent."""
    data, work, agent = (os.path.join(root, *parts) for parts in (("data", "public"), ("gen",), ("agent",)))
    for folder in (data, work, agent):
        os.makedirs(folder)
    for file in public:
        content = base64.b64decode(file["base64"]) if "base64" in file else file["text"].encode()
        _write(data, file["name"], content)
    for name in names:
        _write(root, name, context.file(name).encode())
    return data, work, agent


def _write(folder: str, name: str, content: bytes) -> None:
    path = os.path.join(folder, *name.split("/"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def shorten_pauses(longest: float) -> None:
    """Cut every pause to ``longest`` seconds."""
    sleep, later = time.sleep, asyncio.sleep

    def short(seconds: float) -> None:
        sleep(min(seconds, longest))

    async def short_later(delay: float, result: Any = None) -> Any:
        return await later(min(delay, longest), result)

    time.sleep, asyncio.sleep = short, short_later  # type: ignore[assignment]


def run(path: str, arguments: list[str], folder: str) -> str:
    """Run a program in this process as Python would; returns how it ended."""
    # This interpreter starts without ``site``, which would define them.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    os.chdir(folder)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return f"it exited with {e.code if isinstance(e.code, int) else int(e.code is not None)}"
    except Exception as e:
        traceback.print_exc()
        return f"it raised {type(e).__name__}"
    return "it exited with 0"


def solve(example: dict[str, Any], model: Any, tools: Any, context: Any) -> str:
    """Run the agent on the whole task."""
    import sdk  # type: ignore[import-not-found]
    import submission  # type: ignore[import-not-found]

    del tools
    params = context.params
    data, work, _ = lay_out(tempfile.mkdtemp(), example["files"], context, params["files"])
    for name in set(_KEYS.findall("".join(map(context.file, params["files"])))):
        os.environ.setdefault(name, NO_KEY)
    sdk.install(model.chat)
    shorten_pauses(params.get("longest_pause", 0.05))
    entry = os.path.join(os.path.dirname(work), *params["entry"].split("/"))
    ended = run(entry, ["--dataset_dir", data, "--working_dir", work], work)
    patterns = params.get("submission") or submission.PATTERNS
    files = submission.collect(work, patterns)
    if not files:
        raise RuntimeError(f"The agent left no submission; {ended}. Looked for: {', '.join(patterns)}.")
    if not params.get("submission"):
        # Agents name these by the time; equal answers are to be equal texts.
        files = {("results/submission.json" if n.startswith("results/") else n): text for n, text in files.items()}
    context.note(f"The agent is done: {ended}. It handed in {', '.join(files)}.")
    answer: str = submission.pack(files, params.get("fields", ()), compress=params.get("compress", True))
    return answer
