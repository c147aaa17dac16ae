"""Fills the disk: one large file, and many small ones in every folder that can be written to."""

import os
import time

from trying import Nothing


def one(size):
    try:
        with open("large", "wb") as file:
            for _ in range(size):
                file.write(b"\1" * (1 << 20))
                file.flush()
        return f"{size} MiB"
    finally:
        os.unlink("large")


def many(size):
    written = 0
    folders = (".", os.environ.get("HOME", "."), "/tmp", "/var/tmp", "/dev/shm")
    for folder in dict.fromkeys(map(os.path.realpath, folders)):
        for number in range(2 * size):
            path = os.path.join(folder, f"filling-{number}")
            try:
                with open(path, "wb") as file:
                    file.write(b"\1" * (1 << 19))
                written += 1
            except OSError:
                break
            if written >= 2 * size:
                # Where no file system bounds it, it is measured from outside, now and then.
                time.sleep(60)
                return f"{size} MiB"
    raise Nothing(f"{written / 2:g} MiB and no more")


def attempts(given):
    # Outside, everything stays in the one folder, which is removed.
    yield "one file", lambda: one(given["disk_mb"])
    if given["confined"]:
        yield "many files", lambda: many(given["disk_mb"])
