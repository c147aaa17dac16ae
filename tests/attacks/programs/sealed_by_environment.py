"""Looks for the sealed answers in its own environment, its ancestors' and that of every process."""

import os

from trying import Nothing, read, tokens


def every():
    found = b""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                found += read(f"/proc/{name}/environ")
            except OSError:
                continue
    return found


def attempts(given):
    yield "own", lambda: tokens(repr(dict(os.environ)).encode())
    yield "own /proc", lambda: tokens(read("/proc/self/environ"))
    yield "parent", lambda: tokens(read(f"/proc/{os.getppid()}/environ"))
    yield "first process", lambda: tokens(read("/proc/1/environ"))
    for who in ("runtime", "keeper"):
        yield who, lambda who=who: tokens(read(f"/proc/{given[who]}/environ"))
    yield "every process", lambda: tokens(every() or nothing())


def nothing():
    raise Nothing("no process to be seen")
