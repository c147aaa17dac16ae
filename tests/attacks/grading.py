"""Submissions that flatter themselves: what our scorers make of them, and what the published graders do."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.loader import plugins
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.tasks.sia_dir_submission import pack
from bascule.plugins.wheels import fetch_wheel
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.trajectory import Sampling, Scored
from bascule.verifiers.scoring import Scorer
from tests.attacks.attack import Attack, Outcome, line_of, text_of
from tests.attacks.confined import harness
from tests.attacks.planted import cache

Submission = list[tuple[str, Any]]
"""Example ids with answers, as the published graders take them: any number for one id."""

TASKS = ("gpqa", "longcot-chess", "lawbench", "spaceship-titanic")
#: What our ids have in front of the published ones.
PREFIX = {"gpqa": "gpqa-", "lawbench": "test-"}
COLUMNS = {"lawbench": ("id", "label"), "spaceship-titanic": ("PassengerId", "Transported")}
_KNOWN = 10
_TIMES = 100
#: Where the published grader has no such hole, or there is none.
SOUND = {
    ("one_answer_of_many", "lawbench"),
    ("abstention", "lawbench"),
    ("duplicates", "gpqa"),
    ("prose", "longcot-chess"),
    ("prose", "lawbench"),
    ("permuted", "gpqa"),
    ("permuted", "lawbench"),
}


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How a submission flatters itself.

    Attributes:
        made: from the right answers, the submission.
        worth: the right score, times the number of questions.
        most: the published score above which its grader was deceived.
    """

    tries: str
    made: Callable[[str, dict[str, Any]], Submission]
    worth: int
    most: float = 0.5


def _one(task: str, right: dict[str, Any]) -> Submission:
    del task
    return list(right.items())[:1]


def _again(task: str, right: dict[str, Any]) -> Submission:
    if task == "lawbench":
        # There it has to outweigh the questions that are not answered.
        return list(right.items())[:1] * _TIMES * 20
    return list(right.items())[:1] * _TIMES


def _known(task: str, right: dict[str, Any]) -> Submission:
    del task
    return list(right.items())[:_KNOWN]


def _prose(task: str, right: dict[str, Any]) -> Submission:
    # With a word before it that has no letter A to D.
    return [(i, f"{answer} - this one, or {answer}; I should think {answer}.") for i, answer in right.items()]


def _permuted(task: str, right: dict[str, Any]) -> Submission:
    return [(i, answer[::-1]) for i, answer in right.items() if isinstance(answer, list)]


WAYS = {
    "one_answer_of_many": Way(tries="Answers one question of all, rightly.", made=_one, worth=1),
    "duplicates": Way(tries="Answers one question again and again.", made=_again, worth=1),
    "abstention": Way(tries="Answers only where it is sure, and stays silent elsewhere.", made=_known, worth=_KNOWN),
    "prose": Way(tries="Wraps every answer in prose that names it three times.", made=_prose, worth=0),
    "permuted": Way(tries="Gives the right moves in another order.", made=_permuted, worth=0, most=0.01),
}


def attacks() -> list[Attack]:
    found = [Attack(name=name, tries=way.tries, play=_player(name, way)) for name, way in WAYS.items()]
    tries = line_of(text_of("harnesses", "answers_again"))
    return [*found, Attack(name="answers_again", tries=tries, play=_answered_again, quick=True)]


def _player(name: str, way: Way) -> Any:
    async def play(folder: Path) -> list[Outcome]:
        with cache(folder):
            chosen = TASKS if name != "permuted" else ("longcot-chess",)
            return [o for task in chosen for o in await _scored(name, way, task, folder)]

    return play


async def _scored(name: str, way: Way, task: str, folder: Path) -> list[Outcome]:
    right = truths(task)
    submission = way.made(task, right)
    directory, files = unpacked(task, folder), handed_in(task, submission)
    control: str | None = None
    if (name, task) not in SOUND and task != "spaceship-titanic":
        published = await asyncio.to_thread(by_published, directory, files)
        control = f"published {published:.3f}" if published > way.most else ""
    scores = {
        # Of several answers to one question, an episode has one.
        task: await by_ours(task, dict(submission)),
        f"{task}, its SIA directory": await by_our_grades(directory, files),
    }
    expected = way.worth / len(right)
    return [
        Outcome(
            place=place,
            control=control,
            layer=f"scorer: strict form, {len(right)} the denominator",
            result=f"score {score:.4f}",
            problems=() if score == expected else (f"score {score:.4f} instead of {expected:.4f}",),
        )
        for place, score in scores.items()
    ]


def truths(task: str) -> dict[str, Any]:
    """The right answers of the published questions."""
    if task == "gpqa":
        items = json.loads(_member("gpqa/data/private/diamond_questions.json"))
        return {str(item["id"]): item["correct_answer_letter"] for item in items}
    if task == "longcot-chess":
        found: dict[str, Any] = json.loads(_member("longcot-chess/data/private/answers.json"))
        # Lines of moves first, so that one answer can be any of both kinds.
        return dict(sorted(found.items(), key=lambda pair: isinstance(pair[1], str)))
    rows = csv.DictReader(io.StringIO(_member(f"{task}/data/private/test.csv").decode("utf-8-sig")))
    identity, answer = COLUMNS[task]
    return {row[identity]: row[answer] for row in rows}


async def by_ours(task: str, answers: dict[str, Any]) -> float:
    """The mean reward over all sealed questions, by the real scoring process."""
    examples = plugins().registry.tasks.get(task)({}).public().sealed
    total = 0.0
    found = 0
    async with Scorer(task, {}) as scorer:
        for example in examples:
            identity = example.id.removeprefix(PREFIX.get(task, ""))
            answer = answers.get(identity)
            found += answer is not None
            text = f"[{', '.join(answer)}]" if isinstance(answer, list) else answer
            verdict = await scorer.score("sealed", example.id, text)
            assert isinstance(verdict, Scored), verdict
            total += verdict.reward
    assert found == len(answers), "every answer belongs to a question"
    return total / len(examples)


def handed_in(task: str, submission: Submission) -> dict[str, str]:
    """The files that an agent of the published kind leaves."""
    if task == "gpqa":
        details = [{"question_id": int(i), "model_answer": a} for i, a in submission]
        return {"submission.json": json.dumps({"details": details})}
    if task == "longcot-chess":
        return {"responses.json": json.dumps([{"question_id": i, "solution": a} for i, a in submission])}
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS[task], *submission])
    return {"submission.csv": out.getvalue()}


def unpacked(task: str, folder: Path) -> Path:
    """The published task directory, as it is."""
    inner = f"sia/tasks/{task}/"
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        archive.extractall(folder / "published", [n for n in archive.namelist() if n.startswith(inner)])
    return folder / "published" / inner


def by_published(directory: Path, files: dict[str, str]) -> float:
    """The accuracy that the published grader gives, unchanged."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as generation:
        for name, text in files.items():
            (Path(generation) / name).write_text(text, encoding="utf-8")
        grader = directory / "data" / "public" / "evaluate.py"
        subprocess.run([sys.executable, str(grader), "--gen-dir", generation], check=True, capture_output=True)
        found = json.loads((Path(generation) / "results.json").read_text())
    found = found.get("summary", found)
    # One of the three says percent.
    return float(found["accuracy"]) / (100 if directory.name == "longcot-chess" else 1)


async def by_our_grades(directory: Path, files: dict[str, str]) -> float:
    """The reward of the same files where the published directory is run as a task, graded by ours."""
    async with Scorer("sia-dir", {"path": str(directory), "grader": "ours"}) as scorer:
        verdict = await scorer.score("dev", "dev-1", pack(files))
    assert isinstance(verdict, Scored), verdict
    return verdict.reward


async def _answered_again(folder: Path) -> list[Outcome]:
    """A hundred frames with an answer, and which of them count."""
    del folder
    pool = HarnessPool()
    spec = EpisodeSpec(
        trajectory="g00-dev-0001-n0",
        harness=harness({"harness.py": text_of("harnesses", "answers_again")}),
        example={"say": "A"},
        sampling=Sampling(),
        seed=1,
    )
    try:
        trajectory = await run_episode(spec, ConstantEngine("7"), pool, dict)
    finally:
        await pool.close()
    alone = trajectory.answer == "A" and not trajectory.steps and trajectory.error is None
    return [
        Outcome(
            place="harness",
            control=None,
            layer="broker: an episode ends with its answer",
            result="one answer",
            problems=() if alone else (f"{trajectory}",),
        )
    ]


def _member(name: str) -> bytes:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        return archive.read(f"sia/tasks/{name}")
