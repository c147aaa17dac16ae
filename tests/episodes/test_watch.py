"""What is watched from outside, and that everybody's folder has its turn."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bascule.runtime.episodes import watch
from bascule.runtime.episodes.confinement import GUEST_DISK, GUEST_PROCESSES
from bascule.runtime.episodes.episode import Limits
from bascule.verifiers.sandbox.confine import seal

ROOMY = 1 << 50


def test_only_what_nothing_else_bounds_is_watched() -> None:
    limits = Limits()
    bare = watch.bounds(limits, (seal.LANDLOCK, seal.SECCOMP), "/where")
    assert (bare.processes, bare.folder, bare.disk) == (limits.processes, "/where", limits.disk_bytes)
    counted = watch.bounds(limits, (seal.UID, seal.LANDLOCK), "/where")
    assert (counted.processes, counted.folder) == (None, "/where")
    rooted = watch.bounds(limits, (seal.USER, seal.ROOT), "/where")
    assert (rooted.processes, rooted.folder, rooted.memory) == (None, None, limits.memory_bytes)


def test_a_guest_has_room_for_what_its_episodes_may_use() -> None:
    limits = Limits()
    guest = watch.bounds(limits, (), "/guest", guest=True)
    both = watch.together(guest, *[watch.bounds(limits, (), "/guest/episodes/1")] * 2)
    assert both.memory == 3 * limits.memory_bytes
    assert both.disk == (GUEST_DISK + 2) * limits.disk_bytes
    assert (both.processes, both.folder) == (limits.processes + GUEST_PROCESSES, "/guest")


def test_threads_count_as_processes_do() -> None:
    leave = threading.Event()
    threads = [threading.Thread(target=leave.wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    try:
        found, _ = watch.over({os.getpid(): watch.Bounds(memory=ROOMY, processes=20)}, (), fronted=True)
    finally:
        leave.set()
        for thread in threads:
            thread.join()
    assert found == {os.getpid(): "processes"}


def test_an_orphan_is_known_by_its_group_where_it_can_leave_its_parent() -> None:
    """The one that watches takes it in here, as the zygote does where an episode refuses its orphans."""
    program = "import os, sys, time; os.fork() and os._exit(0); print(os.getpid(), flush=True); time.sleep(1000)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as first:
        assert first.stdout is not None
        orphan = int(first.stdout.readline())
        try:
            # It has ended and is not waited for: the number still names the group.
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
            bounds = {first.pid: watch.Bounds(memory=ROOMY, processes=1)}
            assert watch.over(bounds, (), fronted=False)[0] == {first.pid: "processes"}
            assert watch.over(bounds, (), fronted=True)[0] == {}
        finally:
            os.kill(orphan, 9)


def test_folders_take_turns_where_a_look_at_all_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_DISK_SECONDS", 0.0)
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "file").write_bytes(bytes(1 << 16))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        watched = {
            other.pid: watch.Bounds(memory=ROOMY, folder=str(empty), disk=1 << 12),
            os.getpid(): watch.Bounds(memory=ROOMY, folder=str(full), disk=1 << 12),
        }
        first, due = watch.over(watched, (), fronted=True)
        second, rest = watch.over(watched, due, fronted=True)
        other.kill()
    assert (first, due, second, rest) == ({}, [os.getpid()], {os.getpid(): "disk"}, [])
