"""Remove folders that a program left, which may be as deep as it liked. The standard library's functions recurse."""

from __future__ import annotations

import os


def remove_tree(root: str) -> bool:
    """Remove a folder with all below it, as far as that is allowed; nobody may be at work in it any more.

    Inner folders are first moved up to ``root``, so that nothing recurses and no path outgrows what the kernel takes.

    Returns:
        Whether all of it is gone.
    """
    fresh = os.urandom(8).hex()
    moved = 0
    stuck: set[str] = set()
    try:
        while names := set(os.listdir(root)) - stuck:
            for name in names:
                path = os.path.join(root, name)
                try:
                    if not _is_folder(path):
                        os.unlink(path)
                        continue
                    os.chmod(path, 0o700)
                    for inner in os.listdir(path):
                        below = os.path.join(path, inner)
                        if not _is_folder(below):
                            os.unlink(below)
                            continue
                        # A folder can be moved only by who may write it.
                        os.chmod(below, 0o700)
                        os.rename(below, os.path.join(root, f"{fresh}-{moved}"))
                        moved += 1
                    os.rmdir(path)
                except OSError:
                    stuck.add(name)
        os.rmdir(root)
    except OSError:
        return False
    return True


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)
