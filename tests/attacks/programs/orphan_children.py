"""Leaves children behind that have left its group and its session and ignore requests to end."""

import os
import signal
import sys


def orphan(mark):
    ready, told = os.pipe()
    os.set_inheritable(told, True)
    child = os.fork()
    if not child:
        try:
            try:
                os.setsid()
            except PermissionError:
                pass
            if os.fork():
                os._exit(0)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            code = "import os,sys,time; os.closerange(0, 3); os.write(int(sys.argv[1]), b'y'); time.sleep(600)"
            os.execv(sys.executable, [sys.executable, "-S", "-s", "-c", code, str(told), mark])
        finally:
            os._exit(1)
    os.close(told)
    os.waitpid(child, 0)
    up = os.read(ready, 1)
    return "it runs" if up else "it could not be run"


def attempts(given):
    yield "daemon", lambda: orphan(given["mark"])
