"""Forks until it is stopped, at most ``forks`` times: children that wait, deaf, and fork as well."""

import os
import signal

from trying import Nothing


def child_of_ours(confined):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        if confined:
            os.fork()
    except OSError:
        pass
    while True:
        signal.pause()


def bomb(most, confined):
    children = []
    try:
        while len(children) < most:
            child = os.fork()
            if not child:
                child_of_ours(confined)
            children.append(child)
    except BlockingIOError:
        pass
    if not confined:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if len(children) < most:
        raise Nothing(f"not more than {len(children)} children")
    return f"{len(children)} children"


def attempts(given):
    yield "fork", lambda: bomb(given["forks"], given["confined"])
