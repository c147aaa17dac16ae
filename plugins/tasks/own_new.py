"""Writes a task of one's own that works as it stands; nothing that is there is written over."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.own_template import PARAMS, PROMPT
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
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(template(path.name))
        os.chmod(temporary, 0o644)
        os.link(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    finally:
        os.unlink(temporary)
    return path


def write_folder(path: Path) -> Path:
    """Write the template as a folder: ``task.py`` and the files of its first harness.

    Raises:
        ConfigError: there is something already.
    """
    if path.exists() or path.is_symlink():
        raise _taken(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    try:
        (temporary / "task.py").write_text(template(path.name), encoding="utf-8")
        (temporary / "harness").mkdir()
        for name, text in reference_files(name="chat", system_prompt=PROMPT, params=PARAMS).items():
            (temporary / "harness" / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, path)
    except OSError:
        if path.exists():
            raise _taken(path) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} is there already.", next_step="Choose another path; nothing was written.")
