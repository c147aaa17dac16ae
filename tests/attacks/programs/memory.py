"""Takes memory until it is stopped: as one piece, in a file in memory, shared, let go of but kept, and in sockets."""

import contextlib
import ctypes
import mmap
import os
import socket

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


def let_go(size):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    held = []
    for _ in range(size >> 20):
        one = mmap.mmap(-1, 1 << 20)
        one[::4096] = b"\1" * 256
        libc.madvise(ctypes.addressof(ctypes.c_char.from_buffer(one)), 1 << 20, mmap.MADV_DONTNEED)
        held.append(one)
    if any(one[0] != 1 for one in held):
        raise Nothing("it was gone")
    return f"{size >> 20} MiB"


def of_zeros(size):
    with open("/dev/zero", "r+b") as file:
        return touched(mmap.mmap(file.fileno(), size))


def in_sockets(size):
    kept, sent = [], 0
    while sent < size:
        one, other = socket.socketpair()
        kept += [one, other]
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += one.send(bytes(1 << 16))
    return f"{sent >> 20} MiB"


def attempts(given):
    size = given["memory_mb"] << 20
    yield "anonymous", lambda: touched(bytearray(size))
    yield "mapped", lambda: touched(mmap.mmap(-1, size))
    if given["confined"]:
        yield "file in memory", lambda: in_memory_file(size)
        yield "System V", lambda: shared(size)
        yield "let go of", lambda: let_go(size)
        yield "zeros", lambda: of_zeros(size)
        yield "in sockets", lambda: in_sockets(size)
