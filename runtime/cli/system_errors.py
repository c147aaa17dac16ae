"""What a person can do about a failure of the operating system, case by case."""

from __future__ import annotations

import errno
import socket

_PLACES = (
    "The log's folder is set by --home or BASCULE_HOME, that of data sets and models by BASCULE_CACHE, that of "
    "temporary files by TMPDIR."
)
_GOES_ON = "Nothing that the log holds is lost: `bascule resume RUN` goes on with a run."
_FULL = f"Free space there, or name another folder. {_PLACES} {_GOES_ON}"
_FORBIDDEN = f"Give this user the right to it, or name another path. {_PLACES}"
_IN_THE_WAY = f"Move away what is there, or name another path. {_PLACES}"
_FILES = f"Raise the number of open files (`ulimit -n 65536`). {_GOES_ON}"
_CROWDED = f"End other programs or raise the limits of this user (`ulimit -a`). {_GOES_ON}"
_UNREACHABLE = "See that the address is right and that a server runs there, and run it again."

_STEPS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: f"Nothing can be written there: name another folder. {_PLACES}",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOENT: "Correct the path, or make what it names.",
    errno.EISDIR: f"A folder stands where a file belongs. {_IN_THE_WAY}",
    errno.ENOTDIR: f"A file stands where a folder belongs. {_IN_THE_WAY}",
    errno.EEXIST: f"Something else stands there. {_IN_THE_WAY}",
    errno.ENOTEMPTY: f"The folder there is not empty. {_IN_THE_WAY}",
    errno.ELOOP: "Links lead in a circle there: correct them, or name another path.",
    errno.ENAMETOOLONG: "Use a shorter path.",
    errno.EFBIG: f"Raise the largest size of a file (`ulimit -f`), or name a folder on another disk. {_PLACES}",
    errno.EIO: (
        "The disk failed: look at the system's log (`dmesg`) and copy what can still be read to another disk. "
        "`bascule verify RUN` says whether a run is whole."
    ),
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _CROWDED,
    errno.EAGAIN: _CROWDED,
    errno.EADDRINUSE: "Another program listens there: end it, or choose another port.",
    errno.ECONNREFUSED: _UNREACHABLE,
    errno.ECONNRESET: _UNREACHABLE,
    errno.EHOSTUNREACH: _UNREACHABLE,
    errno.ENETUNREACH: _UNREACHABLE,
    errno.ETIMEDOUT: _UNREACHABLE,
}


def next_step(error: OSError) -> str | None:
    """What to do about it; None where nobody foresaw it."""
    if isinstance(error, socket.gaierror):  # its numbers are of another table
        return _UNREACHABLE
    return None if error.errno is None else _STEPS.get(error.errno)
