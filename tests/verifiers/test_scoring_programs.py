"""Scorers that run programs: by a server beside the scoring process, which alone can make sandboxes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from msgspec import structs

from bascule.plugins.sandbox import Program
from bascule.schemas.errors import ScoringError
from bascule.schemas.sandbox import LAYERS, SandboxConfig
from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.sandbox.probe import choose
from bascule.verifiers.sandbox.served import ServedPrograms
from bascule.verifiers.scoring import Scorer

DOUBLING = Path(__file__).with_name("programs_process.py")


ANY = SandboxConfig(require=())


class DoublingScorer(Scorer):
    command = (str(DOUBLING),)
    server_grace = 60.0


def doubling(folder: Path, task: str = "doubling", *, unsafe: bool = False) -> DoublingScorer:
    """A scorer with the sandbox of this machine. How much that holds is its own affair."""
    folder.chmod(0o777)
    report = None if unsafe else choose(ANY)[1]
    sandbox = SandboxConfig(require=(), unsafe=unsafe)
    return DoublingScorer(task, {"folder": str(folder)}, sandbox=sandbox, report=report)


async def test_a_scorer_runs_programs_and_speaks_with_them(tmp_path: Path) -> None:
    async with doubling(tmp_path) as scorer:
        assert scorer.server_pid not in (None, scorer.pid, os.getpid())
        assert scorer.report is not None
        assert scorer.report.kind == "layered"
        assert await scorer.score("dev", "twice", "21") == Scored(reward=42.0)
        assert await scorer.score("dev", "two at once", "") == Scored(reward=40.0)
        assert await scorer.score("dev", "ends early", "") == Scored(reward=1.0)
        assert await scorer.score("dev", "too long", "") == Scored(reward=1.0)
        refused = await scorer.score("dev", "no such limit", "")
        assert isinstance(refused, Unscored)
        assert "memory_mb" in refused.reason
        assert scorer.restarts == 0


async def test_a_program_sees_neither_the_scorer_nor_its_server(tmp_path: Path) -> None:
    async with doubling(tmp_path) as scorer:
        verdict = await scorer.score("dev", "look", "")
        assert isinstance(verdict, Unscored)
        uid, *found, own = verdict.reason.split()
        became = scorer.uid != os.geteuid()
    assert found == [name for name in found if name.endswith("Error")], "each was refused"
    assert len(found) == 3
    if became:  # not so for an ordinary user, nor in a container where root cannot become somebody else
        assert len({uid, own, "0"}) == 3, "three users: the program's, the scorer's, root"
    else:
        assert own == str(os.geteuid())


async def test_a_sandbox_that_does_not_hold_what_it_must_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    report = choose(ANY)[1]
    less = structs.replace(report, holds=tuple(layer for layer in report.holds if layer != "network"))
    scorer = DoublingScorer("doubling", {"folder": str(tmp_path)}, sandbox=SandboxConfig(), report=less)
    with pytest.raises(ScoringError, match="network") as caught:
        await scorer.start()
    assert caught.value.next_step is not None
    assert (scorer.pid, scorer.server_pid) == (None, None)


async def test_what_the_server_probes_itself_is_what_any_process_here_finds(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    async with DoublingScorer("doubling", {"folder": str(tmp_path)}, sandbox=ANY) as scorer:
        assert scorer.report is not None
        assert scorer.report.holds == choose(ANY)[1].holds
        assert {canary.layer for canary in scorer.report.canaries} == set(LAYERS)


async def test_without_a_sandbox_programs_run_where_that_is_asked_for(tmp_path: Path) -> None:
    async with doubling(tmp_path, unsafe=True) as scorer:
        assert scorer.report is not None
        assert (scorer.report.kind, scorer.report.holds) == ("unsafe", ())
        assert await scorer.score("dev", "twice", "4") == Scored(reward=8.0)


async def test_a_server_that_is_killed_is_started_again_and_the_request_retried(tmp_path: Path) -> None:
    async with doubling(tmp_path) as scorer:
        first = (scorer.pid, scorer.server_pid)
        waiting = asyncio.create_task(scorer.score("dev", "kill the server", ""))
        while not (tmp_path / "kill the server").exists():
            assert not waiting.done()
            await asyncio.sleep(0.01)
        assert first[1] is not None
        os.kill(first[1], signal.SIGKILL)
        assert await waiting == Scored(reward=1.0)
        assert scorer.restarts == 1
        assert not {scorer.pid, scorer.server_pid} & set(first), "both are new"


@pytest.mark.parametrize("example", ["cut", "raises"])
async def test_a_verdict_without_a_server_is_none_whatever_the_scorer_makes_of_it(tmp_path: Path, example: str) -> None:
    async with doubling(tmp_path) as scorer:
        lost = await scorer.score("dev", example, "")
        assert isinstance(lost, Unscored)
        assert "Tried 2 times" in lost.reason
        assert await scorer.score("dev", "twice", "1") == Scored(reward=2.0)


async def test_a_scorer_that_cannot_use_programs_gives_no_verdict(tmp_path: Path) -> None:
    async with doubling(tmp_path, "unusable") as scorer:
        verdict = await scorer.score("dev", "twice", "1")
    assert isinstance(verdict, Unscored)
    assert "RuntimeError at programs_process.py" in verdict.reason
    assert "42" not in verdict.reason


async def test_a_closed_scorer_leaves_no_server(tmp_path: Path) -> None:
    scorer = doubling(tmp_path)
    await scorer.start()
    assert scorer.server_pid is not None
    pid = scorer.server_pid
    await scorer.close()
    assert not os.path.exists(f"/proc/{pid}"), "it has ended and was waited for"
    assert scorer.server_pid is None


async def test_a_scorer_that_is_cancelled_while_a_program_runs_leaves_no_folder_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    monkeypatch.setenv("TMPDIR", str(boxes))
    async with doubling(tmp_path, unsafe=True) as scorer:
        waiting = asyncio.create_task(scorer.score("dev", "speak on", ""))
        while not (tmp_path / "spoken").exists():
            assert not waiting.done()
            await asyncio.sleep(0.01)
        assert list(boxes.iterdir())
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert list(boxes.iterdir()) == []


async def test_only_a_task_that_runs_programs_gets_a_server() -> None:
    async with Scorer("arith", {}, sandbox=SandboxConfig(require=LAYERS)) as scorer:
        assert scorer.server_pid is None
        assert scorer.report is None


def test_a_program_with_too_many_files_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from bascule.verifiers.sandbox import served

    monkeypatch.setattr(served, "MAX_MESSAGE", 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        programs = ServedPrograms(ours)
        with pytest.raises(ValueError, match="over the limit"):
            programs.run(Program(files={"a": bytes(2000)}, arguments=("a",)))
        assert not programs.lost
