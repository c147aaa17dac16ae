"""Reads a task of one's own: a Python file, or a folder with ``task.py``, and checks it before anything is spent.

What the file may define is said in :mod:`bascule.plugins.tasks.own`. Its code runs where it is loaded: in the runtime
and in the scoring process, never in the sandbox.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec

from bascule.plugins.task import Allows, Example
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
MOST_BYTES = 64 * 1024 * 1024
HINT = "`bascule tasks new PATH` writes a file that works."
#: Seconds that one call of the file's code may take while the task is loaded.
LOAD_SECONDS = 120.0
_LEFT_OUT = ("__pycache__", ".git")
T = TypeVar("T")


class _TooLong(BaseException):
    """The file's code took too long; nothing but :func:`called` may catch it."""


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One item with its answer.

    Attributes:
        answer: the truth, of any JSON form; of a train item also what a perfect agent would say.
    """

    id: str
    group: str
    input: dict[str, Any]
    answer: Any

    def plain(self) -> dict[str, Any]:
        """The item as the functions of the file get it."""
        return {"id": self.id, "input": self.input, "answer": self.answer, **self.input}

    def example(self) -> Example:
        return Example(id=self.id, group=self.group, input=self.input)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A file or folder as it was read.

    Attributes:
        sha256: of all its files' names and contents.
        module: the namespace of its code.
        items: by split; ``regression`` is empty where there is none.
        harness: files of the first harness; empty if the general one is to be used.
    """

    path: Path
    sha256: str
    description: str
    module: Any
    items: dict[Split, tuple[Item, ...]]
    harness: dict[str, str]
    allows: Allows


def code_file(path: Path) -> Path:
    """The file with the code: the path itself, or ``task.py`` in the folder.

    Raises:
        ConfigError: there is none.
    """
    file = path / "task.py" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"There is no task at {path}: {file} is no file.", next_step=HINT)
    return file


def digest(path: Path) -> str:
    """SHA-256 over the names and contents of the file, or of all files of the folder but caches.

    Raises:
        ConfigError: there is no task, or it is over 64 MiB.
    """
    code = code_file(path)
    files = [code]
    if path.is_dir():
        files = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part in _LEFT_OUT for part in p.relative_to(path).parts)
        )
    if sum(p.stat().st_size for p in files) > MOST_BYTES:
        raise ConfigError(f"The task {path} is over {MOST_BYTES} bytes.", next_step="Put large data elsewhere.")
    h = hashlib.sha256()
    for file in files:
        name, data = str(file.relative_to(code.parent)).encode(), file.read_bytes()
        h.update(len(name).to_bytes(8, "big") + name + len(data).to_bytes(8, "big") + data)
    return h.hexdigest()


def read(path: Path) -> Source:
    """Load and check a task.

    Raises:
        ConfigError: says in one paragraph what is wrong and where.
    """
    return _read(path, digest(path))


@lru_cache(maxsize=8)
def _read(path: Path, sha256: str) -> Source:
    file = code_file(path)
    module = _run(file)
    if not callable(getattr(module, "verify", None)):
        raise wrong(file, "defines no function verify(item, answer)")
    description = getattr(module, "DESCRIPTION", None)
    if path.is_dir() and description is None and (path / "description.md").is_file():
        description = (path / "description.md").read_text(encoding="utf-8")
    if not isinstance(description, str) or not description.strip():
        raise wrong(file, "has no DESCRIPTION, a text that says what is asked for")
    items = {split: _items(path, file, module, split) for split in SPLITS}
    items["regression"] = _regression(path, file, module)
    _disjoint(file, items)
    return Source(
        path=path,
        sha256=sha256,
        description=description.strip(),
        module=module,
        items=items,
        harness=_harness(path, file, module),
        allows=_allows(file, module),
    )


def _run(file: Path) -> ModuleType:
    """The namespace after the file's code has run."""
    module = ModuleType(f"bascule_own_task_{file.stem}")
    module.__file__ = str(file)
    try:
        source = file.read_text(encoding="utf-8")
        code = compile(source, str(file), "exec", dont_inherit=True)
    except SyntaxError as e:
        raise wrong(file, f"does not parse: {e.msg}", e.lineno) from e
    except (UnicodeDecodeError, ValueError) as e:
        raise wrong(file, f"is no Python text: {e}") from e
    # A dataclass of the file looks its module up by name.
    sys.modules[module.__name__] = module
    called(file, "when it is loaded", lambda: exec(code, module.__dict__))  # noqa: S102
    return module


def called(file: Path, what: str, work: Callable[[], T]) -> T:
    """What ``work``, a call of the file's code, gives; in the main thread it is bounded by ``LOAD_SECONDS``.

    The call stays in the caller's thread, since what it makes (a connection to a database) may be tied to that.

    Args:
        what: says which call it is, after ``fails`` or ``is not done``: ``in items('train')``.

    Raises:
        ConfigError: it fails, ends the process or takes too long; names the file's line that was under way.
    """
    bounded = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _too_long) if bounded else None
    left = signal.setitimer(signal.ITIMER_REAL, LOAD_SECONDS)[0] if bounded else 0.0
    try:
        try:
            return work()
        finally:
            if bounded:
                signal.setitimer(signal.ITIMER_REAL, left)
                signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
    except _TooLong as e:
        raise wrong(file, f"is not done after {LOAD_SECONDS:g} s {what}", _line(file, e)) from None
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        raise failed(file, f"fails {what}", e) from e


def _too_long(*_: object) -> None:
    raise _TooLong


def _items(path: Path, file: Path, module: ModuleType, split: Split) -> tuple[Item, ...]:
    listed = path / f"{split}.jsonl"
    if callable(getattr(module, "items", None)):
        given = called(file, f"in items({split!r})", lambda: list(module.items(split)))
    elif path.is_dir() and listed.is_file():
        given = _listed(listed)
    else:
        more = f", and there is no {listed}" if path.is_dir() else ""
        raise wrong(file, f"defines no function items(split){more}")
    if not given:
        raise wrong(file, f"has no items in the split {split}")
    return tuple(_item(file, split, number, one) for number, one in enumerate(given))


def _regression(path: Path, file: Path, module: ModuleType) -> tuple[Item, ...]:
    """The items of ``REGRESSION`` or of the folder's ``regression.jsonl``; none where there is neither."""
    listed = path / "regression.jsonl"
    given = getattr(module, "REGRESSION", None)
    if given is None:
        given = _listed(listed) if path.is_dir() and listed.is_file() else []
    if not isinstance(given, list | tuple):
        raise wrong(file, f"has a REGRESSION that is {type(given).__name__}, not a list of items")
    return tuple(_item(file, "regression", number, one) for number, one in enumerate(given))


def _listed(listed: Path) -> list[Any]:
    given = []
    for number, text in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        try:
            given += [msgspec.json.decode(text)] if text.strip() else []
        except msgspec.DecodeError as e:
            raise wrong(listed, f"is no JSON object: {e}", number) from e
    return given


def _item(file: Path, split: Split, number: int, given: Any) -> Item:
    what = f"item {number} of {split}"
    if not isinstance(given, Mapping):
        raise wrong(file, f"gives {what} as {type(given).__name__}, not as a dict")
    inputs = given.get("input", {"question": given["question"]} if "question" in given else None)
    identity = given.get("id", f"{split}-{number}")
    if not isinstance(inputs, Mapping) or not inputs:
        raise wrong(file, f"gives {what} neither a question nor a dict input")
    if not isinstance(identity, str) or not identity:
        raise wrong(file, f"gives {what} the id {identity!r}, which is no text")
    if given.get("answer") is None:
        raise wrong(file, f"gives {what} no answer")
    unknown = sorted(set(given) - {"id", "group", "question", "input", "answer"})
    if unknown:
        raise wrong(file, f"gives {what} the unknown field {unknown[0]!r}; what agents may see belongs into input")
    try:
        plain = msgspec.json.decode(msgspec.json.encode((inputs, given["answer"])))
    except (TypeError, ValueError) as e:
        raise wrong(file, f"gives {what} something that JSON cannot hold: {e}") from e
    return Item(id=identity, group=str(given.get("group", identity)), input=plain[0], answer=plain[1])


def _disjoint(file: Path, items: Mapping[Split, tuple[Item, ...]]) -> None:
    seen: dict[str, Split] = {}
    groups: dict[str, Split] = {}
    for split, found in items.items():
        for item in found:
            if item.id in seen:
                raise wrong(file, f"has two items with the id {item.id!r}, in {seen[item.id]} and {split}")
            seen[item.id] = split
            if groups.setdefault(item.group, split) != split:
                where = f"{groups[item.group]} and {split}"
                raise wrong(file, f"has items of the group {item.group!r} in {where}; a group stays in one split")


def _harness(path: Path, file: Path, module: ModuleType) -> dict[str, str]:
    given = getattr(module, "HARNESS", None)
    if given is None and path.is_dir() and (path / "harness").is_dir():
        folder = path / "harness"
        files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in files}
    return {} if given is None else _converted(file, "HARNESS", given, dict[str, str])


def _allows(file: Path, module: ModuleType) -> Allows:
    given = getattr(module, "ALLOWS", {})
    unknown = sorted(map(str, set(given) - set(Allows.__struct_fields__))) if isinstance(given, Mapping) else []
    if unknown:
        known = ", ".join(Allows.__struct_fields__)
        raise wrong(file, f"has an ALLOWS with the unknown field {unknown[0]!r}; it has {known}")
    allows: Allows = _converted(file, "ALLOWS", given, Allows)
    for name in ("memory_mb", "disk_mb", "prepare_seconds"):
        if not getattr(allows, name) > 0:
            raise wrong(file, f"has an ALLOWS whose {name} is {getattr(allows, name):g}, which is not over 0")
    return allows


def _converted(file: Path, name: str, given: Any, type_: Any) -> Any:
    try:
        return msgspec.convert(given, type_)
    except msgspec.ValidationError as e:
        raise wrong(file, f"has a {name} of another form than is expected: {e}") from e


def wrong(file: Path, what: str, line: int | None = None) -> ConfigError:
    """The error that says what is wrong with the file, and at which of its lines."""
    where = f"{file}, line {line}," if line else str(file)
    return ConfigError(f"The task {where} {what.rstrip('.')}.", next_step=f"Correct it; {HINT}")


def failed(file: Path, what: str, error: BaseException) -> ConfigError:
    """The error that says how a call of the file's code failed, and at which of its lines."""
    text = " ".join(str(error).split())[:300]
    return wrong(file, f"{what}: {type(error).__name__}: {text}".rstrip(" :"), _line(file, error))


def _line(file: Path, error: BaseException) -> int | None:
    """The file's own line that was under way."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return lines[-1] if lines else None
