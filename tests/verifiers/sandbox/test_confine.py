"""What the code that confines does by itself: folders removed, children found."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from bascule.verifiers.sandbox.confine import seal
from bascule.verifiers.sandbox.confine.removal import remove_tree


def test_a_tree_is_removed_and_what_its_links_name_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("x")
    for place in (root, root / "a", root / "a" / "b"):
        (place / "link").symlink_to(kept)
        (place / "gone").symlink_to("nowhere")
        os.mkfifo(place / "pipe")
    (root / "a" / "b").chmod(0)
    assert remove_tree(str(root))
    assert not root.exists()
    assert (kept / "file").read_text() == "x"


def test_what_is_not_there_cannot_be_removed_and_raises_nothing(tmp_path: Path) -> None:
    assert not remove_tree(str(tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    assert not remove_tree(str(tmp_path / "file"))
    assert (tmp_path / "file").exists()


def test_children_are_found_without_the_kernels_list_of_them_too() -> None:
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    try:
        assert child in seal._children_by_parent()
        assert os.getppid() not in seal._children_by_parent()
        assert child in seal._children()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert child not in seal._children_by_parent()
