"""The scoring process: verdicts or reasons come back, whatever a scorer does; the truth never does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bascule.schemas.errors import ScoringError
from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.scoring import Scorer

ROGUE = Path(__file__).with_name("rogue_process.py")


class RogueScorer(Scorer):
    command = (str(ROGUE),)


def rogue(folder: Path, task: str = "rogue", timeout: float = 60.0) -> RogueScorer:
    folder.chmod(0o777)  # as root, the scoring process is somebody else's by the time that it scores
    return RogueScorer(task, {"folder": str(folder)}, timeout=timeout)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_an_installed_task_is_scored_in_another_process() -> None:
    async with Scorer("arith", {}) as scorer:
        assert scorer.pid not in (None, os.getpid())
        dev = "sub-11-11"
        assert await scorer.score("dev", dev, " 0\n") == Scored(reward=1.0, passed=True)
        assert await scorer.score("dev", dev, "1") == Scored(reward=0.0, passed=False)
        assert await scorer.score("dev", dev, None) == Scored(reward=0.0, passed=False, well_formed=False)
        assert isinstance(await scorer.score("train", dev, "0"), Unscored), "an example of another split has no verdict"
        assert scorer.restarts == 0


async def test_many_requests_at_once_each_get_their_own_verdict(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        verdicts = await asyncio.gather(*(scorer.score("dev", f"e{i}", f"e{i - i % 2}") for i in range(300)))
        again = await asyncio.gather(*(scorer.score("dev", "e7", "e7") for _ in range(5)))
    assert [v.passed for v in verdicts if isinstance(v, Scored)] == [i % 2 == 0 for i in range(300)]
    assert again == [Scored(reward=1.0, passed=True)] * 5, "duplicates are harmless"


@pytest.mark.parametrize("example", ["raise", "nothing", "text", "nan", "inf", "-inf"])
async def test_a_scorer_that_fails_gives_a_reason_and_no_reward(tmp_path: Path, example: str) -> None:
    async with rogue(tmp_path) as scorer:
        verdict = await scorer.score("dev", example, "x")
        assert isinstance(verdict, Unscored)
        assert verdict.reason
        assert "42" not in verdict.reason, "an exception's text may quote the truth"
        assert await scorer.score("dev", "good", "good") == Scored(reward=1.0, passed=True)
        assert scorer.restarts == 0


async def test_what_a_scorer_prints_reaches_neither_protocol_nor_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with rogue(tmp_path) as scorer:
        assert await scorer.score("dev", "print", "print") == Scored(reward=1.0, passed=True)
        assert await scorer.score("dev", "good", "good") == Scored(reward=1.0, passed=True)
    assert "42" not in "".join(capfd.readouterr())


async def test_a_killed_process_is_restarted_and_the_request_retried(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        assert await scorer.score("dev", "crash-once", "crash-once") == Scored(reward=1.0, passed=True)
        assert scorer.restarts == 1
        assert scorer.pid is not None
        os.kill(scorer.pid, signal.SIGKILL)
        assert await scorer.score("dev", "good", "good") == Scored(reward=1.0, passed=True)
        assert scorer.restarts == 2


@pytest.mark.parametrize("example", ["crash", "exit"])
async def test_a_request_that_crashes_the_process_twice_is_unscored_and_harms_no_other(
    tmp_path: Path, example: str
) -> None:
    async with rogue(tmp_path) as scorer:
        names = ["a", example, "b", "c"]
        a, bad, b, c = await asyncio.gather(*(scorer.score("dev", n, n) for n in names))
    assert isinstance(bad, Unscored)
    assert {a, b, c} == {Scored(reward=1.0, passed=True)}


async def test_what_ended_the_process_is_told(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        verdict = await scorer.score("dev", "crash", "crash")
        assert scorer.lost == "the scoring process ended by itself (exit status 3)."
        assert verdict == Unscored(reason=f"Tried 2 times: {scorer.lost}")
        failed = await scorer.score("dev", "exit", "exit")
        assert isinstance(failed, Unscored)
        assert "SystemExit at rogue_process.py" in failed.reason
        assert scorer.lost == ""


async def test_a_process_that_ends_at_each_request_is_started_less_often_and_still_for_each(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        reasons = [await scorer.score("dev", "crash", "crash") for _ in range(5)]
        assert [str(r)[17:28] for r in reasons] == ["Tried 2 tim"] * 3 + ["Tried once:"] * 2
        assert scorer.restarts == 7, "eight tries, the first of them in the process that was there"
        assert await scorer.score("dev", "good", "good") == Scored(reward=1.0, passed=True)
        assert await scorer.score("dev", "crash-once", "crash-once") == Scored(reward=1.0, passed=True)


async def test_a_hung_process_is_killed_and_the_request_unscored(tmp_path: Path) -> None:
    async with rogue(tmp_path, timeout=1.5) as scorer:
        hung = scorer.pid
        verdict = await scorer.score("dev", "hang", "x")
        assert isinstance(verdict, Unscored)
        assert "within 1.5 s" in verdict.reason
        scorer._timeout = 60.0  # so little was for the one that hangs
        assert await scorer.score("dev", "good", "good") == Scored(reward=1.0, passed=True)
        assert scorer.pid != hung


async def test_a_cancelled_request_does_not_give_its_verdict_to_the_next(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        waiting = asyncio.create_task(scorer.score("dev", "hang", "x"))
        while not (tmp_path / "hang").exists():
            assert not waiting.done()
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await scorer.score("dev", "good", "bad") == Scored(reward=0.0, passed=False)


@pytest.mark.parametrize(
    ("task", "message"), [("absent", "no such data"), ("broken", "RuntimeError"), ("dies", "start")]
)
async def test_a_private_face_that_does_not_open_says_why(tmp_path: Path, task: str, message: str) -> None:
    scorer = rogue(tmp_path, task)
    with pytest.raises(ScoringError, match=message) as caught:
        await scorer.start()
    assert "42" not in str(caught.value)
    assert scorer.pid is None


async def test_the_process_gets_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with rogue(tmp_path) as scorer:
        verdict = await scorer.score("dev", "environment", "")
    assert isinstance(verdict, Unscored)
    assert "PATH" in verdict.reason.split()
    assert not {"SOME_API_KEY", "AWS_SECRET_ACCESS_KEY"} & set(verdict.reason.split())


async def test_an_answer_may_be_any_text(tmp_path: Path) -> None:
    async with rogue(tmp_path) as scorer:
        for answer in ("\ud800", "\0", "ä" * 1_000_000, ""):
            assert await scorer.score("dev", "good", answer) == Scored(reward=0.0, passed=False)
        assert scorer.restarts == 0


async def test_a_closed_scorer_leaves_no_process_and_says_so(tmp_path: Path) -> None:
    scorer = rogue(tmp_path)
    await scorer.start()
    assert scorer.pid is not None
    pid = scorer.pid
    await scorer.close()
    assert not os.path.exists(f"/proc/{pid}"), "it has ended and was waited for"
    with pytest.raises(ScoringError, match="not running"):
        await scorer.score("dev", "good", "good")


def test_the_process_dies_with_its_parent_even_while_its_scorer_hangs(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    script = f"""
import asyncio, importlib.util, sys
from bascule.verifiers.scoring import Scorer
class Rogue(Scorer):
    command = ({str(ROGUE)!r},)
async def main():
    scorer = Rogue("rogue", {{"folder": {str(tmp_path)!r}}})
    await scorer.start()
    print(scorer.pid, flush=True)
    await scorer.score("dev", "hang", "x")
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        while not (tmp_path / "hang").exists():
            assert parent.poll() is None
        parent.kill()
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, "the scoring process outlived its parent"
        time.sleep(0.01)


async def test_a_close_that_is_cancelled_still_ends_the_process(tmp_path: Path) -> None:
    scorer = rogue(tmp_path)
    await scorer.start()
    assert scorer.pid is not None
    pid = scorer.pid
    closing = asyncio.create_task(scorer.close())
    while scorer.pid is not None:
        await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(ChildProcessError):  # ended, and waited for
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
