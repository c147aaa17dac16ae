"""Every attack is stopped or scored for what it is, and what would succeed is seen to."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from bascule.plugins.sandbox import Program
from bascule.verifiers.sandbox.layered import LayeredSandbox
from tests import ordinary_user
from tests.attacks import confined
from tests.attacks.__main__ import made
from tests.attacks.attack import HERE, Attack, Outcome, line_of
from tests.attacks.catalog import ATTACKS

QUICK = [a for a in ATTACKS if a.quick]
#: What is run as another user as well: what rests on who one is.
_AS_A_USER = ("sealed_by_path", "sealed_by_descriptors", "fork_bomb", "orphan_children", "hoarder")


@pytest.mark.parametrize("attack", QUICK, ids=lambda a: a.name)
def test_it_is_stopped_or_scored_for_what_it_is(attack: Attack) -> None:
    for row in made(attack):
        assert row.outcome.problems == (), row.outcome
        assert row.outcome.control != "", f"it would have achieved nothing anyway: {row.outcome}"
        assert row.outcome.layer


def test_some_are_stopped_for_an_ordinary_user_too() -> None:
    chosen = [f for name in _AS_A_USER for f in ("--only", name)]
    with ordinary_user.folder() as home:
        ran = ordinary_user.run([sys.executable, "-m", "tests.attacks", *chosen], home=home)
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert f"{len(_AS_A_USER)} attacks" in ran.stdout
    assert "as root" not in ran.stdout


def test_an_attack_that_gets_through_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same judgement, with a sandbox that holds nothing back: what it reads is there to be seen."""
    from bascule.verifiers.sandbox.unsafe import UnsafeSandbox

    monkeypatch.setattr(confined, "LayeredSandbox", UnsafeSandbox)
    play = next(a.play for a in ATTACKS if a.name == "sealed_by_symlink")
    program, harness = asyncio.run(play(tmp_path))
    assert not program.stopped
    assert "bcanary-" in program.problems[0]
    assert harness.stopped


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(place="", control="read it", layer="", result="", problems=("read it",)),
        Outcome(place="", control="", layer="own root", result="found nothing"),
    ],
    ids=["succeeded", "proves nothing"],
)
def test_a_row_that_shows_a_hole_or_shows_nothing_is_no_success(outcome: Outcome) -> None:
    assert not outcome.stopped


def test_every_program_of_the_folders_is_made_and_says_what_it_tries() -> None:
    names = {a.name for a in ATTACKS}
    files = [p for f in ("programs", "harnesses", "kernels", "denoisers") for p in sorted((HERE / f).glob("*.py"))]
    assert {p.stem for p in files} <= names
    assert all(len(line_of(p.read_text())) > 10 for p in files)
    assert len(names) == len(ATTACKS)


def test_programs_need_nothing_but_the_standard_library() -> None:
    code = "import sys; print(*sorted(m for m in sys.modules if m.startswith(('bascule', 'tests'))))"
    files = {"trying.py": (HERE / "trying.py").read_bytes()}
    ran = LayeredSandbox().run(Program(files=files, arguments=("-c", "import trying\n" + code), seconds=600))
    assert (ran.exit_code, ran.stdout.strip()) == (0, b""), ran
    assert os.path.isdir(HERE / "programs")
