"""What runs in an episode's process: the harness, and its ends of the channel.

Loaded by path in the zygote as the module ``bascule_harness``; from there a harness may import :class:`ModelError`,
:class:`ToolError` and :class:`Completion`. ``harness.py`` defines ``solve(example, model, tools, context)``, which
returns the answer as a string, or None. In a batch it may also define ``prepare(data, context)``, which runs once and
before all episodes; what it returns is ``context.prepared`` in each of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, NamedTuple

CHANNEL = 3
READY = b"\1"
# The zygote's own limit: closing what a fork inherits is then cheap everywhere.
OPEN_FILES = 256

Files = dict[str, tuple[str, CodeType | None]]


class ModelError(Exception):
    """The model refused a request."""


class ToolError(Exception):
    """A tool failed, or there is none of that name."""


class Completion(NamedTuple):
    """One sampled continuation; ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    finish_reason: str


class Channel:
    """Length-prefixed JSON to and from the runtime: 4 bytes, big-endian, then the object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = text.encode("utf-8", "replace")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._descriptor, data) :]

    def receive(self) -> Any:
        return json.loads(self._exactly(int.from_bytes(self._exactly(4), "big")))

    def ask(self, message: dict[str, Any], error: type[Exception]) -> Any:
        with self._lock:
            self.send(message)
            reply = self.receive()
        if "error" in reply:
            raise error(reply["error"])
        return reply["result"]

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._descriptor, size - len(data))
            if not part:
                os._exit(1)
            data += part
        return bytes(data)


class Model:
    """The model that the episode samples from."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> list[Completion]:
        """Sample replies to chat messages (``role`` and ``content``).

        Options: ``n`` samples (1), ``max_tokens``, ``stop`` strings, ``temperature``; the last three default to the
        episode's own.

        Raises:
            ModelError: the request was refused.
        """
        return self._ask({"op": "chat", "messages": list(messages)}, **options)

    def complete(self, prompt: str, **options: Any) -> list[Completion]:
        """Sample continuations of a raw text; options and errors as in :meth:`chat`."""
        return self._ask({"op": "complete", "prompt": prompt}, **options)

    def _ask(
        self,
        request: dict[str, Any],
        *,
        n: int = 1,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        temperature: float | None = None,
    ) -> list[Completion]:
        stops = [stop] if isinstance(stop, str) else list(stop)
        request.update(n=n, max_tokens=max_tokens, stop=stops, temperature=temperature)
        return [Completion(text, reason) for text, reason in self._channel.ask(request, ModelError)]


class Tools:
    """The tools that the manifest names and the task offers."""

    def __init__(self, channel: Channel, names: Sequence[str]) -> None:
        self._channel = channel
        self.names = tuple(names)

    def call(self, name: str, /, **arguments: Any) -> str:
        """Call a tool with JSON values.

        Raises:
            ToolError: the tool failed, or there is none of that name.
        """
        return str(self._channel.ask({"op": "tool", "name": name, "arguments": arguments}, ToolError))


class Context:
    """What the harness may know of its episode: its own files and parameters, a seed, and what was prepared."""

    def __init__(self, channel: Channel, files: Files, seed: int, prepared: Any = None) -> None:
        self._channel = channel
        self._files = files
        self.seed = seed
        self.prepared = prepared
        self.system_prompt = self.file("system_prompt.md")
        self.params: dict[str, Any] = json.loads(self.file("manifest.json")).get("params", {})

    def file(self, name: str) -> str:
        """The text of a file of the harness.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        if name not in self._files:
            raise FileNotFoundError(f"The harness has no file {name!r}.")
        return self._files[name][0]

    def note(self, text: str) -> None:
        """Record an intermediate output."""
        self._channel.send({"op": "note", "text": str(text)})


class HarnessImporter:
    """Imports a harness's modules from memory; they come before the standard library, as beside a script."""

    def __init__(self, files: Files) -> None:
        self._files = files
        for name in files:
            sys.modules.pop(name.split("/")[0].removesuffix(".py"), None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        stem = name.replace(".", "/")
        for where, package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
            if where in self._files:
                return ModuleSpec(name, self, origin=where, is_package=package)  # type: ignore[arg-type]
        if any(file.startswith(f"{stem}/") and file.endswith(".py") for file in self._files):
            return ModuleSpec(name, None, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        where = str(module.__spec__.origin) if module.__spec__ else ""
        source, code = self._files[where]
        exec(code or compile(source, where, "exec", dont_inherit=True), module.__dict__)  # noqa: S102

    def get_source(self, name: str) -> str:
        spec = self.find_spec(name)
        return self._files[str(spec.origin)][0] if spec else ""


def compiled(files: dict[str, str]) -> Files:
    """Compile the modules of a harness. One that does not compile is left to the episode, where it is an exception."""
    out: Files = {}
    for name, text in files.items():
        code = None
        if name.endswith(".py"):
            with contextlib.suppress(Exception):
                code = compile(text, name, "exec", dont_inherit=True)
        out[name] = (text, code)
    return out


def settle_in(channel: int, output: int) -> None:
    """Give a forked process a session and the descriptors of an episode.

    Args:
        channel: descriptor of the channel; becomes :data:`CHANNEL`.
        output: descriptor that becomes stdout and stderr.
    """
    # In a batch without process namespaces, all stay in one group, by which they can be killed.
    with contextlib.suppress(PermissionError):
        os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(channel, CHANNEL, inheritable=False)
    # The zygote's control socket keeps the number that it had in the runtime, which may be above the zygote's limit.
    os.closerange(CHANNEL + 1, 2**20)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(2, all_threads=False)


def live_in(folder: str, paths: Sequence[str]) -> None:
    """Make a folder the process's home and temporary folder, and look for packages in ``paths``."""
    os.environ.update(HOME=folder, TMPDIR=folder)
    sys.path.extend(path for path in paths if path not in sys.path)
    gc.enable()


def print_own(e: BaseException) -> None:
    """Print a traceback on stderr with the harness's frames only: ours say where bascule lies, and nothing else."""
    report = traceback.TracebackException.from_exception(e)
    own = [frame for frame in report.stack if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    report.stack = traceback.StackSummary.from_list(own)
    print("".join(report.format()), file=sys.stderr)


def prepare(files: Files, left: Callable[[], str]) -> tuple[bool, Any]:
    """Run ``prepare`` of a harness in this process, and say on the channel when it is done.

    Args:
        left: names what still runs that it has started; empty if there is nothing. Whatever runs on would see what
            episodes write, and a thread is in none of the processes that are forked.

    Returns:
        Whether it came to its end, and what it returned: None where the harness has none. What went wrong is on stderr.
    """
    try:
        channel = Channel(CHANNEL)
        opening = channel.receive()
        random.seed(opening["seed"])
        sys.meta_path.insert(0, HarnessImporter(files))
        made = getattr(importlib.import_module("harness"), "prepare", None)
        prepared = made(opening["data"], Context(channel, files, opening["seed"])) if callable(made) else None
        if running := left():
            raise RuntimeError(f"prepare left {running} behind: end what it starts before it returns")
        sys.stdout.flush()
        sys.stderr.flush()
        channel.send({"op": "prepared"})
    except BaseException as e:
        print_own(e)
        return False, None
    return True, prepared


def play(files: Files, prepared: Any = None) -> int:
    """Run one episode in this process.

    Returns:
        The exit status: 0 if an answer was sent, 1 after an exception, whose traceback is then on stderr.
    """
    try:
        channel = Channel(CHANNEL)
        opening = channel.receive()
        random.seed(opening["seed"])
        if not any(isinstance(finder, HarnessImporter) for finder in sys.meta_path):
            sys.meta_path.insert(0, HarnessImporter(files))
        solve = getattr(importlib.import_module("harness"), "solve", None)
        if not callable(solve):
            raise TypeError("harness.py defines no solve(example, model, tools, context)")
        context = Context(channel, files, opening["seed"], prepared)
        answer = solve(opening["example"], Model(channel), Tools(channel, opening["tools"]), context)
        text = str(answer) if isinstance(answer, str) else None
        channel.send({"op": "answer", "answer": text, "type": type(answer).__name__[:100]})
    except BaseException as e:
        print_own(e)
        return 1
    return 0
