"""What the scoring process gives up: it is nobody that anyone else can look into or be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.schemas.trajectory import Scored, Unscored
from bascule.verifiers.privileges import SCORING_UID
from bascule.verifiers.sandbox.plans import FIRST_UID, UIDS
from bascule.verifiers.scoring import Scorer

ROGUE = Path(__file__).with_name("rogue_process.py")
READING = (2, 1)  # CAP_DAC_READ_SEARCH, or CAP_DAC_OVERRIDE where a container's root lacks that

#: Starts a scorer as an ordinary user and then looks into it and, for comparison, into a plain child.
LOOKS = """
import asyncio, json, os, subprocess, sys
from bascule.verifiers.privileges import drop
from bascule.verifiers.scoring import Scorer

class Rogue(Scorer):
    command = (sys.argv[1],)

def look(pid):
    found = {}
    for name in ("environ", "mem", "maps", "fd/0"):
        try:
            path = f"/proc/{pid}/{name}"
            os.readlink(path) if name == "fd/0" else open(path, "rb").close()
            found[name] = "open"
        except OSError as e:
            found[name] = type(e).__name__
    return found

async def main():
    async with Rogue("rogue", {"folder": sys.argv[2]}) as scorer:
        plain = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        plain.stdout.readline()
        said = {"uids": [os.getuid(), scorer.uid], "scorer": look(scorer.pid), "plain": look(plain.pid)}
        said["verdict"] = (await scorer.score("dev", "good", "good")).reward
        plain.communicate(b"\\n")
    print(json.dumps(said))

drop(int(sys.argv[3]))
asyncio.run(main())
"""


class RogueScorer(Scorer):
    command = (str(ROGUE),)


def status(pid: int | None) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_scorers_user_is_no_programs() -> None:
    assert SCORING_UID not in range(FIRST_UID, FIRST_UID + UIDS)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_as_root_it_becomes_another_user_who_can_read_and_nothing_else(tmp_path: Path) -> None:
    closed = tmp_path / "roots"
    closed.mkdir(mode=0o700)
    (closed / "late.txt").write_text("late")
    tmp_path.chmod(0o777)
    async with RogueScorer("rogue", {"folder": str(tmp_path)}) as scorer:
        found = status(scorer.pid)
        assert found["NoNewPrivs"] == "1"
        held = {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")}
        if scorer.uid == 0:  # a container's root that cannot become somebody else
            assert int(found["CapPrm"], 16) == 0
            return
        assert found["Uid"].split() == found["Gid"].split() == [str(SCORING_UID)] * 4
        assert found["Groups"] == ""
        assert held <= {1 << c for c in READING}
        assert await scorer.score("dev", "closed", "late") == Scored(reward=1.0), "what is imported late is readable"
        if int(found["CapPrm"], 16) == 1 << READING[0]:
            refused = await scorer.score("dev", "write", "")
            assert isinstance(refused, Unscored)
            assert "PermissionError" in refused.reason
            assert not (closed / "new.txt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_another_process_of_the_scorers_user_cannot_look_into_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    async with RogueScorer("rogue", {"folder": str(tmp_path)}) as scorer:
        if scorer.uid == 0:  # a container's root that cannot become somebody else
            assert int(status(scorer.pid)["CapPrm"], 16) == 0
            return
        for name in ("environ", "maps", "mem"):
            done = subprocess.run(
                ["/bin/cat", f"/proc/{scorer.pid}/{name}"],
                user=SCORING_UID, group=SCORING_UID, extra_groups=[], capture_output=True, check=False,
            )  # fmt: skip
            assert done.returncode != 0
            assert not done.stdout
        own = subprocess.run(
            ["/bin/cat", "/proc/self/environ"], user=SCORING_UID, group=SCORING_UID, extra_groups=[],
            env={"A": "1"}, capture_output=True, check=True,
        )  # fmt: skip
        assert own.stdout == b"A=1\0", "that user can look into itself"


async def test_it_leaves_no_core_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    async with RogueScorer("rogue", {"folder": str(tmp_path)}) as scorer:
        (limit,) = (x for x in Path(f"/proc/{scorer.pid}/limits").read_text().splitlines() if "core file" in x)
    assert limit.split()[4:6] == ["0", "0"]


def test_an_ordinary_users_own_processes_cannot_look_into_it(tmp_path: Path) -> None:
    ordinary = 61234
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", LOOKS, str(ROGUE), str(tmp_path), str(ordinary)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["verdict"] == 1.0
    assert len(set(said["uids"])) == 1, "an ordinary user cannot become another"
    assert set(said["plain"].values()) == {"open"}, "one process of a user can look into another"
    assert set(said["scorer"].values()) == {"PermissionError"}
