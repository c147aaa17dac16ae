"""Reads the sealed answers through symbolic and hard links, and leaves a link where a result is looked for."""

import contextlib
import os

from trying import read, tokens


def link(how, name, target):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    how(target, name)
    return name


def attempts(given):
    path = given["truths"]
    yield "symbolic link", lambda: tokens(read(link(os.symlink, "soft", path)))
    yield "hard link", lambda: tokens(read(link(os.link, "hard", path)))
    yield (
        "linked folder",
        lambda: tokens(read(link(os.symlink, "folder", os.path.dirname(path)) + "/" + os.path.basename(path))),
    )
    yield "link through /proc", lambda: tokens(read(link(os.symlink, "deep", f"/proc/self/root{path}")))
    # Whoever takes results from the folder must not follow this one.
    with contextlib.suppress(OSError):
        link(os.symlink, "result", path)
