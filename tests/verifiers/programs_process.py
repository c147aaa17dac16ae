"""A scoring process whose scorer runs programs, each in a way that its example id names."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from bascule.plugins.sandbox import Program, Programs
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict
from bascule.verifiers.sandbox.served import ServedPrograms
from bascule.verifiers.scoring_process import Open, main

DOUBLING = b"""
import sys
while line := sys.stdin.buffer.readline():
    sys.stdout.buffer.write(b"%9d\\n" % (2 * int(line)))
    sys.stdout.buffer.flush()
"""
LOOKING = b"""
import os, sys
found = []
for path in sys.argv[1:]:
    try:
        found.append(open(path, "rb").read(99).hex())
    except OSError as e:
        found.append(type(e).__name__)
open("found", "w").write(" ".join([str(os.getuid()), *found]))
"""


def python(source: bytes, *arguments: str, **limits: Any) -> Program:
    return Program(files={"main.py": source}, arguments=("main.py", *arguments), **limits)


class Doubling:
    seconds = 90.0

    def __init__(self, folder: str, *, usable: bool) -> None:
        self.folder = Path(folder)
        self._usable = usable
        self._programs: Programs | None = None

    def use(self, programs: Programs) -> None:
        if not self._usable:
            raise RuntimeError("the-truth-is-42")
        assert self._programs is None, "only once"
        self._programs = programs

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        del split
        try:
            return self._score(example, answer or "")
        except Exception:
            if example == "raises":
                raise
            return Scored(reward=0.0)  # as a careless scorer does, which takes any failure for the candidate's

    def _score(self, example: str, answer: str) -> Verdict:
        programs = self._programs
        assert isinstance(programs, ServedPrograms)
        first = self.folder / example
        known = first.exists()
        first.touch()
        match example:
            case "twice":
                ran = programs.run(python(DOUBLING), answer.encode() + b"\n")
                return Scored(reward=float(ran.stdout.split()[0]))
            case "two at once":
                with programs.start(python(DOUBLING)) as one, programs.start(python(DOUBLING)) as other:
                    total = 0
                    for number in range(5):
                        for running in (one, other):
                            running.write(b"%d\n" % number)
                            total += int(running.read(10))
                    return Scored(reward=total + float(one.wait().exit_code or 0))
            case "ends early":
                with programs.start(python(b"print('short')")) as running:
                    try:
                        running.read(100)
                    except EOFError:
                        return Scored(reward=1.0)
            case "too long":
                with programs.start(python(b"import time; time.sleep(3600)", seconds=1.0)) as running:
                    try:
                        running.read(1)
                    except TimeoutError:
                        return Scored(reward=float(running.wait().ending == "timeout"))
            case "kill the server" if not known:
                programs.run(python(b"import time; time.sleep(3600)", seconds=3000))
            case "speak on":
                with programs.start(python(b"print(end='x', flush=True); input()", seconds=3000)) as running:
                    running.read(1)
                    (self.folder / "spoken").touch()
                    running.read(1)
            case "cut" | "raises":
                programs._channel.shutdown(socket.SHUT_RDWR)
                programs.run(python(DOUBLING))
            case "no such limit":
                try:
                    programs.run(python(DOUBLING, memory_mb=0))
                except ValueError as e:
                    return Unscored(reason=str(e))
            case "look":
                own = (f"/proc/{os.getpid()}/environ", f"/proc/{os.getppid()}/environ", str(first))
                ran = programs.run(python(LOOKING, *own, results=("found",)))
                return Unscored(reason=ran.results["found"].decode() + f" {os.getuid()}")
        return Scored(reward=1.0)


def opened(opening: Open) -> tuple[Doubling]:
    return (Doubling(opening.params["folder"], usable=opening.task != "unusable"),)


if __name__ == "__main__":
    main(opened)
