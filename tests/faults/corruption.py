"""Stored bytes are damaged: it is reported, or does not matter."""

from __future__ import annotations

import asyncio
import re
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bascule.runtime.audit.verify import Fault, verify
from bascule.runtime.exports.check import verify_export
from bascule.runtime.exports.reader import open_export
from bascule.runtime.log.anchor import Anchor, anchor_path
from bascule.runtime.log.blobs import FileBlobs
from bascule.schemas.errors import BasculeError, Corrupt
from tests.faults.damage import damage, drawn
from tests.faults.fault import Outcome, Setting
from tests.faults.ledger import connected, serving
from tests.faults.original import EXPORT, HOME, RUNS, Content, content, exported, make_original

Verdict = Literal["detected", "harmless", "silent"]
_HANG_SECONDS = 150.0
_SERVER_BYTES = 2 * 1024**3
#: A report has to say which file, run, event or sequence.
_WHERE = re.compile(r"/|sequence \d|event \d|bascule\.r\d|blobs|jsonl|line \d|byte \d|manifest|chain|consumer|its end")


async def corrupt_store(setting: Setting) -> Outcome:
    """Flip a bit of a file, or cut its end off, and hold what is then read against the original."""
    rng, original = setting.rng("corruption"), setting.folder / "original"
    await make_original(original, rng)
    whole = {part: await read_part(original / part) for part in (EXPORT, HOME)}
    verdicts: Counter[Verdict] = Counter()
    broken: list[str] = []
    with _spared_memory():
        for number in range(setting.count):
            copy = setting.folder / "copy"
            await asyncio.to_thread(shutil.copytree, original, copy)
            done = drawn(number, copy, rng)
            damage(done, copy)
            part = EXPORT if done.group == "export" else HOME
            verdict, why = await judged(copy / part, whole[part])
            verdicts[verdict] += 1
            if verdict == "silent" or (verdict == "detected" and not _WHERE.search(why)):
                broken.append(f"{done}: {verdict}: {why}")
            setting.say(f"{done}: {verdict}{f' ({why})' if why else ''}")
            await asyncio.to_thread(shutil.rmtree, copy)
    return Outcome(
        injected=setting.count,
        detected=verdicts["detected"],
        harmless=verdicts["harmless"],
        silent=verdicts["silent"],
        broken=tuple(broken),
        note="all of the log is anchored; of what came after an anchor's last line, nobody knows the end",
    )


async def judged(path: Path, original: Content) -> tuple[Verdict, str]:
    """Whether the export or home at ``path`` is refused, or gives what the ``original`` gave, or neither."""
    try:
        async with asyncio.timeout(_HANG_SECONDS):
            read = await read_part(path)
    except BasculeError as e:
        return "detected", str(e)
    except TimeoutError:
        return "silent", "the verification hung"
    return ("harmless", "") if read == original else ("silent", "read without complaint, with another content")


async def read_part(path: Path) -> Content:
    """What a home or an export holds.

    Raises:
        BasculeError: it cannot be opened, or its verification finds faults.
    """
    return _read_export(path) if path.name == EXPORT else await _read_home(path)


async def _read_home(home: Path) -> Content:
    async with serving(home) as server, connected(server) as log:
        for run in RUNS:
            found = await verify(run, log, FileBlobs(home / "blobs" / run), Anchor(anchor_path(home)))
            _raise_first(found.faults)
        return await content(log, home)


def _read_export(path: Path) -> Content:
    with open_export(path) as export:
        _raise_first(verify_export(export))
        return exported(export)


def _raise_first(faults: list[Fault] | tuple[Fault, ...]) -> None:
    if faults:
        raise Corrupt(f"sequence {faults[0].seq}, {faults[0].subject}: {faults[0].what}")


@contextmanager
def _spared_memory() -> Iterator[None]:
    """Give processes that are started inside 2 GiB more than this one has: a damaged store can make nats-server
    allocate without end, and its own limit is half of the machine."""
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmData:")[1].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (own + _SERVER_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
