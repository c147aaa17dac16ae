"""No sandbox: the same interface, limits and clock, and nothing that confines. Only where that is asked for."""

from __future__ import annotations

import functools
import os

from bascule.plugins.sandbox import Program, Ran, Running
from bascule.schemas.errors import BasculeError
from bascule.verifiers.sandbox import launching, plans, processes
from bascule.verifiers.sandbox.confine.removal import remove_tree
from bascule.verifiers.sandbox.packages import distributions, interpreter
from bascule.verifiers.sandbox.plans import Mechanisms
from bascule.verifiers.sandbox.watched import Refused, Started, Watched

NOTHING = Mechanisms((), 0, ("all: not asked for",))


class UnsafeSandbox:
    """Runs programs with all the rights of this process. It is a :class:`bascule.plugins.sandbox.Programs`."""

    mechanisms = NOTHING

    def run(self, program: Program, stdin: bytes = b"") -> Ran:
        try:
            started = self._start(program, stdin=bool(stdin))
        except launching.NotStarted as e:
            return launching.refused(str(e))
        return Watched(started, program).run(stdin)

    def start(self, program: Program) -> Running:
        try:
            started = self._start(program, stdin=True)
        except launching.NotStarted as e:
            return Refused(launching.refused(str(e)))
        return Watched(started, program).talk()

    def _start(self, program: Program, *, stdin: bool) -> Started:
        try:
            packages = distributions(program.packages)
            box = launching.make_box(None, packages)
        except (BasculeError, OSError) as e:
            raise launching.NotStarted(str(e)) from e
        folders = launching.folders_of(box)
        plan = plans.plan(
            NOTHING,
            interpreter(),
            packages,
            uid=os.geteuid(),
            disk_mb=program.disk_mb,
            bounds=plans.limits(
                seconds=program.seconds,
                memory_mb=program.memory_mb,
                disk_mb=program.disk_mb,
                processes=processes.tasks_of(os.getuid()) + 2 * program.processes,
                devices=program.devices,
                cores=os.cpu_count() or 1,
            ),
            box=folders,
            forks=program.forks,
            core=max(os.sched_getaffinity(0)) if program.pinned else None,
        )
        return launching.launch(
            plan,
            program,
            ours=0,
            stdin=stdin,
            box=box,
            owner=None,
            environment=plans.environment(folders),
            release=functools.partial(remove_tree, str(box)),
        )
