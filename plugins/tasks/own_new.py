"""Writes a task of one's own that works as it stands; nothing that is there is written over."""

from __future__ import annotations

from pathlib import Path

from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.own_template import PARAMS, PROMPT
from bascule.plugins.whole import whole_file, whole_folder
from bascule.schemas.errors import ConfigError

TEMPLATE = Path(__file__).with_name("own_template.py")


def template(name: str) -> str:
    """The text of the template, which names itself ``name``."""
    return TEMPLATE.read_text(encoding="utf-8").replace("THIS_FILE", name)


def write_file(path: Path) -> Path:
    """Write the template to a file, ``.py`` if the path has no other ending.

    Raises:
        ConfigError: there is something already, or it is no Python file's name.
    """
    path = path if path.suffix else path.with_suffix(".py")
    if path.suffix != ".py":
        raise ConfigError(f"{path} is no name of a Python file.", next_step="Let it end in .py, or give --folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path, mode=0o644, replace=False) as file:
            file.write(template(path.name).encode())
    except FileExistsError:
        raise _taken(path) from None
    return path


def write_folder(path: Path) -> Path:
    """Write the template as a folder: ``task.py`` and the files of its first harness.

    Raises:
        ConfigError: there is something already.
    """
    if path.exists() or path.is_symlink():
        raise _taken(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(path) as folder:
            (folder / "task.py").write_text(template(path.name), encoding="utf-8")
            (folder / "harness").mkdir()
            for name, text in reference_files(name="chat", system_prompt=PROMPT, params=PARAMS).items():
                (folder / "harness" / name).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise _taken(path) from None
    return path


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} is there already.", next_step="Choose another path; nothing was written.")
