"""A SIA task directory as it lies on the disk: what it must hold, what it is, and what may be seen of it.

``data/public`` (with ``task.md``, and ``evaluate.py`` if it has one) is for agents, ``data/private`` for the scoring
process alone, ``reference/reference_target_agent.py`` is the first agent. Nothing in it is changed, and none of its
code runs outside the sandbox.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from bascule.schemas.errors import ConfigError

#: What all public files, or all private ones, may be long together, bytes.
MAX_BYTES = 32 * 1024 * 1024
#: ``letters``: multiple choice; ``moves``: chess; ``table``: rows with an id and a label; ``""``: none that is known.
Form = Literal["letters", "moves", "table", ""]
EVALUATOR = "evaluate.py"
ENTRY = "reference_target_agent.py"
_LEFT_OUT = ("__pycache__", ".git", ".DS_Store")
#: Not among the items that must not be published.
_NO_ITEMS = (".py", ".md")


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What submissions of a directory look like, as far as the public files say.

    Attributes:
        ids: what is asked, in order; texts.
        columns: of the id and the label, where the form is ``table``.
        fields: of JSON records that an evaluator reads; empty where that is not known.
    """

    form: Form
    ids: tuple[str, ...] = ()
    columns: tuple[str, str] = ("", "")
    fields: tuple[str, ...] = ()


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """The files of an agent by the names that they get, and which of them is started."""

    files: dict[str, str]
    entry: str


def is_directory_of_sia(path: Path) -> bool:
    """Whether a folder is a SIA task directory."""
    return (path / "data" / "public" / "task.md").is_file()


def checked(path: Path) -> Path:
    """The directory, absolute.

    Raises:
        ConfigError: it is none; says what is missing.
    """
    if not is_directory_of_sia(path):
        raise ConfigError(
            f"{path} is no SIA task directory: it has no data/public/task.md.",
            next_step="Name the folder that holds data/ and reference/; `bascule unpack-sia DIR` writes four of them.",
        )
    return path.resolve()


def files_of(folder: Path) -> dict[str, bytes]:
    """The plain files below a folder, by relative name; caches are left out, and so is what a link leads to.

    Raises:
        ConfigError: they are over 32 MiB together, or one cannot be read.
    """
    found: dict[str, bytes] = {}
    size = 0
    try:
        for file in _plain(folder):
            size += file.stat().st_size
            if size > MAX_BYTES:
                raise ConfigError(
                    f"The files in {folder} are over {MAX_BYTES >> 20} MiB.", next_step="Keep large data out of it."
                )
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    except OSError as e:
        raise ConfigError(f"{folder} cannot be read: {e}.", next_step="Correct its permissions.") from e
    return found


def _plain(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        linked = any((folder / Path(*parts[:n])).is_symlink() for n in range(1, len(parts) + 1))
        if not linked and file.is_file() and not any(part in _LEFT_OUT for part in parts):
            yield file


def digest(path: Path, folders: Sequence[str] = ("data", "reference")) -> str:
    """SHA-256 over the names and contents of a directory's files, as far as they are read."""
    h = hashlib.sha256()
    for folder in folders:
        for file in _plain(path / folder):
            name, data = str(file.relative_to(path)).encode(), file.read_bytes()
            h.update(len(name).to_bytes(8, "big") + name + len(data).to_bytes(8, "big") + data)
    return h.hexdigest()


def public_files(path: Path, beside: str = "") -> dict[str, bytes]:
    """What agents get as ``--dataset_dir``.

    Args:
        beside: a further folder of the directory whose files are laid beside the public ones, which come first.

    Raises:
        ConfigError: ``beside`` is no folder of the directory, or may not be seen; or as :func:`files_of`.
    """
    more: dict[str, bytes] = {}
    if beside:
        folder = (path / beside).resolve()
        private = (path / "data" / "private").resolve()
        if not folder.is_dir() or not folder.is_relative_to(path) or private.is_relative_to(folder):
            raise ConfigError(
                f"{beside} is no folder of {path} without the private files.",
                next_step="Name one such as data/training_data.",
            )
        if folder.is_relative_to(private):
            raise ConfigError(f"{beside} of {path} is private.", next_step="Name a folder that agents may see.")
        more = files_of(folder)
    return {**more, **files_of(path / "data" / "public")}


def shape_of(public: dict[str, bytes]) -> Shape:
    """What submissions look like, by the public files alone. Pure."""
    questions = _records(public.get("diamond_questions.json"))
    if questions and all("id" in q and isinstance(q.get("options"), dict) for q in questions):
        ids = tuple(str(q["id"]) for q in questions)
        return Shape(form="letters", ids=ids, fields=("question_id", "model_answer"))
    problems = _records(public.get("chess_hard.json"))
    if problems and all(isinstance(p.get("question_id"), str) for p in problems):
        return Shape(form="moves", ids=tuple(p["question_id"] for p in problems), fields=("question_id", "solution"))
    rows = table(public.get("sample_submission.csv", b""))
    if rows and len(rows[0]) == 2:
        name, label = rows[0]
        return Shape(form="table", ids=tuple(row[name] for row in rows), columns=(name, label))
    return Shape(form="")


def _records(data: bytes | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(data or b"[]")
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(item, dict) for item in found) else []


def table(data: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is no such file. Missing cells are empty, cells too many left out."""
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        return [{k: v or "" for k, v in row.items() if k is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error):
        return []


def shown(files: dict[str, bytes], *, restricted: bool) -> list[dict[str, str]]:
    """Files as they stand in an example: texts as such, others in base64.

    Where the items must not be published, what quotes one is kept out of what is recorded. The task's description and
    code hold none, and agents quote their lines; so they are given in base64, which nobody quotes.
    """
    out = []
    for name, data in files.items():
        try:
            text = None if restricted and name.endswith(_NO_ITEMS) else data.decode("utf-8")
        except UnicodeDecodeError:
            text = None
        content = {"base64": base64.b64encode(data).decode()} if text is None else {"text": text}
        out.append({"name": name, **content})
    return out


def agent(path: Path, chosen: str | None, entry: str | None) -> Agent:
    """The first agent: the directory's reference, or a file or folder of one's own.

    Args:
        chosen: the path of a file or a folder; None: ``reference/reference_target_agent.py``.
        entry: which file of the folder is started.

    Raises:
        ConfigError: there is none, or a file is no text.
    """
    source = path / "reference" / ENTRY if chosen is None else Path(chosen).expanduser()
    files: dict[str, bytes] = {}
    if source.is_dir():
        files, entry = files_of(source), entry or "main.py"
    elif source.is_file():
        files, entry = {source.name: source.read_bytes()}, source.name
    if entry is None or entry not in files:
        raise ConfigError(
            f"There is no agent at {source}{f': it has no {entry}' if entry else ''}.",
            next_step="Give one with --set task.agent=FILE, or a folder with --set task.entry=NAME beside it.",
        )
    try:
        texts = {f"agent/{name}": data.decode("utf-8") for name, data in files.items()}
    except UnicodeDecodeError as e:
        raise ConfigError(f"The agent {source} has a file that is no UTF-8 text.", next_step="Leave it out.") from e
    return Agent(files=texts, entry=f"agent/{entry}")
