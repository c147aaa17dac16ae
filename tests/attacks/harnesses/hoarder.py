"""Keeps the items that it is asked wherever it can, and looks there for those of other episodes."""

import builtins
import contextlib
import ctypes
import mmap
import os

import attack
from trying import tokens

KEPT = []
SIZE = 64
try:
    COMMON = mmap.mmap(-1, SIZE)
except OSError:
    COMMON = bytearray(SIZE)


def shared(key, create):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(key, SIZE, 0o1666 if create else 0)
    if number < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    at = libc.shmat(number, None, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "shmat")
    return at


def places(example, context):
    if not example["everywhere"]:
        return [example["folder"]]
    prepared = context.prepared if isinstance(context.prepared, dict) else {}
    folders = [".", os.environ.get("HOME", "."), "/tmp", "/var/tmp", "/dev/shm", "/run", prepared.get("folder", ".")]
    return [*folders, example["folder"]]


def remembered(example, context):
    found = b"".join(KEPT) + repr(getattr(builtins, "kept", "")).encode() + repr(context.prepared).encode()
    found += repr(dict(os.environ)).encode() + repr(attack.kept).encode() + bytes(COMMON)
    for place in places(example, context):
        try:
            for root, _, names in os.walk(place):
                for name in names:
                    if name.startswith("hoard"):
                        with open(os.path.join(root, name), "rb") as file:
                            found += file.read()
        except OSError:
            continue
    with contextlib.suppress(OSError):
        found += ctypes.string_at(shared(example["key"], False), SIZE)
    return found


def keep(example, context):
    item = example["item"].encode()
    KEPT.append(item)
    COMMON[: min(len(item), SIZE)] = item[:SIZE]
    builtins.kept = attack.kept = os.environ["KEPT"] = example["item"]
    if isinstance(context.prepared, dict):
        context.prepared["kept"] = example["item"]
    for place in dict.fromkeys(places(example, context)):
        try:
            with open(os.path.join(place, f"hoard-{item[-8:].decode()}"), "wb") as file:
                file.write(item)
        except OSError:
            continue
    with contextlib.suppress(OSError):
        ctypes.memmove(shared(example["key"], True), item, min(len(item), SIZE))


def prepare(data, context):
    return {"folder": os.getcwd()}


def solve(example, model, tools, context):
    try:
        found = tokens(remembered(example, context))
    except Exception:
        found = ""
    keep(example, context)
    return found or "nothing"
