"""Each failure of the operating system has advice of its own."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bascule.runtime.cli.system_errors import next_step
from tests.cli.test_cli import bascule


def raised(work: Callable[[], object]) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        work()
    return caught.value


def test_what_stands_in_the_way_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    says = {
        "A folder stands where a file belongs": tmp_path.read_bytes,
        "A file stands where a folder belongs": (tmp_path / "file" / "inner").read_bytes,
        "Something else stands there": (tmp_path / "file").mkdir,
        "The folder there is not empty": tmp_path.rmdir,
        "Correct the path": (tmp_path / "missing").read_bytes,
        "circle": (tmp_path / "loop").read_bytes,
        "shorter": (tmp_path / ("x" * 5000)).read_bytes,
        "address": lambda: socket.create_connection(("127.0.0.1", 1)),
    }
    for text, work in says.items():
        assert text in (next_step(raised(work)) or "")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.EROFS, "Nothing can be written there"),
        (errno.EACCES, "Give this user the right"),
        (errno.EIO, "The disk failed"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "limits of this user"),
    ],
)
def test_only_a_full_disk_is_to_be_emptied(number: int, says: str) -> None:
    step = next_step(OSError(number, os.strerror(number), "/some/path")) or ""
    assert says in step
    assert ("Free space" in step) == (number in {errno.ENOSPC, errno.EDQUOT})


def test_a_name_that_cannot_be_resolved_is_an_address_that_is_wrong() -> None:
    assert "address" in (next_step(socket.gaierror(socket.EAI_NONAME, "Name or service not known")) or "")


def test_what_nobody_foresaw_has_none() -> None:
    assert next_step(OSError("gone")) is None
    assert next_step(OSError(errno.EXDEV, "Invalid cross-device link")) is None


def test_a_person_is_told_the_path_and_the_step_of_that_case(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    result = bascule(tmp_path / "home", "tasks", "fetch", "gpqa", cache=tmp_path / "cache")
    assert result.returncode == 3
    assert f"'{tmp_path / 'cache'}'. Something else stands there." in result.stderr
    assert "BASCULE_CACHE" in result.stderr
    assert "Free space" not in result.stderr
