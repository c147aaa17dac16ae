"""Ignores every signal that can be ignored, says so, and goes on."""

import os
import signal
import time


def attempts(given):
    def stayed():
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                continue
        os.write(1, b"deaf\n")
        time.sleep(600)
        return "stayed"

    yield "stay", stayed
