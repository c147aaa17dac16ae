"""The machine: GPU, memory, disk, sandbox, and the server of the log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bascule.plugins.loader import described
from bascule.runtime.doctor.finding import Asked, Finding, failed, in_gib
from bascule.schemas.errors import BasculeError, ConfigError

_VERSION_SECONDS = 5.0
_PROBED_BYTES = 1 << 16
_DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)")


def check_gpu(_: Asked) -> Iterator[Finding]:
    """What torch sees of CUDA, beside what the machine has."""
    driver = _driver()
    if driver is None and not Path("/dev/kfd").exists():  # AMD's, which torch calls CUDA as well
        yield Finding(about="gpu", outcome="ok", found="none; engine and trainer take the CPU")
        return
    try:
        import torch

        there = torch.cuda.is_available()
        count = torch.cuda.device_count() if there else 0
    except BaseException as error:  # a broken torch is a line of the packages, too
        yield Finding(about="gpu", outcome="warns", found=f"torch cannot say: {described(error)}"[:600])
        return
    if not count:
        build = f"torch {torch.__version__} is made for {torch.version.cuda or 'the CPU alone'}"
        yield Finding(
            about="gpu",
            outcome="warns",
            found=f"the machine has a GPU's driver ({driver or 'AMD'}), and torch sees no device: {build}",
            next_step="Install a torch for CUDA whose version the driver knows, or set CUDA_VISIBLE_DEVICES right.",
        )
        return
    most = 0
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        most = max(most, free)
        bf16 = torch.cuda.get_device_capability(i) >= (8, 0)
        yield Finding(
            about=f"gpu {i}",
            outcome="ok" if bf16 else "warns",
            found=f"{torch.cuda.get_device_name(i)}: {in_gib(free)} of {in_gib(total)} free, "
            f"{'bfloat16' if bf16 else 'no bfloat16 in hardware'}, CUDA {torch.version.cuda}, driver {driver}",
            next_step="" if bf16 else "Training computes in bfloat16, and is slow on it.",
            figures={"free": free, "total": total},
        )


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = _DRIVER.search(text)
    return found[1] if found else "of unknown version"


def free_memory() -> int:
    """Bytes of memory that new programs can have: of the machine, or of the control group if that is less."""
    text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, now = (int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")) for name in (most, used))
        except (OSError, ValueError):  # no such control group, or no limit
            continue
        free = min(free, max(limit - now, 0))
    return free


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


def check_place(about: str, path: Path, need: int, setting: str) -> Finding:
    """Whether a folder can be written, and has room for what a run puts there.

    Args:
        path: made by the run if it is missing, which is not done here.
        need: bytes, an estimate.
        setting: what names another folder.
    """
    there = existing(path)
    step = f"Name another folder with {setting}, or"
    if not there.is_dir():
        what = f"{path}: {there} is no folder"
        return Finding(about=about, outcome="fails", found=what, next_step=f"{step} move that away.")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\1" * _PROBED_BYTES)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as e:
        what = f"{path}: {there} cannot be written: {e.strerror or e}"
        return Finding(
            about=about, outcome="fails", found=what, next_step=f"{step} make room and give this user the right."
        )
    found = f"{path}: {in_gib(free)} free, some {in_gib(need)} needed"
    if free < need:
        what, figures = "fails", {"free": free, "need": need}
        return Finding(about=about, outcome="fails", found=found, next_step=f"{step} free some space.", figures=figures)
    tight = free < 2 * need
    return Finding(
        about=about,
        outcome="warns" if tight else "ok",
        found=found,
        next_step=f"{step} free some space before a long run." if tight else "",
        figures={"free": free, "need": need},
    )


def check_sandbox(asked: Asked) -> Iterator[Finding]:
    """Try the sandbox's canaries, and hold what they found against what the run requires."""
    from bascule.schemas.sandbox import SandboxConfig
    from bascule.verifiers.sandbox.layered import LayeredSandbox
    from bascule.verifiers.sandbox.probe import probe, require

    config = asked.config.sandbox if asked.config is not None else SandboxConfig()
    if config.unsafe:
        what = "off: the configuration says unsafe, and every result is marked"
        yield Finding(about="sandbox", outcome="warns", found=what, next_step="Leave out --unsafe-no-sandbox.")
        return
    report = probe(LayeredSandbox())
    try:
        require(report, config)
    except ConfigError as e:
        yield failed("sandbox", e)
        return
    lacking = f"; not there: {'; '.join(report.missing)}" if report.missing else ""
    yield Finding(
        about="sandbox",
        outcome="ok",
        found=f"holds {', '.join(report.holds)} by {', '.join(report.mechanisms)}{lacking}",
        figures={"canaries": len(report.canaries), "held": sum(c.held for c in report.canaries)},
    )


def check_server(_: Asked) -> Iterator[Finding]:
    """Start the embedded server on an empty folder, and stop it."""
    from bascule.runtime.log.process import find_binary
    from bascule.runtime.log.server import EmbeddedServer

    try:
        binary = find_binary()
        ran = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
        with tempfile.TemporaryDirectory(prefix="bascule-doctor-") as folder:
            begin = time.perf_counter()
            server = EmbeddedServer.start(Path(folder))
            took = time.perf_counter() - begin
            server.stop()
    except BasculeError as e:
        yield failed("nats-server", e)
        return
    except (OSError, subprocess.SubprocessError) as e:
        step = "Free space in the folder of temporary files (TMPDIR), and see that programs may be started."
        yield Finding(about="nats-server", outcome="fails", found=f"does not start: {e}", next_step=step)
        return
    version = ran.stdout.strip().removeprefix("nats-server: ") or "of unknown version"
    yield Finding(about="nats-server", outcome="ok", found=f"{version}, started and answered in {took * 1000:.0f} ms")
