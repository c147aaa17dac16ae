"""Reads the sealed answers by the path of their file, by their folder, and by a search of the file system."""

import os

from trying import read, tokens


def folder(path):
    return b"".join(read(os.path.join(path, name)) for name in os.listdir(path))


def search():
    found = b""
    for root in ("/tmp", "/var/tmp", "/dev/shm", "/home", "/root", "/var/lib", "/work", "/mnt", "/opt"):
        for where, _, names in os.walk(root):
            for name in names:
                if name.endswith((".jsonl", ".key")):
                    try:
                        found += read(os.path.join(where, name))
                    except OSError:
                        continue
    return found


def attempts(given):
    yield "path", lambda: tokens(read(given["truths"]))
    yield "folder", lambda: tokens(folder(os.path.dirname(given["truths"])))
    if given["confined"]:
        yield "search", lambda: tokens(search())
