"""What a confined program must not be able to do, each thing tried. A program of its own: the standard library only.

Its argument is a JSON object: ``which`` names a function of this module, the rest is what that needs. It prints one
JSON object: by canary, ``null`` where it succeeded, and otherwise what it met. Everything is bounded, and does no harm
where nothing confines it, since the same program also runs unconfined, to see that the canaries can sing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

_PTRACE_SEIZE, _PTRACE_DETACH = 0x4206, 17
_CLONE_NEWUSER = 0x10000000
_TO_READ_ALL = 0b110
_HELD_SECONDS = 60.0
# Where the kernel counts all processes of a user, those that end meanwhile leave room for as many.
_FORKS = 256
_FORKS_OUTSIDE = 64


class Met(Exception):
    """The canary was stopped without an error of the system."""


def everything(given: dict[str, Any]) -> dict[str, str | None]:
    """All canaries that leave the program as it is."""
    secret, parent, victim = given["secret"], given["parent"], given["victim"]
    tried: dict[str, Callable[[], None]] = {
        "read-planted-secret": lambda: _reads(secret, given["token"]),
        "read-through-symlink": lambda: _through_link(secret, given["token"]),
        "read-through-dots": lambda: _reads("../" * 32 + secret.lstrip("/"), given["token"]),
        "read-through-proc-root": lambda: _through_roots(secret, given["token"], parent),
        "read-parent-environment": lambda: _digest(f"/proc/{parent}/environ", given["environment"]),
        "read-parent-folder": lambda: _same(f"/proc/{parent}/cwd", given["folder"]),
        "read-parent-descriptor": lambda: _reads(f"/proc/{parent}/fd/{given['descriptor']}", given["token"]),
        "find-inherited-descriptor": _inherited,
        "write-outside": lambda: _writes(given["outside"]),
        "tcp": lambda: _stream(socket.AF_INET, ("127.0.0.1", given["tcp"])),
        "udp": lambda: _datagram(given["udp"], given["token"].encode()),
        "dns": lambda: _datagram(given["dns"], b"\x12\x34\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"),
        "unix-socket": lambda: _stream(socket.AF_UNIX, given["unix"]),
        "abstract-unix-socket": lambda: _stream(socket.AF_UNIX, "\0" + given["abstract"]),
        "signal-parent": lambda: os.kill(parent, 0),
        "signal-other": lambda: os.kill(victim, 0),
        "trace-other": lambda: _traces(victim),
        "see-processes": lambda: _sees(given["token"]),
        "become-root": lambda: _in_child(lambda: os.setuid(0)),
        "hold-capabilities": _capabilities,
        "make-user-namespace": lambda: _in_child(_user_namespace),
        "fork-many": lambda: _forks(_FORKS if given["confined"] else _FORKS_OUTSIDE),
    }
    if given["confined"]:
        # Nothing is ever mounted over the machine itself.
        tried["mount"] = _mounts
    found = {name: _outcome(action) for name, action in tried.items()}
    found["outlive"] = _outcome(lambda: _leave_orphan(given["orphan"]))
    return found


def memory(given: dict[str, Any]) -> dict[str, str | None]:
    """Have more memory than is allowed."""
    try:
        taken = bytearray(given["bytes"])
        taken[::4096] = b"\1" * len(taken[::4096])
    except MemoryError:
        return {"memory": "MemoryError"}
    _stay(given)
    return {"memory": None}


def disk(given: dict[str, Any]) -> dict[str, str | None]:
    """Write more than is allowed, into many files."""
    for number in range(given["files"]):
        with open(f"filling-{number}", "wb") as file:
            file.write(b"\1" * (1 << 20))
    _stay(given)
    return {"disk": None}


def output(given: dict[str, Any]) -> dict[str, str | None]:
    """Print more than is allowed."""
    for _ in range(given["pieces"]):
        os.write(1, b"x" * 65536)
    _stay(given)
    return {"output": None}


def deaf(given: dict[str, Any]) -> dict[str, str | None]:
    """Ignore every signal that can be ignored, and go on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    _stay(given)
    return {"ignore-signals": None}


def threads_only(_given: dict[str, Any]) -> dict[str, str | None]:
    """Start a process by each call that can, where only threads are allowed."""
    ways: dict[str, Callable[[], None]] = {
        "fork": lambda: _in_child(lambda: None),
        "spawn": lambda: os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {}), 0) and None,
        "clone": _clones,
    }
    found = {name: _outcome(action) for name, action in ways.items()}
    through = [name for name, met in found.items() if met is None]
    return {"fork-where-forbidden": None if through else "; ".join(f"{k}: {v}" for k, v in found.items())}


def _outcome(action: Callable[[], None]) -> str | None:
    try:
        action()
    except Met as e:
        return str(e)
    except OSError as e:
        return errno.errorcode.get(e.errno or 0, type(e).__name__)
    except Exception as e:
        return type(e).__name__
    return None


def _reads(path: str, token: str) -> None:
    with open(path, encoding="utf-8") as file:
        if token not in file.read():
            raise Met("another file")


def _through_link(secret: str, token: str) -> None:
    os.symlink(secret, "link")
    try:
        _reads("link", token)
    finally:
        os.unlink("link")


def _through_roots(secret: str, token: str, parent: int) -> None:
    last: Exception = Met("nothing")
    for pid in (parent, os.getppid(), 1):
        try:
            return _reads(f"/proc/{pid}/root{secret}", token)
        except (OSError, Met) as e:
            last = e
    raise last


def _digest(path: str, expected: str) -> None:
    with open(path, "rb") as file:
        if hashlib.sha256(file.read()).hexdigest() != expected:
            raise Met("another process")


def _same(path: str, expected: list[int]) -> None:
    status = os.stat(path)
    os.listdir(path)
    if [status.st_dev, status.st_ino] != expected:
        raise Met("another folder")


def _inherited() -> None:
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
            return
    raise Met("none is open")


def _writes(path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("written")


def _stream(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.connect(address)


def _datagram(port: int, data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.sendto(data, ("127.0.0.1", port))


def _traces(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(ctypes.c_long(_PTRACE_SEIZE), ctypes.c_long(pid), None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    libc.ptrace(ctypes.c_long(_PTRACE_DETACH), ctypes.c_long(pid), None, None)


def _sees(token: str) -> None:
    own = os.getpid()
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != own:
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if b"victim-" + token.encode() in file.read():
                    return
    raise Met("not among those that are seen")


def _in_child(action: Callable[[], None]) -> None:
    child = os.fork()
    if not child:
        status = 255
        try:
            action()
            status = 0
        except OSError as e:
            status = e.errno or 255
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, "in a child")


def _capabilities() -> None:
    class Data(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))

    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (Data * 2)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) < 0:
        raise OSError(ctypes.get_errno(), "capget")
    # Those for files are given where only Landlock says what is read and written; see plans.plan.
    if not (data[0].permitted & ~_TO_READ_ALL or data[1].permitted):
        raise Met("none is held")


def _user_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) < 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.getcwd().encode(), b"tmpfs", ctypes.c_ulong(0), None) < 0:
        raise OSError(ctypes.get_errno(), "mount")


def _clones() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    child = libc.syscall(ctypes.c_long(number), ctypes.c_long(signal.SIGCHLD), None, None, None, None)
    if child < 0:
        raise OSError(ctypes.get_errno(), "clone")
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _forks(most: int) -> None:
    children: list[int] = []
    try:
        for _ in range(most):
            child = os.fork()
            if not child:
                while True:
                    signal.pause()
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _leave_orphan(name: str) -> None:
    """A process that its parent does not wait for, in a session of its own where it may, deaf to requests to end."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            _become_orphan(name, ready, told)
        finally:
            os._exit(1)
    os.close(told)
    os.waitpid(child, 0)
    # Until it runs, or could not be run.
    os.read(ready, 1)
    os.close(ready)


def _become_orphan(name: str, ready: int, told: int) -> None:
    with contextlib.suppress(OSError):
        os.setsid()
    if os.fork():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.closerange(0, 3)
    os.close(ready)
    # Known from outside by its arguments.
    code = "import os,time;os.close(int(os.sys.argv[2]));time.sleep(float(os.sys.argv[3]))"
    os.set_inheritable(told, True)
    arguments = [sys.executable, "-S", "-s", "-c", code, name, str(told), str(_HELD_SECONDS)]
    os.execv(sys.executable, arguments)  # noqa: S606


def _stay(given: dict[str, Any]) -> None:
    if given["confined"]:
        time.sleep(_HELD_SECONDS)


def main() -> None:
    given = json.loads(sys.argv[1])
    print(json.dumps(globals()[given["which"]](given)))


if __name__ == "__main__":
    main()
