"""A short run with everything that an export carries: blobs that stay, that are gone and that were erased."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bascule.plugins.loader import plugins
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.exports.writer import TarSink, write_export
from bascule.runtime.log.blobs import OCTETS, FileBlobs, ref_of
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.signing import Signer
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.decision import Option
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import Scored

RUN = "sample"
TIME = "2026-01-01T00:00:00.000000Z"
Change = tuple[str, str, ev.Data]

TRAJECTORY, ADAPTER, GONE, NEWEST, ERASED = (
    b'{"steps": []}' * 20, bytes(range(256)) * 3, b"an old checkpoint", b"the newest checkpoint", b"a secret",
)  # fmt: skip


def new_event(service: str, subject: str, data: ev.Data, *, time: str = TIME) -> NewEvent:
    producer = Producer(service=service, version="1", hash="0")
    draft = Draft(subject=subject, step=0, data=data)
    return NewEvent(
        subject=subject,
        payload=encode(draft, run=subject.split(".")[1], producer=producer, time=time, root=None),
    )


async def sample(blobs: FileBlobs, *, run: str = RUN, reward: float = 1.0, seconds: float = 0.5) -> list[NewEvent]:
    """The events, with their blobs put into the store."""
    trajectory = await blobs.put(TRAJECTORY, "application/json")
    adapter, newest = await blobs.put(ADAPTER), await blobs.put(NEWEST)
    gone, erased = ref_of(GONE, OCTETS), ref_of(ERASED, OCTETS)
    await blobs.erase(erased.sha256)
    started = preflight(
        configure(
            {"task": {"name": "arith"}, "engine": {"name": "constant", "params": {"text": "7"}}, "levers": ["harness"]},
            [],
            plugins(),
        ),
        plugins(),
    )
    first = "g00-dev-0000-n0"
    lever = ev.LeverChosen(
        generation=1, lever="weights", algorithm="grpo", params={}, parent=0, policy="rules", policy_version="1",
        reasons=("informative",), evidence=(),
        options=(Option(lever="weights", algorithm="grpo", feasible=True, score=reward / 3, reasons=()),),
    )  # fmt: skip

    def logged(number: int, blob: ev.BlobRef) -> ev.TrajectoryLogged:
        return ev.TrajectoryLogged(
            trajectory=f"g00-dev-{number:04d}-n0", evaluation="g00-dev", example=f"e{number}", position=number,
            sample=0, answer="7", error=None, prompt_tokens=3, output_tokens=1,
            measured=Measured(seconds=seconds), blob=blob,
        )  # fmt: skip

    def checkpoint(number: int, state: ev.BlobRef) -> ev.AdapterCheckpointed:
        return ev.AdapterCheckpointed(
            generation=1, iteration=number, attempt=1, adapter=f"g01-i{number:03d}", files={"a": adapter},
            sha256="0" * 64, state=state, data_digest="0", metrics={}, measured=Measured(seconds=seconds),
        )  # fmt: skip

    published = ev.AdapterPublished(
        generation=1, adapter="g01-i002", files={"a": adapter}, sha256="0" * 64, parent_adapter=None, iterations=2
    )
    events: Sequence[Change] = (
        ("cli", subjects.run_started(run), started),
        ("rollout", subjects.trajectory_logged(run, first), logged(0, trajectory)),
        ("rollout", subjects.trajectory_logged(run, "g00-dev-0001-n0"), logged(1, erased)),
        (
            "verifier",
            subjects.trajectory_scored(run, first),
            ev.TrajectoryScored(
                trajectory=first, evaluation="g00-dev", position=0, sample=0, verdict=Scored(reward=reward)
            ),
        ),
        ("feedback", subjects.lever_chosen(run, 1), lever),
        ("trainer", subjects.adapter_checkpointed(run, 1, 1), checkpoint(1, gone)),
        ("trainer", subjects.adapter_checkpointed(run, 1, 2), checkpoint(2, newest)),
        ("trainer", subjects.train_outcome(run, 1), published),
        ("cli", subjects.blob_erased(run, erased.sha256), ev.BlobErased(sha256=erased.sha256, reason="asked for")),
    )
    return [new_event(*event) for event in events]


def with_open_job(events: Sequence[NewEvent]) -> list[NewEvent]:
    """The sample before its adapter was published: the training job has done two updates."""
    return [e for e in events if not e.subject.endswith(".outcome")]


async def log_of(events: Sequence[NewEvent], *, before: int = 0) -> MemoryLog:
    """A log with these events, after ``before`` ones of another run."""
    log = MemoryLog()
    for number in range(before):
        await log.append([new_event("cli", subjects.run_paused("other", number), ev.RunPaused(reason=""))])
    await log.append(events)
    return log


async def export_file(
    path: Path,
    log: MemoryLog,
    blobs: FileBlobs,
    *,
    run: str = RUN,
    with_blobs: bool = True,
    signer: Signer | None = None,
) -> Path:
    with path.open("wb") as out:
        read = partial(log.read, f"bascule.{run}.>")
        await write_export(run, read, blobs, TarSink(out), with_blobs=with_blobs, signer=signer)
    return path
