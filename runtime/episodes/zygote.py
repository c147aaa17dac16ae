"""The zygote: a warm interpreter that forks one process per episode.

A program of its own, which imports nothing of bascule. Arguments: the number of the control socket, the process id of
the parent, a folder, removed at the end, and a mark to know it and all below it by. ``settings.json`` in the folder
holds ``confine``, where the code that confines lies; ``unsafe``, not to use it; ``without``, mechanisms not to use; and
what ``confinement.py`` calls sight.

The control socket carries one JSON object per packet. From the parent: ``harness`` (with a descriptor that holds its
files and what it imports), ``forget``, ``start`` (with the episode's channel and its output pipe), ``kill``. To the
parent: ``ready`` and, for each ``start``, one ``started`` and one ``exit``, sent when no process of that episode is
alive. The zygote ends with its parent and takes every process below it along.

On ``prepare`` (with a channel and an output pipe) it becomes a guest: it confines itself, runs ``prepare`` of a harness
and goes on as before, with code of the harness in its own process. Its episodes are then confined once more.

What an episode leaves behind is found by parentage. The kernel gives orphans to the nearest ancestor that is a
subreaper: each episode's process is one, and so is the zygote. A child of the zygote that is not a running episode is
therefore a remnant of a finished one, whatever session or name it has given itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib.util
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

# What harnesses usually import: loaded once here instead of once per episode.
WARM = "ast collections copy dataclasses datetime decimal enum fractions functools heapq inspect itertools math"
WARM += " operator re statistics string textwrap"

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SWEEP_SECONDS = 0.02
# How long what is over may take to be gone: what ``prepare`` has ended, and at the end of all what was killed.
GONE_SECONDS = 3.0


class Zygote:
    """Forks episodes, and reports the end of each once nothing of it is left."""

    def __init__(
        self,
        control: socket.socket,
        folder: str,
        child: ModuleType,
        confinement: Any,
        remove_tree: Callable[[str], bool],
    ) -> None:
        self._control = control
        self._child = child
        self._remove_tree = remove_tree
        self._folder = folder
        self._confinement = confinement
        self._asked: tuple[Any, ...] | None = None
        self._guest = False
        self._prepared: Any = None
        self._libc = ctypes.CDLL(None)
        self._harnesses: dict[str, Any] = {}
        self._running: dict[int, int] = {}
        self._cleaners: set[int] = set()
        self._ended: list[dict[str, Any]] = []
        self._children: int | None = None
        self._foreign: set[int] = set()
        self._sweeps = 0
        self._closing = False

    def serve(self, parent: int, ready: dict[str, Any]) -> None:
        """Report to be ready, and work until the parent is gone."""
        self._prctl(PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._close())
        self._prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return
        self._report(ready)
        while not self._closing:
            self._serve()
            if self._asked is not None:
                self._become_guest(*self._asked)
        self._end()

    def _serve(self) -> None:
        """Work until the end, or until this process is not the one it was."""
        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        with wake, waker, selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while not self._closing and self._asked is None:
                for key, _ in selector.select(SWEEP_SECONDS if self._ended else None):
                    if key.fileobj is wake:
                        with contextlib.suppress(BlockingIOError):
                            wake.recv(4096)
                    else:
                        self._receive()
                self._reap()
                self._settle()

    def _close(self) -> None:
        self._closing = True

    def _prctl(self, option: int, value: int) -> None:
        self._libc.prctl(option, value, 0, 0, 0)

    def _report(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            self._closing = True

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 65536, 2, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._closing = True
            return
        message = json.loads(data)
        try:
            match message["op"]:
                case "harness":
                    with open(descriptors[0], "rb", closefd=False) as file:
                        file.seek(0)
                        given = json.load(file)
                    self._harnesses[message["digest"]] = self._child.compiled(given["files"]), given
                case "forget":
                    self._harnesses.pop(message["digest"], None)
                case "start":
                    self._start(message, *descriptors)
                case "prepare":
                    # All else that is open here is not for a guest, and closed first.
                    self._asked = (message, *descriptors)
                    descriptors = []
                case "kill":
                    for pid, number in self._running.items():
                        if number == message["number"]:
                            kill_group(pid)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _start(self, message: dict[str, Any], channel: int, output: int) -> None:
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as e:
            self._ended.append({"op": "exit", "number": message["number"], "error": f"fork: {e}"})
            return
        if pid:
            self._running[pid] = message["number"]
            self._report({"op": "started", "number": message["number"], "pid": pid})
            return
        status = 1
        try:
            self._forget_signals()
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != zygote:
                os._exit(1)
            self._child.settle_in(channel, output)
            files, given = self._harnesses[message["digest"]]
            if self._guest:
                folder = self._confinement.enter_again(message["number"], message["limits"], given)
            else:
                folder = self._confinement.enter(message["number"], message["limits"], given, [self._child.CHANNEL])
                if not self._confinement.fronted:
                    # The change of identity took this back.
                    self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    if os.getppid() != zygote:
                        os._exit(1)
            self._child.live_in(folder, self._confinement.paths(given))
            # What fails before this byte is ours, what fails after it the harness's.
            os.write(self._child.CHANNEL, self._child.READY)
            status = self._child.play(files, self._prepared)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            os._exit(status)

    def _become_guest(self, message: dict[str, Any], channel: int, output: int) -> None:
        """Confine this process and run ``prepare`` of a harness in it; without success, end."""
        parent = os.getppid()
        try:
            self._forget_signals()
            # Away from the numbers that the harness knows.
            self._control = socket.socket(fileno=fcntl.fcntl(self._control.detach(), fcntl.F_DUPFD_CLOEXEC, 16))
            channel = fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, 16)
            for descriptor, number in ((output, 1), (output, 2), (channel, self._child.CHANNEL)):
                os.dup2(descriptor, number)
            os.set_inheritable(self._child.CHANNEL, False)
            faulthandler.enable(2, all_threads=False)
            keep = [self._child.CHANNEL, self._control.fileno()]
            tasks = None
            if not self._confinement.fronted:
                # It stays this process, and these can be read where /proc is closed to it.
                tasks = self._look_at_own()
                keep += [descriptor for descriptor in (tasks, self._children) if descriptor is not None]
            files, given = self._harnesses[message["digest"]]
            folder = self._confinement.enter(message["number"], message["limits"], given, keep, guest=True)
            if self._confinement.fronted:
                tasks = self._look_at_own()
            else:
                self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)
            self._child.live_in(folder, self._confinement.paths(given))
            os.write(self._child.CHANNEL, self._child.READY)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        done, self._prepared = self._child.prepare(files, lambda: left_running(tasks))
        if not done:
            # What it left would hold the channel open.
            self._clear()
            os._exit(1)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2, self._child.CHANNEL):
            os.dup2(null, descriptor, inheritable=descriptor < 3)
        self._guest = True
        self._asked = None
        signal.signal(signal.SIGCHLD, lambda *_: None)
        gc.freeze()

    def _look_at_own(self) -> int | None:
        """Open what the kernel tells of this process: its children, and its threads, whose descriptor is returned."""
        tasks = None
        with contextlib.suppress(OSError):
            tasks = descriptor_of("/proc/self/task")
            self._children = descriptor_of(f"/proc/self/task/{os.getpid()}/children")
        return tasks

    def _forget_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            if pid in self._running:
                # Before the wait: until then the number cannot name another group.
                kill_group(pid)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self._cleaners.discard(pid)
            if pid in self._running:
                self._ended.append({"op": "exit", "number": self._running.pop(pid), "status": status})

    def _settle(self) -> None:
        """Report what has ended, once its remnants are dead; where they do not die, the parent gives up waiting."""
        if not self._ended or not self._sweep():
            return
        for report in self._ended:
            self._remove(self._confinement.private(report["number"]))
            self._report(report)
        self._ended.clear()

    def _sweep(self) -> bool:
        """Kill our children that are no running episode. True if there were none."""
        try:
            children = self._listed_children() if self._children is None else told_children(self._children)
        except OSError:
            # A guest in a process namespace that it cannot look into; all of it ends with the guest.
            return True
        remnants = children - self._running.keys() - self._cleaners
        for pid in remnants:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return not remnants

    def _listed_children(self) -> set[int]:
        """Our children but those that are known.

        A process that is not below us never comes below us, so its number is remembered while it is in use. Now and
        then all are forgotten, in case a number was given out again between two sweeps.
        """
        self._sweeps += 1
        if self._sweeps % 256 == 0:
            self._foreign.clear()
        present = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
        self._foreign &= present
        children = set()
        for pid in sorted(present - self._foreign - self._running.keys() - self._cleaners):
            parent = parent_of(pid)
            if parent == os.getpid():
                children.add(pid)
            elif parent == 0 or parent in self._foreign:
                self._foreign.add(pid)
        return children

    def _remove(self, folder: str) -> None:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            # A harness decides how long this takes: not here.
            with contextlib.suppress(OSError):
                pid = os.fork()
                if pid:
                    self._cleaners.add(pid)
                    return
                with contextlib.suppress(BaseException):
                    self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    self._remove_tree(folder)
                os._exit(0)

    def _end(self) -> None:
        for pid in [*self._running, *self._cleaners]:
            kill_group(pid)
        self._running.clear()
        self._cleaners.clear()
        self._clear()
        self._remove_tree(self._folder)

    def _clear(self) -> None:
        """Sweep until nothing is left, or for as long as what was killed may take to be gone."""
        deadline = time.monotonic() + GONE_SECONDS
        while not self._sweep() and time.monotonic() < deadline:
            self._reap()


def kill_group(pid: int) -> None:
    """Kill a child of ours and its process group; the group may not exist yet, or no longer."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def descriptor_of(path: str) -> int:
    """Open for reading, away from the numbers that a harness knows."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 16)
    finally:
        os.close(descriptor)


def told_children(descriptor: int) -> set[int]:
    """Children of a thread, by the kernel's list of them; those that are not waited for yet are among them."""
    return {int(word) for word in os.pread(descriptor, 1 << 16, 0).split()}


def left_running(tasks: int | None) -> str:
    """What runs in and below this process besides its first thread, in words; empty once there is nothing.

    Args:
        tasks: descriptor of the folder of its threads; without, only those that Python has started are seen.
    """
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        threads = threading.active_count()
        if tasks is not None:
            threads = max(threads, len(os.listdir(tasks)))
        what = ["a process"] * has_children() + ["a thread"] * (threads > 1)
        if not what or time.monotonic() > deadline:
            return " and ".join(what)
        time.sleep(SWEEP_SECONDS)


def has_children() -> bool:
    """Whether a child of ours is alive; those that are over are waited for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def parent_of(pid: int) -> int | None:
    """Process id of the parent, None if ``pid`` is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def load(name: str, path: str) -> ModuleType:
    """A module or package that does not lie on the import path."""
    inside = None
    if os.path.isdir(path):
        path, inside = os.path.join(path, "__init__.py"), [path]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    descriptor, parent, folder, _ = sys.argv[1:]
    with open(f"{folder}/settings.json", "rb") as file:
        settings = json.load(file)
    for name in WARM.split():
        importlib.import_module(name)
    warnings.simplefilter("ignore")
    os.umask(0o077)
    here = os.path.dirname(os.path.abspath(__file__))
    child = load("bascule_harness", f"{here}/child.py")
    load("bascule_confine", settings["confine"])
    confine = SimpleNamespace(
        **{
            name: importlib.import_module(f"bascule_confine.{name}")
            for name in ("seal", "landlock", "syscalls", "kernel")
        }
    )
    available = importlib.import_module("bascule_confine.available")
    remove_tree = importlib.import_module("bascule_confine.removal").remove_tree
    found: dict[str, Any] = {"mechanisms": [], "missing": [], "landlock": 0}
    if not settings["unsafe"]:
        found = available.available(tuple(settings["without"]))
    confinement = load("bascule_confinement", f"{here}/confinement.py").Confinement(confine, found, settings, folder)
    resource.setrlimit(resource.RLIMIT_NOFILE, (child.OPEN_FILES, child.OPEN_FILES))
    # Forked processes share the pages of what is here now, as long as no collection writes to them.
    gc.disable()
    gc.freeze()
    ready = {"op": "ready", "mechanisms": found["mechanisms"], "missing": found["missing"]}
    control = socket.socket(fileno=int(descriptor))
    Zygote(control, folder, child, confinement, remove_tree).serve(int(parent), ready)


if __name__ == "__main__":
    main()
