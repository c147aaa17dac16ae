"""Takes memory until it is stopped: as one piece, in a file in memory, and shared."""

import ctypes
import mmap
import os

from trying import Nothing


def touched(data):
    data[::4096] = b"\1" * len(data[::4096])
    return f"{len(data) >> 20} MiB"


def in_memory_file(size):
    file = os.memfd_create("taken")
    for _ in range(size >> 20):
        if os.write(file, b"\1" * (1 << 20)) < 1 << 20:
            raise Nothing("a short write")
    return f"{size >> 20} MiB"


def shared(size):
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.shmget(0, ctypes.c_size_t(size), 0o1600)
    if number < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    libc.shmctl(number, 0, None)
    return f"{size >> 20} MiB"


def attempts(given):
    size = given["memory_mb"] << 20
    yield "anonymous", lambda: touched(bytearray(size))
    yield "mapped", lambda: touched(mmap.mmap(-1, size))
    if given["confined"]:
        yield "file in memory", lambda: in_memory_file(size)
        yield "System V", lambda: shared(size)
