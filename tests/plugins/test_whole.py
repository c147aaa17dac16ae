"""Files and folders that appear whole or not at all: seen by readers, by others who write, and after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.plugins.whole import whole_file, whole_folder


def write(path: Path, text: str, *, meanwhile: str | None = None, replace: bool = True) -> None:
    """Write ``text`` to ``path``; before that is over, write ``meanwhile`` to the same, or fail if it is empty."""
    with whole_file(path, replace=replace) as file:
        file.write(text.encode())
        file.flush()
        if meanwhile == "":
            raise KeyError
        if meanwhile is not None:
            write(path, meanwhile, replace=replace)
            assert path.read_text() == meanwhile


def fill(path: Path, name: str, *, meanwhile: str | None = None) -> None:
    """As :func:`write`, of a folder with the file ``name``."""
    with whole_folder(path) as made:
        (made / name).touch()
        if meanwhile == "":
            raise KeyError
        if meanwhile is not None:
            fill(path, meanwhile)


def test_a_file_is_seen_once_it_is_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with whole_file(path) as file:
            file.write(text)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == text
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_files_mode_is_the_one_asked_for_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077 if mode == 0o644 else 0)
    try:
        with whole_file(tmp_path / "file", mode=mode):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("replace", [True, False])
def test_what_raises_leaves_no_file(tmp_path: Path, replace: bool) -> None:
    with pytest.raises(KeyError):
        write(tmp_path / "file", "half", meanwhile="", replace=replace)
    assert os.listdir(tmp_path) == []


def test_what_raises_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        write(tmp_path / "file", "half", meanwhile="")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_of_two_that_write_at_once_the_later_counts_and_they_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "file", "later", meanwhile="first, and longer")
    assert (tmp_path / "file").read_text() == "later"
    assert os.listdir(tmp_path) == ["file"]


def test_what_may_not_replace_leaves_the_first_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", "later", meanwhile="first", replace=False)
    assert (tmp_path / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((os.fstat(fd).st_size, (tmp_path / "file").exists())))
    with whole_file(tmp_path / "file", durable=durable) as file:
        file.write(b"data")
    assert seen == ([(4, False)] if durable else [])


def test_a_killed_writer_leaves_the_file_that_was_there_and_a_hidden_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from bascule.plugins.whole import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    (left,) = (name for name in os.listdir(tmp_path) if name != "file")
    assert (left[0], left[-4:]) == (".", ".tmp")
    write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_is_seen_once_it_is_whole_and_open_to_all(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as made:
        (made / "file").write_text("x")
        assert made.stat().st_mode & 0o777 == 0o700
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "file").read_text() == "x"
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["folder"]


def test_what_raises_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fill(tmp_path / "folder", "file", meanwhile="")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_there_stays_as_does_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        fill(tmp_path / "file", "x")
    with pytest.raises(FileExistsError):
        fill(tmp_path / "folder", "later", meanwhile="first")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "folder") == ["first"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
