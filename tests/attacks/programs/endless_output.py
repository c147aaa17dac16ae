"""Prints without end, on both streams."""

import os


def attempts(given):
    def printed():
        pieces = 0
        while not given["pieces"] or pieces < given["pieces"]:
            os.write(1 + pieces % 2, b"x" * 65535 + b"\n")
            pieces += 1
        return f"{pieces} pieces"

    yield "print", printed
