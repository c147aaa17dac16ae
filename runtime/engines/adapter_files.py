"""Where adapters lie for servers that read them by path: whole or not at all, in folders named for their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from bascule.runtime.engines.refusals import PUBLISH
from bascule.schemas.errors import EngineError


class AdapterFiles:
    """Copies of adapters' files.

    Args:
        folder: holds one folder for each adapter.
        seen_as: its path as the servers see it; empty where it is the same.
    """

    def __init__(self, folder: Path, seen_as: str = "") -> None:
        self.folder = folder.absolute()
        self._seen_as = seen_as.rstrip("/") or str(self.folder)

    def keep(self, name: str, folder: Path) -> tuple[Path, str]:
        """Copy an adapter's files; nothing is done where they are already there.

        Returns:
            Their folder here, and as the servers see it. Other content under the same name is another folder.

        Raises:
            EngineError: the files cannot be read, or not be written.
        """
        try:
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
            digest = hashlib.sha256()
            for file, data in files.items():
                digest.update(f"{file}\0{len(data)}\0".encode() + data)
            target = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{digest.hexdigest()[:16]}"
            if not target.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write(files, target)
        except OSError as error:
            raise EngineError(
                f"The adapter {name!r} in {folder} cannot be copied: {error}.", next_step=PUBLISH
            ) from error
        return target, f"{self._seen_as}/{target.name}"

    def here(self, seen: str) -> Path:
        """The folder that the servers see as ``seen``."""
        return self.folder / seen.rpartition("/")[2]

    def forget(self, path: Path) -> None:
        """Delete a folder of :meth:`keep`; harmless if it is gone."""
        shutil.rmtree(path, ignore_errors=True)

    def _write(self, files: dict[str, bytes], target: Path) -> None:
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".tmp-"))
        try:
            temporary.chmod(0o755)  # a server may be another user's
            for file, data in files.items():
                with (temporary / file).open("wb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
            temporary.rename(target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not target.is_dir():  # else another process was first, with the same content
                raise


def adapter_rank(name: str, folder: Path) -> int:
    """The rank that an adapter's configuration declares.

    Raises:
        EngineError: there is no configuration, or it names none.
    """
    try:
        rank = json.loads((folder / "adapter_config.json").read_bytes())["r"]
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r is {rank!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"The adapter {name!r} in {folder} cannot be read: {error!r}.", next_step=PUBLISH) from error
    return rank
