"""A leak of the scorer is found in all that a run leaves behind, and a run without one is clean."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.plugins.canary import PREFIX, Canaries, canary, canary_key
from bascule.plugins.loader import plugins
from bascule.runtime.audit.canaries import CanaryReport, scan
from bascule.runtime.cli.canaries import known_canaries
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import NotFound
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_ids
from tests.plugin_site import install_plugin
from tests.runtime.sample import new_event

SMALL = [
    *("--engine", "constant", "--set", 'engine.params.text="7"', "--levers", "harness", "--max_gen", "0"),
    *("--set", "evaluation.dev_examples=8", "--set", "evaluation.sealed_examples=4"),
    *("--set", "evaluation.train_groups=2", "--set", "evaluation.train_samples=1"),
]
RUN = "small"


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))


def arith_canaries() -> Canaries:
    return Canaries.of(canary_key(), "arith", plugins().registry.tasks.get("arith")({}).public())


async def scanned(log: MemoryLog, blobs: FileBlobs, **more: Any) -> CanaryReport:
    return await scan(RUN, log.read(f"bascule.{RUN}.>"), blobs, canaries=arith_canaries(), **more)


async def test_a_run_without_a_leak_is_clean(
    make_view: Callable[[MemoryLog], View], started_log: MemoryLog, tmp_path: Path
) -> None:
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    config = RunState.of(RUN, [e async for e in started_log.read(f"bascule.{RUN}.>")]).config
    report = await scan(
        RUN, started_log.read(f"bascule.{RUN}.>"), FileBlobs(tmp_path / "blobs"), canaries=known_canaries(config)
    )
    assert report.leaks == []
    assert report.known == 300 + len(view.world.public.train)
    assert report.events > 50
    assert report.event_bytes > 50_000


def logged(number: int, *, body: Trajectory | None = None, blob: ev.BlobRef | None = None) -> Any:
    name = f"g00-dev-{number:04d}-n0"
    data = ev.TrajectoryLogged(
        trajectory=name, evaluation="g00-dev", example=f"e{number}", position=number, sample=0, answer="7", error=None,
        prompt_tokens=1, output_tokens=1, measured=Measured(seconds=0.0), body=body, blob=blob,
    )  # fmt: skip
    return new_event("rollout", subjects.trajectory_logged(RUN, name), data)


def asked(ids: list[int]) -> Trajectory:
    output = Output(token_ids=pack_ids([55]), logprobs=b"", text="7")
    return Trajectory(steps=(ModelCall(kind="chat", asked="a", prompt_ids=pack_ids(ids), outputs=(output,), sampling=Sampling()),))  # fmt: skip # noqa: E501


async def test_prompts_are_searched_although_they_are_recorded_as_token_ids(tmp_path: Path) -> None:
    token = canary(canary_key(), "arith", "dev", next(iter(arith_canaries().tokens.values())).example)
    blobs = FileBlobs(tmp_path / "blobs")
    log = MemoryLog()
    in_bytes = logged(0, body=asked(list(f"It is {token}".encode())))
    body = msgspec.json.encode(asked([300 + c for c in token.encode()]))
    await log.append([in_bytes, logged(1, blob=await blobs.put(body, "application/json"))])

    def decode(ids: Any) -> str:
        return "".join(chr(i - 300 if i >= 300 else i) for i in ids)

    found = await scanned(log, blobs)
    assert (len(found.leaks), found.prompts, found.undecoded) == (1, 1, 1)
    found = await scanned(log, blobs, decode=decode)
    assert (len(found.leaks), found.prompts, found.undecoded) == (2, 2, 0)
    assert {leak.form for leak in found.leaks} == {"token ids (plain)"}


async def test_blobs_files_and_dead_letters_are_searched_and_counted(tmp_path: Path) -> None:
    examples = arith_canaries().tokens
    one, two, three, four, five = list(examples)[:5]
    blobs = FileBlobs(tmp_path / "blobs")
    log = MemoryLog()
    media = "application/json" + ev.RESTRICTED
    restricted = await blobs.put(json.dumps({"steps": [], "answer": f"x {one}" + " " * 5000}).encode(), media)
    await blobs.put(b"\0\1" * 1000 + base64.b64encode(two.encode()), "application/octet-stream")
    gone = await blobs.put(b"gone", "text/plain")
    await blobs.erase(gone.sha256)
    await log.append([logged(0, blob=restricted), logged(1, blob=gone)])
    logs = tmp_path / "runs"
    (logs / "deep").mkdir(parents=True)
    (logs / "services.jsonl").write_text(json.dumps({"event": "work.failed", "exception": three}))
    (logs / "deep" / "page.html").write_bytes(four.encode("utf-16"))
    (logs / f"named-{five}").touch()
    (logs / "link").symlink_to(logs / "services.jsonl")
    report = await scanned(log, blobs, paths=[logs])
    found = {leak.example: leak for leak in report.leaks}
    assert set(found) == {examples[token].example for token in (one, two, three, four, five)}
    assert all(leak.task == "arith" and len(leak.token) < len(PREFIX) + 8 for leak in report.leaks)
    assert (
        found[examples[one].example].where
        == f"blob {restricted.sha256} of {subjects.trajectory_logged(RUN, 'g00-dev-0000-n0')}"
    )
    assert "which no event names" in found[examples[two].example].where
    assert (report.events, report.blobs, report.absent, report.files) == (2, 2, 1, 3)
    assert report.file_bytes == sum(p.stat().st_size for p in logs.rglob("*") if p.is_file() and not p.is_symlink())


async def test_a_token_that_this_machine_did_not_make_is_a_leak_too(tmp_path: Path) -> None:
    log = MemoryLog()
    foreign = canary(b"another machine's key", "arith", "dev", "add-1-1")
    draft = Draft(subject=subjects.run_paused(RUN, 1), step=0, data=ev.RunPaused(reason=foreign))
    await log.append([new_event("cli", draft.subject, draft.data)])
    (leak,) = (await scanned(log, FileBlobs(tmp_path / "blobs"))).leaks
    assert (leak.where, leak.task) == (draft.subject, None)


async def test_a_path_that_is_not_there_is_no_clean_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no .*missing\.tar"):
        await scanned(MemoryLog(), FileBlobs(tmp_path / "blobs"), paths=[tmp_path / "missing.tar"])


def test_what_a_scorer_tells_is_found_in_the_log_and_in_an_export(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install_plugin(site, "blabbing", Path(__file__).with_name("blabbing.py").read_text())
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")}
    own = {"BASCULE_HOME": str(tmp_path / "home"), "BASCULE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(site)}

    def bascule(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bascule.runtime.cli", *args],
            env={**kept, **own}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    ran = bascule("run", "--task", "blabbing", "--run-id", RUN, *SMALL)
    assert ran.returncode == 0, ran.stderr
    export = tmp_path / "small.tar"
    assert bascule("export", RUN, "--to", str(export)).returncode == 0
    found = bascule("canaries", RUN, str(export), "--json")
    assert found.returncode == 1, found.stderr
    report = json.loads(found.stdout)
    scored = [leak for leak in report["leaks"] if ".traj." in leak["where"]]
    assert {(leak["task"], leak["split"]) for leak in scored} == {("blabbing", "dev")}
    places = {leak["where"] for leak in scored}
    assert places == {subjects.trajectory_scored(RUN, f"g00-dev-{n:04d}-n0") for n in range(4)}, "each of the four ways"
    assert {"plain", "base64"} <= {leak["form"] for leak in scored}
    exported = [leak for leak in report["leaks"] if str(export) in leak["where"]]
    assert {leak["example"] for leak in exported} == {leak["example"] for leak in scored}
    assert report["files"] >= 2
    public = plugins().registry.tasks.get("arith")({}).public()
    tokens = Canaries.of(canary_key(), "blabbing", public).tokens
    for text in (found.stdout, bascule("canaries", RUN).stdout):
        assert PREFIX in text
        assert not [token for token in tokens if token in text], "a report is no leak itself"
