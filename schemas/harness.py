"""The harness: a small directory of files, content-addressed."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from bascule.schemas.errors import HarnessError

MAX_BYTES = 64 * 1024
REQUIRED = ("harness.py", "manifest.json", "system_prompt.md")


class Tunable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a parameter may be: one of ``values``, or a number from ``low`` to ``high``.

    Attributes:
        log: whether the numbers are to be searched on a logarithmic scale.
        integer: whether they are integers.
    """

    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False


class HarnessManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``manifest.json``: what the broker enforces, and the parameters that the harness reads.

    Attributes:
        name: a short name for tables.
        timeout_seconds: wall-clock limit of one episode, model time excluded.
        max_model_calls: samples that one episode may ask the model for.
        max_tool_calls: tool calls that one episode may make.
        max_output_bytes: what the harness may send (answer, notes, prompts) before it is stopped.
        tools: names of the task's tools that the harness may call.
        params: free parameters; levers edit these, ``harness.py`` reads them.
        isolation: ``episode``: a process for each episode. ``batch``: a process that runs ``prepare(data, context)`` of
            ``harness.py`` once, and then forks one for each episode, which finds what it returned in
            ``context.prepared``. A batch is one evaluation, so code of the harness runs in the process that all its
            episodes are forked from: it must leave neither a thread nor a process running, and what it answers may
            depend on every item of the evaluation, not on the one that is asked alone.
        data: what ``prepare`` gets: ``train`` is the task's train items with their answers, without those that are
            asked; otherwise nothing.
        packages: installed distributions that the harness imports.
        prepare_seconds: wall-clock limit of ``prepare``.
        memory_mb, disk_mb, processes: limits of an episode, and of ``prepare``.
        tunable: what the author ``tuner`` may set ``params`` to, by parameter.
    """

    name: str
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 20.0
    max_model_calls: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    max_tool_calls: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 64
    max_output_bytes: Annotated[int, msgspec.Meta(ge=1024, le=16 * 1024 * 1024)] = 256 * 1024
    tools: tuple[str, ...] = ()
    params: dict[str, Any] = {}
    isolation: Literal["episode", "batch"] = "episode"
    data: Literal["none", "train"] = "none"
    packages: tuple[str, ...] = ()
    prepare_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 120.0
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = 1024
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 16
    processes: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    tunable: dict[str, Tunable] = {}


class Harness(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a harness, by relative name, and their digest."""

    files: dict[str, str]
    digest: str

    @property
    def manifest(self) -> HarnessManifest:
        return parse_manifest(self.files["manifest.json"])


def digest_of(files: dict[str, str]) -> str:
    """SHA-256 over the sorted names and contents, each length-prefixed; the first 32 hexadecimal digits."""
    h = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name].encode()):
            h.update(len(part).to_bytes(8, "big"))
            h.update(part)
    return h.hexdigest()[:32]


def parse_manifest(text: str) -> HarnessManifest:
    """Decode ``manifest.json``.

    Raises:
        HarnessError: naming the field that is wrong.
    """
    try:
        return msgspec.json.decode(text, type=HarnessManifest)
    except msgspec.DecodeError as e:
        raise HarnessError(f"manifest.json of the harness is not valid: {e}.", next_step="Correct that field.") from e


def leaves(name: str) -> bool:
    """Whether the name of a file leaves a harness's directory, or may be read as one that does."""
    return name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in name.split("/"))


def make_harness(files: dict[str, str]) -> Harness:
    """Check a harness directory's files and address them by content.

    Raises:
        HarnessError: a required file is missing, a name leaves the directory, the whole is over 64 KiB, the manifest
            is not valid or ``harness.py`` does not parse.
    """
    for name in REQUIRED:
        if name not in files:
            raise HarnessError(f"The harness has no {name}.", next_step=f"It needs {', '.join(REQUIRED)}.")
    for name in files:
        if leaves(name):
            raise HarnessError(
                f"The harness names a file outside its directory: {name!r}.", next_step="Use relative names below it."
            )
    size = sum(len(k.encode()) + len(v.encode()) for k, v in files.items())
    if size > MAX_BYTES:
        raise HarnessError(
            f"The harness is {size} bytes; the limit is {MAX_BYTES}.",
            next_step="Keep data in the task, not in the harness.",
        )
    parse_manifest(files["manifest.json"])
    for name, text in files.items():
        if name.endswith(".py"):
            try:
                compile(text, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as e:
                line = getattr(e, "lineno", None)
                where = f", line {line}" if line else ""
                raise HarnessError(f"{name}{where} of the harness does not parse: {e}.", next_step="Correct it.") from e
            except (RecursionError, MemoryError) as e:  # the compiler's way to say so
                raise HarnessError(
                    f"{name} of the harness does not parse: it is nested too deeply.", next_step="Correct it."
                ) from e
    return Harness(files=dict(sorted(files.items())), digest=digest_of(files))
