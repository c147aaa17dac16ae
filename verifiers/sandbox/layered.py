"""The sandbox: programs run in namespaces, under Landlock, seccomp and limits, as far as this machine has them."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import msgspec

from bascule.plugins.sandbox import Program, Ran, Running
from bascule.schemas.errors import BasculeError, ConfigError
from bascule.verifiers.sandbox import front, launching, plans, processes
from bascule.verifiers.sandbox.confine import kernel, seal
from bascule.verifiers.sandbox.confine.removal import remove_tree
from bascule.verifiers.sandbox.packages import Mount, Sight, distributions, executable, interpreter
from bascule.verifiers.sandbox.plans import Mechanisms
from bascule.verifiers.sandbox.watched import Refused, Started, Watched

_TELL = Path(__file__).with_name("confine") / "tell.py"
_TELL_SECONDS = 60.0
# For CUDA besides its devices: which there are, and how they are connected.
_CUDA_FOLDERS = ("/sys/bus", "/sys/class", "/sys/devices", "/sys/module")


@functools.cache
def mechanisms_here(without: tuple[str, ...] = ()) -> Mechanisms:
    """What this machine offers to this user, tried once per process.

    Args:
        without: mechanisms that are not to be used, by their names in :mod:`confine.seal`; ``namespaces``: none of
            the namespaces.

    Raises:
        ConfigError: the interpreter cannot even be started for the trial.
    """
    command = [executable(), *front.FLAGS, str(_TELL), *without]
    try:
        told = subprocess.run(
            command, env={}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=_TELL_SECONDS, check=True
        )
        return msgspec.json.decode(told.stdout, type=Mechanisms)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as e:
        said = getattr(e, "stderr", b"") or b""
        raise ConfigError(
            f"What the sandbox can use on this machine could not be found out: {e}. {said.decode(errors='replace')}",
            next_step=f"Check that {executable()} runs, or pass --unsafe-no-sandbox.",
        ) from e


class LayeredSandbox:
    """Runs programs confined. It is a :class:`bascule.plugins.sandbox.Programs`, and may be used by many threads.

    Args:
        without: mechanisms that are not to be used (:func:`mechanisms_here`).

    Raises:
        ConfigError: see :func:`mechanisms_here`.
    """

    def __init__(self, *, without: tuple[str, ...] = ()) -> None:
        self.mechanisms = mechanisms_here(without)

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
        here = self.mechanisms
        root = os.geteuid() == 0
        try:
            packages = distributions(program.packages)
        except BasculeError as e:
            raise launching.NotStarted(str(e)) from e
        cuda = cuda_devices() if program.devices else ()
        sight = interpreter()
        if cuda:
            extra = tuple((path, path) for path in _CUDA_FOLDERS if os.path.isdir(path))
            sight = Sight(read_only=sight.read_only + extra, masked=sight.masked)
        uid = launching.take_uid() if root else plans.FIRST_UID
        owner = uid if seal.UID in here else None
        box: Path | None = None
        try:
            if not here.own_root:
                box = launching.make_box(owner, packages)
            plan = plans.plan(
                here,
                sight,
                packages,
                uid=uid,
                disk_mb=program.disk_mb,
                bounds=plans.limits(
                    seconds=program.seconds,
                    memory_mb=program.memory_mb,
                    disk_mb=program.disk_mb,
                    processes=self._processes(program.processes, root),
                    devices=bool(cuda),
                    cores=os.cpu_count() or 1,
                ),
                box=launching.folders_of(box) if box else None,
                root=root,
                capabilities=0 if _open_to_all(packages) else _to_read_all(),
                forks=program.forks,
                core=max(os.sched_getaffinity(0)) if program.pinned else None,
                cuda=cuda,
            )
        except OSError as e:
            _release(uid, box, root)
            raise launching.NotStarted(str(e)) from e
        return launching.launch(
            plan,
            program,
            ours=1 if seal.PROCESSES in here else 0,
            stdin=stdin,
            box=box,
            owner=owner,
            environment=plans.environment(launching.folders_of(box) if box else None),
            release=functools.partial(_release, uid, box, root),
        )

    def _processes(self, most: int, root: bool) -> int:
        if root or seal.USER in self.mechanisms:
            return most
        # The kernel counts all processes of a user, also those that are there already, which come and go.
        return processes.tasks_of(os.getuid()) + 2 * most


def cuda_devices() -> tuple[str, ...]:
    """Device files of CUDA; none where there is no such device."""
    names = sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    found = [f"/dev/{name}" for name in names if not os.path.isdir(f"/dev/{name}")]
    for name in names:
        if os.path.isdir(f"/dev/{name}"):
            found += [f"/dev/{name}/{inner}" for inner in sorted(os.listdir(f"/dev/{name}"))]
    return tuple(found)


def _release(uid: int, box: Path | None, root: bool) -> None:
    if root:
        launching.give_uid(uid)
    if box is not None:
        remove_tree(str(box))


def _to_read_all() -> int:
    """The least of our capabilities with which what others own can be read."""
    ours = kernel.permitted_capabilities()
    return next((c for c in (kernel.CAP_DAC_READ_SEARCH, kernel.CAP_DAC_OVERRIDE) if ours & c), 0)


@functools.cache
def _open_to_all(packages: tuple[Mount, ...]) -> bool:
    """Whether any user may read the interpreter and these packages."""
    for source in (executable(), os.path.dirname(os.__file__), *(source for source, _ in packages)):
        path = source
        while True:
            if not os.stat(path).st_mode & (0o001 if os.path.isdir(path) else 0o004):
                return False
            if path == "/":
                break
            path = os.path.dirname(path)
    return True
