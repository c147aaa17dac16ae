"""Leaves a child behind that has left its group, its session and its parents, and ignores requests to end."""

import contextlib
import os
import signal
import time


def orphan():
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            with contextlib.suppress(PermissionError):
                os.setsid()
            if os.fork():
                os._exit(0)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 3)
            os.write(told, b"y")
            os.close(told)
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(told)
    os.waitpid(child, 0)
    return "it runs" if os.read(ready, 1) else "it could not be run"


def attempts(given):
    yield "daemon", orphan
