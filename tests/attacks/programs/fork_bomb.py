"""Forks until it is stopped, at most ``forks`` times: children that wait, deaf, and children that fork as well."""

import os
import signal

from trying import Nothing


def bomb(most):
    children = []
    try:
        while len(children) < most:
            child = os.fork()
            if not child:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                try:
                    os.fork()
                finally:
                    while True:
                        signal.pause()
            children.append(child)
    except BlockingIOError:
        pass
    if len(children) < most:
        raise Nothing(f"{len(children)} processes and no more")
    return f"{len(children)} processes"


def attempts(given):
    yield "fork", lambda: bomb(given["forks"])
