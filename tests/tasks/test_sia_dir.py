"""`sia-dir`: task directories of SIA as they are: their agents run confined, and their gaps are not ours."""

from __future__ import annotations

import json
import os
import zlib
from base64 import b85encode
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.sandbox import Program, Ran, Running
from bascule.plugins.task import PrivateFace
from bascule.plugins.tasks import sia_dir_submission as submission
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.tasks.sia_dir import SiaDir, named
from bascule.plugins.tasks.sia_dir_files import shape_of
from bascule.plugins.tasks.sia_dir_grades import NoFigure, correct, figure_of, key_of, read
from bascule.plugins.tasks.sia_dir_private import SiaEvaluated, handed_in
from bascule.plugins.tasks.sia_dir_submission import NotASubmission, collect, pack, unpack
from bascule.plugins.wheels import extract, fetch_wheel
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.runtime.redaction import process_redaction
from bascule.runtime.restricted import withholding
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import make_harness
from bascule.schemas.trajectory import ModelCall, Sampling, Scored, Trajectory, Unscored
from bascule.verifiers.sandbox.layered import LayeredSandbox

TRUTHS = {"1": "plum", "2": "pear", "3": "fig", "4": "medlar"}
SAMPLE = "id,label\n" + "".join(f"{i},none\n" for i in TRUTHS)
ANSWERING = """
import argparse, pathlib
from openai import OpenAI
options = argparse.ArgumentParser()
options.add_argument("--dataset_dir", type=pathlib.Path)
options.add_argument("--working_dir", type=pathlib.Path)
given = options.parse_args()
ids = [line.split(",")[0] for line in (given.dataset_dir / "sample_submission.csv").read_text().splitlines()[1:]]
"""
WRITING = (
    '\n(given.working_dir / "submission.csv").write_text("id,label\\n" + "".join(f"{i},{said}\\n" for i in ids))\n'
)
EVALUATOR = """
import argparse, csv, json, pathlib
options = argparse.ArgumentParser()
options.add_argument("--gen-dir", type=pathlib.Path)
folder = options.parse_args().gen_dir
private = pathlib.Path(__file__).parent.parent / "private"
truth = {r["id"]: r["label"] for r in csv.DictReader((private / "test.csv").open())}
rows = list(csv.DictReader((folder / "submission.csv").open()))
right = sum(truth[r["id"]] == r["label"] for r in rows)
"""
DONE = '(folder / "results.json").write_text(json.dumps({"accuracy": right / len(rows)}))\nexit(0)\n'


def directory(folder: Path, agent: str = "", *, evaluator: str | None = EVALUATOR + DONE, sample: bool = True) -> Path:
    """A small directory of the form that SIA gives lawbench."""
    files = {
        "data/public/task.md": "Name the fruit.",
        "data/private/test.csv": "id,label\n" + "".join(f"{i},{label}\n" for i, label in TRUTHS.items()),
        "reference/reference_target_agent.py": agent,
    }
    if sample:
        files["data/public/sample_submission.csv"] = SAMPLE
    if evaluator is not None:
        files["data/public/evaluate.py"] = evaluator
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def task(path: Path, **params: Any) -> SiaDir:
    chosen = named(str(path))
    assert chosen is not None
    return SiaDir({**chosen["params"], **params})


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SIA's own four directories."""
    folder = tmp_path_factory.mktemp("four")
    extract(fetch_wheel(*WHEEL), "sia/tasks", folder)
    return folder


async def play(pool: HarnessPool, chosen: SiaDir, says: str = "A") -> Trajectory:
    """One episode of a task on a model that always says the same."""
    spec = EpisodeSpec(
        trajectory="g00-dev-0000-n0",
        harness=make_harness(process_redaction().value(chosen.harness())),
        example=chosen.public().dev[0].input,
        sampling=Sampling(),
        seed=1,
    )
    return await run_episode(spec, ConstantEngine(says), pool, dict)


@pytest.fixture
async def played(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Plays episodes in the sandbox."""
    pool = HarnessPool(children=2, without=getattr(request, "param", ()))
    yield partial(play, pool)
    await pool.close()


def rows(*pairs: tuple[str, str]) -> str:
    """An answer with these rows."""
    return pack({"submission.csv": "id,label\n" + "".join(f"{i},{label}\n" for i, label in pairs)})


def evaluated(path: Path) -> PrivateFace:
    """The directory's own evaluator, with a sandbox."""
    face = task(path, grader="theirs").private()
    assert isinstance(face, SiaEvaluated)
    face.use(LayeredSandbox())
    return face


async def test_a_directorys_agent_runs_as_it_is_and_its_submission_is_the_answer(
    tmp_path: Path, played: Callable[..., Any]
) -> None:
    ask = (
        'said = OpenAI().chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], max_tokens=9)'
    )
    chosen = task(directory(tmp_path / "fruit", f"{ANSWERING}{ask}.choices[0].message.content{WRITING}"))
    run = await played(chosen, "pear")
    assert run.error is None
    assert unpack(run.answer or "") == {"submission.csv": "id,label\n1,pear\n2,pear\n3,pear\n4,pear\n"}
    (call,) = [step for step in run.steps if isinstance(step, ModelCall)]
    assert (call.outputs[0].text, call.sampling.max_tokens) == ("pear", 9)
    assert chosen.private().score("dev", "dev-1", run.answer) == Scored(reward=0.25, passed=False)
    assert chosen.public().name == "fruit"


@pytest.mark.parametrize("played", [(), ("namespaces",)], ids=["namespaces", "none"], indirect=True)
async def test_every_sdk_that_sias_agents_use_asks_the_episodes_model(
    tmp_path: Path, played: Callable[..., Any]
) -> None:
    agent = """
import asyncio, os, anthropic
from dotenv import load_dotenv
from google import genai
from google.genai import types
from openai import AsyncOpenAI, OpenAIError
from tqdm.asyncio import tqdm
exec("from pyd" + "antic import BaseModel")  # not seen by who looks what the agent imports, so it is not given any
class Answer(BaseModel):
    letter: str = ""
assert Answer(letter="A").letter == "A"
load_dotenv()
key = os.environ["GEMINI_API_KEY"]
tools = [{"name": "look", "input_schema": {}}]
claude = anthropic.Anthropic().messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "?"}],
                                               system="s", tools=tools)
assert claude.stop_reason == "tool_use" and claude.content[0].input == {"at": 1}
turns = [{"role": "assistant", "content": claude.content},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]}]
claude = anthropic.Anthropic().messages.create(model="m", max_tokens=5, messages=turns)
gemini = genai.Client(api_key=key).models.generate_content(
    model="m", contents="?", config=types.GenerateContentConfig(max_output_tokens=7))
async def ask():
    client = AsyncOpenAI(api_key=key, base_url="https://nowhere.invalid/v1")
    return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
async def main():
    return await tqdm.gather(*[ask() for _ in range(3)])
texts = [r.choices[0].message.content for r in asyncio.run(main())]
texts += [claude.content[0].text, gemini.candidates[0].content.parts[0].text]
said = str(len(set(texts)))
try:
    AsyncOpenAI().audio
except OpenAIError:
    said += " refused"
"""
    run = await played(
        task(directory(tmp_path / "fruit", ANSWERING + agent + WRITING)), '{"tool": "look", "input": {"at": 1}}'
    )
    assert run.error is None
    assert "1,1 refused\n" in unpack(run.answer or "")["submission.csv"]
    assert sum(isinstance(step, ModelCall) for step in run.steps) == 6


async def test_an_agent_finds_no_private_file_wherever_it_looks(tmp_path: Path, played: Callable[..., Any]) -> None:
    path = tmp_path / "fruit"
    hostile = f"""
import glob, os
places = [given.dataset_dir / "../private/test.csv", {str(path / "data/private/test.csv")!r}, "/proc/1/environ"]
places += glob.glob(str(given.dataset_dir.parent) + "/*") + glob.glob("/tmp/*.csv")
places += glob.glob("/proc/*/root{path}/data/private/*") + glob.glob("/proc/*/cwd/data/private/*")
text = " ".join(os.environ.values())
for place in places:
    try:
        text += open(place).read()
    except OSError:
        pass
said = "found" if "1,plum" in text else "nothing"
"""
    chosen = task(directory(path, ANSWERING + hostile + WRITING))
    run = await played(chosen)
    assert run.error is None
    assert unpack(run.answer or "")["submission.csv"] == SAMPLE.replace("none", "nothing")
    assert "medlar" not in json.dumps(chosen.public().dev[0].input) + json.dumps(chosen.harness())
    unconfined = HarnessPool(unsafe=True)
    run = await play(unconfined, chosen)
    await unconfined.close()
    assert "1,found\n" in unpack(run.answer or "")["submission.csv"], "the agent finds it where nothing confines it"


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ('os.symlink(given.dataset_dir / "sample_submission.csv", given.working_dir / "submission.csv")', "is a link"),
        ('os.mkfifo(given.working_dir / "submission.csv")', "no plain file"),
        ('(given.working_dir / "submission.csv").write_bytes(bytes([255]) * 9)', "no UTF-8 text"),
        ('(given.working_dir / "submission.csv").write_text("x" * 9_000_000)', "is too long"),
        ('(given.working_dir / "submission.csv").write_text(random.randbytes(30_000).hex())', "the limit is 16384"),
        ("raise SystemExit('no way')", "left no submission; it exited with 1"),
        ("import sklearn_of_mine", "it raised ModuleNotFoundError"),
    ],
)
async def test_what_cannot_be_handed_in_is_a_failure_that_names_the_reason(
    does: str, reason: str, tmp_path: Path, played: Callable[..., Any]
) -> None:
    run = await played(task(directory(tmp_path / "fruit", f"{ANSWERING}\nimport os, random\n{does}\n")))
    assert run.answer is None
    assert run.error is not None
    assert run.error.kind == "crash"
    assert reason in run.error.message


def test_a_link_in_a_generation_leads_to_no_submission_and_no_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "answers.json").write_text("{}")
    gen = tmp_path / "gen"
    gen.mkdir()
    os.symlink(secret, gen / "results")
    assert collect(str(gen)) == {}
    os.symlink(secret / "answers.json", gen / "responses.json")
    with pytest.raises(NotASubmission, match=r"responses\.json is a link"):
        collect(str(gen))


def test_of_several_results_the_newest_counts(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name, time in (("b.json", 100), ("a.json", 200)):
        (tmp_path / "results" / name).write_text(f'"{name}"')
        os.utime(tmp_path / "results" / name, (time, time))
    assert collect(str(tmp_path)) == {"results/a.json": '"a.json"'}


def test_a_long_submission_is_an_answer_if_it_compresses_and_only_then() -> None:
    text = "id,label\n" + "".join(f"{i},theft\n" for i in range(4000))
    assert unpack(pack({"submission.csv": text})) == {"submission.csv": text}
    with pytest.raises(NotASubmission, match="the limit is 16384"):
        pack({"submission.csv": text}, compress=False)


BOMB = submission.PACKED + b85encode(zlib.compress(b" " * (submission.MAX_FILES + 1))).decode()


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "",
            "A",
            "sia-submission\n[]",
            "sia-submission\n{}",
            'sia-submission\n{"a": 1}',
            "sia-submission\n" + "[" * 9999,
        ),
        *('sia-submission\n{"../x": ""}', 'sia-submission\n{"/x": ""}', 'sia-submission\n{"a/b/c": ""}'),
        *(submission.PACKED + "~~", submission.PACKED + "00000", BOMB),
    ],
)
def test_an_answer_that_is_no_submission_scores_0_whoever_grades(answer: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "fruit")
    for face in (task(path).private(), task(path, grader="theirs").private()):
        verdict = face.score("dev", "dev-1", answer)
        assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_ours_divides_by_all_that_is_asked_and_theirs_by_what_was_handed_in(tmp_path: Path) -> None:
    path = directory(tmp_path / "fruit")
    ours, theirs = task(path).private(), evaluated(path)
    for answer, strict, published in (
        (rows(("1", "plum")), 0.25, 1.0),
        (rows(*[("1", "plum")] * 8), 0.25, 1.0),
        (rows(("1", "plum"), ("1", "fig"), ("2", "pear")), 0.25, 2 / 3),
        (rows(*TRUTHS.items()), 1.0, 1.0),
    ):
        mine, verdict = ours.score("dev", "dev-1", answer), theirs.score("dev", "dev-1", answer)
        assert isinstance(mine, Scored)
        assert mine.reward == strict
        assert verdict == Scored(reward=published)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("raise ValueError('the answer is medlar')", "ended with 1 (ValueError)"),
        ("raise SystemExit(3)", "ended with 3"),
        ("", "left no results.json"),
        ('(folder / "results.json").symlink_to(pathlib.Path(__file__).parent / "task.md")', "left no results.json"),
        (
            '(folder / "results.json").write_text(json.dumps({"accuracy": float("nan")}))',
            "accuracy in results.json is nan",
        ),
        ('(folder / "results.json").write_text("{")', "no JSON"),
        ('(folder / "results.json").write_text(json.dumps({"accuracy": "medlar"}))', "no number accuracy"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "ended with 1"),
    ],
)
def test_an_evaluator_that_fails_leaves_unscored_and_quotes_nothing(ending: str, reason: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "fruit", evaluator=f"{EVALUATOR}\nimport sys\nprint(truth)\n{ending}\n", sample=False)
    verdict = evaluated(path).score("dev", "dev-1", rows(("1", "plum")))
    assert isinstance(verdict, Unscored)
    assert reason in verdict.reason
    assert "medlar" not in verdict.reason


@pytest.mark.parametrize("submission_patterns", [[], ["*.json", "*.csv"]], ids=["usual", "any"])
def test_a_submission_brings_no_figure_of_its_own_past_an_evaluator_that_is_silent(
    submission_patterns: list[str], tmp_path: Path
) -> None:
    names = ("results.json", "evaluation_results.json")
    seen = f"assert not any((folder / name).exists() for name in {names})\n"
    path = directory(tmp_path / "fruit", evaluator=f"{EVALUATOR}\n{seen}", sample=False)
    face = task(path, grader="theirs", submission=submission_patterns).private()
    assert isinstance(face, SiaEvaluated)
    face.use(LayeredSandbox())
    forged = {name: json.dumps({"accuracy": 1.0}) for name in names}
    verdict = face.score("dev", "dev-1", pack({"submission.csv": "id,label\n1,fig\n", **forged}))
    assert isinstance(verdict, Unscored)
    assert "left no results.json" in verdict.reason
    assert face.score("dev", "dev-1", pack(forged)) == Scored(reward=0.0, passed=False, well_formed=False)


def test_of_an_answer_only_files_that_match_the_patterns_are_handed_in() -> None:
    files = dict.fromkeys(
        ("submission.csv", "results/a.json", "evaluate.py", "results/a.py", "more/submission.csv"), ""
    )
    assert list(handed_in(files)) == ["submission.csv", "results/a.json"]
    assert list(handed_in(files, ["more/*.csv", "*.py"])) == ["evaluate.py", "more/submission.csv"]


class Failing:
    """A sandbox that starts programs only as often as it is told, and then no more."""

    def __init__(self, starts: int) -> None:
        self._starts = starts
        self._real = LayeredSandbox()

    def run(self, program: Program) -> Ran:
        if not self._starts:
            return Ran(ending="refused", stderr=b"no memory cgroup")
        self._starts -= 1
        return self._real.run(program)

    def start(self, program: Program) -> Running:
        return self._real.start(program)


@pytest.mark.parametrize("starts", [0, 1], ids=["on the submission", "on the sample"])
def test_a_sandbox_that_does_not_start_an_evaluator_is_no_fault_of_a_submission(starts: int, tmp_path: Path) -> None:
    face = task(directory(tmp_path / "fruit"), grader="theirs").private()
    assert isinstance(face, SiaEvaluated)
    broken = rows(("99", "plum"))
    face.use(LayeredSandbox())
    assert isinstance(face.score("dev", "dev-1", broken), Scored), "it works on the sample, and that is known"
    for known in (face, task(directory(tmp_path / "fruit"), grader="theirs").private()):
        assert isinstance(known, SiaEvaluated)
        known.use(Failing(0 if known is face else starts))
        verdict = known.score("dev", "dev-1", broken)
        assert isinstance(verdict, Unscored)
        assert "no memory cgroup" in verdict.reason
    known.use(LayeredSandbox())
    assert known.score("dev", "dev-1", broken) == Scored(reward=0.0, passed=False, well_formed=False)


def test_a_submission_that_breaks_an_evaluator_that_works_scores_0(tmp_path: Path) -> None:
    face = evaluated(directory(tmp_path / "fruit"))
    assert face.score("dev", "dev-1", rows(("99", "plum"))) == Scored(reward=0.0, passed=False, well_formed=False)


def test_a_directory_that_nothing_can_grade_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data/public/evaluate\.py"):
        task(directory(tmp_path / "a", evaluator=None, sample=False)).private()
    with pytest.raises(ConfigError, match="no grader of ours"):
        task(directory(tmp_path / "b", sample=False), grader="ours").private()


def test_a_directory_that_has_changed_is_refused_and_what_is_beside_it_stays_private(tmp_path: Path) -> None:
    path = directory(tmp_path / "fruit")
    chosen = task(path)
    for beside in ("data/private", "data", ".", "../fruit/data/private", "nowhere"):
        with pytest.raises(ConfigError, match="private"):
            task(path, beside=beside).public()
    (path / "data/public/task.md").write_text("Name another.")
    with pytest.raises(ConfigError, match="has changed"):
        chosen.public()
    assert named(str(tmp_path)) is None


def test_repeats_makes_more_examples_that_ask_the_same(tmp_path: Path) -> None:
    public = task(directory(tmp_path / "fruit"), repeats=3).public()
    assert [e.id for e in public.sealed] == ["sealed-1", "sealed-2", "sealed-3"]
    assert "ask the same" in public.description
    assert public.answers == {"train-1": "", "train-2": "", "train-3": ""}
    with pytest.raises(ConfigError, match="repeats"):
        task(directory(tmp_path / "fruit"), repeats=0)


def test_letters_are_single_letters_and_moves_are_in_order(four: Path) -> None:
    def shared(name: str, file: str, records: Any) -> float:
        data = four / name / "data"
        shape = shape_of({p.name: p.read_bytes() for p in (data / "public").iterdir()})
        key = key_of(shape, {p.name: p.read_bytes() for p in (data / "private").iterdir()})
        assert key is not None
        return correct(key, read(shape, {file: json.dumps(records)})) / len(key)

    questions = json.loads((four / "gpqa/data/private/diamond_questions.json").read_text())
    right = {q["id"]: q["correct_answer_letter"] for q in questions}
    for said, score in (("{}", 1.0), (" {} ", 1.0), ("The answer is {}", 0.0), ("{}BCD", 0.0), ("", 0.0)):
        records = [{"question_id": i, "model_answer": said.format(letter)} for i, letter in right.items()]
        assert shared("gpqa", "results/x.json", {"details": records}) == score
    one = [{"question_id": i, "model_answer": letter} for i, letter in list(right.items())[:1]]
    assert shared("gpqa", "results/x.json", {"details": one}) == 1 / 198
    moves = json.loads((four / "longcot-chess/data/private/answers.json").read_text())
    chess = [{"question_id": i, "solution": s if isinstance(s, list) else int(s)} for i, s in moves.items()]
    assert shared("longcot-chess", "responses.json", chess) == 1.0
    turned = [{**c, "solution": c["solution"][::-1] if isinstance(c["solution"], list) else None} for c in chess]
    palindromes = sum(isinstance(s, list) and s == s[::-1] for s in moves.values())
    assert shared("longcot-chess", "responses.json", turned) == palindromes / 50


@pytest.mark.parametrize(
    ("results", "figure"),
    [
        ({"accuracy": 0.5}, 0.5),
        ({"accuracy": 0.005, "accuracy_percent": 0.5}, 0.005),
        ({"accuracy": 62.5}, 0.625),
        ({"summary": {"accuracy": 0.5, "correct": 1, "total_questions": 200}}, 0.005),
    ],
)
def test_a_fraction_and_a_percentage_are_told_apart(results: dict[str, Any], figure: float) -> None:
    assert figure_of(json.dumps(results).encode()) == figure


@pytest.mark.parametrize(
    "results", [{"accuracy": 101}, {"accuracy": -1}, {"accuracy": True}, {"accuracy": 10**400}, []]
)
def test_a_figure_that_is_none_is_not_taken(results: Any) -> None:
    with pytest.raises(NoFigure):
        figure_of(json.dumps(results).encode())


async def test_sias_four_directories_run_unchanged_and_those_agents_that_fail_say_why(
    four: Path, played: Callable[..., Any]
) -> None:
    run = await played(task(four / "gpqa"))
    assert run.error is None
    verdict = task(four / "gpqa").private().score("dev", "dev-1", run.answer)
    assert isinstance(verdict, Scored)
    assert verdict.reward == 57 / 198
    assert evaluated(four / "gpqa").score("dev", "dev-1", run.answer) == Scored(reward=57 / 198)

    run = await played(task(four / "longcot-chess"), "solution = 200")
    assert run.error is None
    verdict = task(four / "longcot-chess").private().score("dev", "dev-1", run.answer)
    assert isinstance(verdict, Scored)
    assert verdict.reward == 1 / 50

    # This agent reads a file that SIA does not give it, so it fails there as well.
    run = await played(task(four / "lawbench"))
    assert run.error is not None
    assert "left no submission; it exited with 1" in run.error.message

    # This one writes another file than is asked for.
    run = await played(task(four / "spaceship-titanic"))
    assert run.error is not None
    assert "left no submission; it exited with 0" in run.error.message


@pytest.mark.parametrize("played", [("namespaces",)], ids=["none"], indirect=True)
async def test_an_agent_that_needs_what_lies_beside_gets_it_and_its_packages(
    four: Path, played: Callable[..., Any]
) -> None:
    chosen = task(four / "lawbench", beside="data/training_data")
    run = await played(chosen)
    assert run.error is None
    verdict = chosen.private().score("dev", "dev-1", run.answer)
    assert isinstance(verdict, Scored)
    assert verdict.reward == 5 / 913


def test_the_directory_without_an_evaluator_is_graded_by_ours(four: Path) -> None:
    face = task(four / "spaceship-titanic").private()
    sample = (four / "spaceship-titanic/data/public/sample_submission.csv").read_text()
    verdict = face.score("sealed", "sealed-1", pack({"submission.csv": sample}))
    assert isinstance(verdict, Scored)
    assert round(verdict.reward * 870) == 438


def test_a_restricted_directorys_agent_and_answers_are_recorded_whole(four: Path) -> None:
    chosen = task(four / "gpqa")
    public = chosen.public()
    withheld = withholding(public)
    assert public.restricted
    assert withheld is not None
    assert withheld.value(chosen.harness()) == chosen.harness()
    for baseline in chosen.baselines(public):
        answer = baseline.answers["sealed"]["sealed-1"]
        assert withheld.text(answer) == answer
    question = json.loads((four / "gpqa/data/public/diamond_questions.json").read_text())[0]["Question"]
    quoting = json.dumps([{"question_id": 1, "model_answer": question}])
    assert "[restricted:" in withheld.text(pack({"results/x.json": quoting}, compress=False))
