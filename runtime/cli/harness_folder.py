"""The first harness of a run, as somebody gives it: a folder of text files."""

from __future__ import annotations

from pathlib import Path

from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError, HarnessError
from bascule.schemas.harness import MAX_BYTES, make_harness

_LEFT_OUT = ("__pycache__", ".git")


def harness_in(folder: Path) -> dict[str, str]:
    """The files of a harness, by their names below the folder, checked as those of any harness.

    Raises:
        HarnessError: there is no such folder, a file cannot be read or is no text, or they are no usable harness; names
            the folder and the file.
    """
    if not folder.is_dir():
        raise HarnessError(
            f"There is no folder {folder} to take a harness from.",
            next_step="Give the folder that holds harness.py, manifest.json and system_prompt.md.",
        )
    try:
        return make_harness(_read(folder)).files
    except HarnessError as e:
        raise HarnessError(f"The harness in {folder} is not usable. {e.message}", next_step=e.next_step) from e


def _read(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    size = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part in _LEFT_OUT for part in path.relative_to(folder).parts):
            continue
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            found[name] = data.decode()
        except UnicodeDecodeError as e:
            raise HarnessError(f"{name} is no UTF-8 text: {e}.", next_step="Save it as UTF-8, or remove it.") from e
        except OSError as e:
            raise HarnessError(f"{name} cannot be read: {e.strerror or e}.", next_step="Correct that.") from e
        size += len(name.encode()) + len(data)
        if size > MAX_BYTES:  # a folder that is none may be large
            raise HarnessError(
                f"With {name} it is over {MAX_BYTES} bytes, the limit.",
                next_step="Keep data in the task, not in the harness.",
            )
    return found


def check_harness(world: World) -> None:
    """Refuse a given harness that the run could not begin with.

    Raises:
        HarnessError: it is not usable, or asks for what the task does not allow.
        ConfigError: a file holds what is not recorded: a key, or an item of a restricted task.
    """
    files = world.config.harness
    if not files:
        return
    harness = make_harness(files)
    if (refused := refusal(harness.manifest, world.public)) is not None:
        raise HarnessError(
            f"The harness that the run is to begin with is not usable. {refused}",
            next_step="Correct its manifest.json.",
        )
    for name, text in files.items():
        if world.redaction.text(text, name) != text:
            raise ConfigError(
                f"{name} of the harness holds what looks like a key, which is not recorded.",
                next_step="Take it out; a harness needs no keys.",
            )
        if world.withholding is not None and world.withholding.text(text) != text:
            raise ConfigError(
                f"{name} of the harness quotes an item of the task {world.public.name}, whose items are restricted.",
                next_step="Take it out.",
            )
