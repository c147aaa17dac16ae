"""`bascule experiment` and `bascule run --harness`: faults are said by name, runs are real and go on after any end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.plugins.loader import plugins
from bascule.plugins.tasks.harness_files import reference_files
from bascule.runtime.cli import launch
from bascule.runtime.cli.app import app
from bascule.runtime.cli.experiment_file import read_experiment
from bascule.runtime.cli.experiment_runs import duration, make_runs, start_of
from bascule.runtime.cli.harness_folder import harness_in
from bascule.runtime.cli.store import Store, open_store
from bascule.runtime.experiments.votes import MOST
from bascule.schemas import events as ev
from bascule.schemas.errors import BasculeError, ConfigError, EngineError, HarnessError, ScoringError
from bascule.schemas.harness import MAX_BYTES, make_harness

SHIPPED = sorted((Path(__file__).parents[2] / "ops" / "experiments").glob("*.toml"))
RUN = """
[run]
task = "arith"
levers = ["harness"]
max_generations = 1
gate = { guard = "none" }
engine = { name = "constant", params = { text = "7" } }
author = { name = "operators", params = { episodes = 0 } }
[run.evaluation]
dev_examples = 6
sealed_examples = 6
train_groups = 1
train_samples = 1
"""
HEAD = '[experiment]\nname = "tiny"\nseeds = [1]\n'
CONSTANT = ("--engine", "constant", "--set", "engine.text=seven", "--levers", "harness")
BUDGET = "[run.budget]\nrollouts = 60\n"
ARMS = '[arms.harness]\n[arms.votes]\nkind = "best-of-n"\nn = 3\n'


def written(folder: Path, text: str, name: str = "e.toml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def harness_folder(folder: Path, **changes: str | None) -> Path:
    """The reference code under other parameters; ``changes`` are files, None for one that is not there."""
    files: dict[str, str | None] = {
        **reference_files(name="mine", system_prompt="Say the number.", params={"extract": "last_integer"}),
        **changes,
    }
    for name, text in files.items():
        if text is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return folder


def invoked(*args: str, home: Path) -> Any:
    done = CliRunner().invoke(app, [*args, "--home", str(home)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def on_store(home: Path, work: Callable[[Store], Any]) -> Any:
    async def opened() -> Any:
        async with open_store(home, exclusive=True, writes=True) as store:
            return await work(store)

    return asyncio.run(opened())


# --- the file ---


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
@pytest.mark.parametrize("quick", [False, True])
def test_an_experiment_that_is_shipped_is_one(file: Path, quick: bool) -> None:
    found = read_experiment(file, plugins(), quick=quick)
    assert len(found.arms) >= 5
    assert set(found.baselines) <= {arm.name for arm in found.arms}
    assert found.baselines
    first = found.arms[0].config.budget
    assert first.rollouts
    assert all(arm.config.budget == first for arm in found.arms)
    assert found.name.endswith("-quick") == quick


def test_the_shipped_experiment_has_every_arm_that_the_question_needs() -> None:
    found = read_experiment(next(f for f in SHIPPED if f.stem == "embedded"), plugins())
    levers = {arm.name: arm.levers for arm in found.arms}
    assert levers == {
        "harness": ("harness",),
        "weights": ("weights",),
        "weights-from-handwritten": ("weights",),
        "both": ("harness", "weights"),
        "alternate": ("harness", "weights"),
        "best-of-n": (),
    }
    by_name = {arm.name: arm for arm in found.arms}
    given = by_name["weights-from-handwritten"].config.harness
    assert make_harness(given).manifest.name
    votes = by_name["best-of-n"]
    assert votes.votes == (votes.config.budget.rollouts or 0) // 150
    assert make_harness(votes.config.harness).manifest.params["votes"] == votes.votes
    assert votes.config.max_generations == 0
    assert by_name["alternate"].config.policy.name == "alternate"


@pytest.mark.parametrize(("option", "text"), [("--only", ""), ("--only", " ,"), ("--seeds", "")])
def test_an_option_that_names_nothing_does_not_mean_everything(tmp_path: Path, option: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} names none"):
        invoked("experiment", str(written(tmp_path, HEAD + RUN + ARMS)), option, text, home=tmp_path / "home")


@pytest.mark.parametrize("params", [{"extract": "last_int"}, {"extract": 5}, {"retries": None}, {"retries": "two"}])
def test_votes_are_refused_of_a_harness_whose_parameters_its_code_cannot_use(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    files = reference_files(name="mine", system_prompt="Say the number.", params=params)
    harness_folder(tmp_path / "mine", **files)
    text = HEAD + RUN + BUDGET + '[arms.votes]\nkind = "best-of-n"\nharness = "mine"\n'
    with pytest.raises(ConfigError, match="parameters that its code cannot use"):
        read_experiment(written(tmp_path, text), plugins())


def test_what_quick_says_is_laid_over_the_run_and_arms_over_that(tmp_path: Path) -> None:
    text = HEAD + RUN + BUDGET + "[quick]\nseeds = [7]\nshard_size = 4\n[quick.budget]\nrollouts = 30\n"
    file = written(tmp_path, text + "[arms.harness]\nmax_generations = 2\n")
    whole, quick = read_experiment(file, plugins()), read_experiment(file, plugins(), quick=True)
    assert (whole.seeds, whole.arms[0].config.budget.rollouts, whole.arms[0].config.shard_size) == ((1,), 60, 32)
    assert (quick.seeds, quick.arms[0].config.budget.rollouts, quick.arms[0].config.shard_size) == ((7,), 30, 4)
    assert quick.arms[0].config.max_generations == 2
    assert (whole.run("harness", 1), quick.run("harness", 7)) == ("tiny-harness-s1", "tiny-quick-harness-s7")
    assert read_experiment(file, plugins(), seeds=[4, 5]).seeds == (4, 5)


def test_a_profile_is_below_the_run_and_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 'seed = 9\nlevers = ["harness"]\nshard_size = 5\nconcurrency = 8\n', "p.toml")
    harness_folder(tmp_path / "mine")
    monkeypatch.chdir("/")
    text = (
        HEAD
        + '[run]\nprofile = "p.toml"\nshard_size = 6\nengine = { name = "constant", params = { text = "7" } }\n'
        + BUDGET
    )
    arm = '[arms.harness]\nharness = "mine"\n'
    (found,) = read_experiment(written(tmp_path, text + arm), plugins()).arms
    assert (found.config.task.name, found.config.shard_size, found.config.concurrency) == ("arith", 6, 8)
    assert found.config.harness["system_prompt.md"] == "Say the number.\n"


def test_parameters_of_the_task_alone_are_the_usual_tasks(tmp_path: Path) -> None:
    text = HEAD + RUN.replace('task = "arith"\n', "") + "[run.task.params]\nregression = 3\n" + BUDGET + ARMS
    task = read_experiment(written(tmp_path, text), plugins()).arms[0].config.task
    assert (task.name, task.params["regression"]) == ("arith", 3)


def test_votes_follow_from_the_budget_unless_they_are_given(tmp_path: Path) -> None:
    text = HEAD + RUN + "[run.budget]\nrollouts = MANY\n[arms.votes]\nkind = 'best-of-n'\n"
    for rollouts, votes in ((60, 10), (3, 1), (10**6, MOST)):
        (arm,) = read_experiment(written(tmp_path, text.replace("MANY", str(rollouts))), plugins()).arms
        assert arm.votes == votes
    (given,) = read_experiment(written(tmp_path, text.replace("MANY", "60") + "n = 4\n"), plugins()).arms
    assert make_harness(given.config.harness).manifest.params["votes"] == given.votes == 4
    assert make_harness(given.config.harness).manifest.max_model_calls >= 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = \n", r"no valid TOML"),
        (RUN + BUDGET + ARMS, r"experiment\.name is missing"),
        (HEAD + RUN + BUDGET, r"no arms"),
        (HEAD + "seed = 3\n" + RUN + BUDGET + ARMS, r"experiment\.seed is unknown"),
        (HEAD.replace("[1]", "['a']") + RUN + BUDGET + ARMS, r"experiment\.seeds\[0\]"),
        (HEAD.replace("[1]", "[]") + RUN + BUDGET + ARMS, r"experiment\.seeds"),
        (HEAD.replace("[1]", "[1, 1]") + RUN + BUDGET + ARMS, r"seed is there twice"),
        (HEAD.replace("tiny", "Tiny one") + RUN + BUDGET + ARMS, r"cannot be the name of a run"),
        (HEAD + "baselines = ['nobody']\n" + RUN + BUDGET + ARMS, r"experiment\.baselines names 'nobody'"),
        ("[more]\n" + HEAD + RUN + BUDGET + ARMS, r"more is unknown"),
        (HEAD + RUN + ARMS, r"run\.budget bounds nothing"),
        (HEAD + RUN + "[run.budget.levers.harness]\nrollouts = 5\n" + ARMS, r"run\.budget bounds nothing"),
        (HEAD + RUN.replace("[run]", "[run]\nseed = 4") + BUDGET + ARMS, r"\[run\] seed is unknown"),
        (HEAD + RUN.replace("[run]", "[run]\nsed = 4") + BUDGET + ARMS, r"\[run\] sed is unknown"),
        (HEAD + RUN.replace("dev_examples", "dev") + BUDGET + ARMS, r"\[run\].*evaluation\.dev"),
        (HEAD + RUN.replace("[run]", "[run]\nprofile = 'no.toml'") + BUDGET + ARMS, r"\[run\].*no\.toml"),
        (HEAD + RUN + BUDGET + "[quick]\nprofile = 'x'\n" + ARMS, r"\[quick\] profile is unknown"),
        (HEAD + RUN + BUDGET + "[arms.a]\nlever = ['harness']\n", r"\[arms\.a\] lever is unknown"),
        (HEAD + RUN + BUDGET + "[arms.a]\nlevers = ['both']\n", r"\[arms\.a\].*levers"),
        (HEAD + RUN + BUDGET + "[arms.a]\npolicy = 'nobody'\n", r"\[arms\.a\] policy\.name: There is no policy"),
        (HEAD + RUN + BUDGET + "[arms.a]\nkind = 'votes'\n", r"\[arms\.a\] kind is 'votes'"),
        (HEAD + RUN + BUDGET + "[arms.a]\nn = 8\n", r"\[arms\.a\] n is 8"),
        (HEAD + RUN + BUDGET + "[arms.a]\nkind = 'best-of-n'\nn = 0\n", r"\[arms\.a\] n is 0"),
        (HEAD + RUN + BUDGET + "[arms.a]\nkind = 'best-of-n'\npolicy = 'rules'\n", r"\[arms\.a\] policy is unknown"),
        (HEAD + RUN + "[run.budget]\ntokens = 9\n[arms.a]\nkind = 'best-of-n'\n", r"\[arms\.a\].*no rollouts"),
        (HEAD + RUN + BUDGET + "[arms.a.budget]\nrollouts = 5\n", r"\[arms\.a\] budget is unknown or does not belong"),
        (HEAD + RUN + BUDGET + "[arms.a]\nharness = 'nowhere'\n", r"\[arms\.a\] There is no folder .*nowhere"),
        (HEAD + RUN + BUDGET + "[arms.a]\npolicy = 'alternate'\n", r"\[arms\.a\].*leaves the weights alone"),
        ("arms = 3\n" + HEAD + RUN + BUDGET, r"arms is no table"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_experiment(file, plugins())
    assert str(file) in caught.value.message
    assert caught.value.next_step


def test_an_arm_or_a_seed_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    file = written(tmp_path, HEAD + RUN + BUDGET + ARMS)
    with pytest.raises(ConfigError, match="--only names 'nobody'"):
        invoked("experiment", str(file), "--only", "nobody", home=tmp_path / "home")
    with pytest.raises(ConfigError, match="'x', which is no seed"):
        invoked("experiment", str(file), "--seeds", "1,x", home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("table", ["", "[quick]\n"])
def test_quick_is_refused_where_the_file_does_not_say_what_it_is(tmp_path: Path, table: str) -> None:
    file = written(tmp_path, HEAD + RUN + BUDGET + table + ARMS)
    assert read_experiment(file, plugins())
    with pytest.raises(ConfigError, match=r"no values in a table \[quick\]"):
        read_experiment(file, plugins(), quick=True)


def test_a_file_that_is_not_there_is_pointed_to_experiments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        read_experiment(tmp_path / "none.toml", plugins())
    assert "ops/experiments/" in (caught.value.next_step or "")


def test_a_folder_that_cannot_take_the_table_is_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(*_: Any) -> None:
        pytest.fail("a run was made")

    monkeypatch.setattr("bascule.runtime.cli.experiment_runs.make_runs", none)
    file = written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\n")
    (tmp_path / "taken" / "table.png").mkdir(parents=True)
    for out in (file, file / "below", tmp_path / "taken", Path("/proc/bascule")):
        with pytest.raises(ConfigError, match="table cannot be written") as caught:
            invoked("experiment", str(file), "--out", str(out), home=tmp_path / "home")
        assert str(out) in caught.value.message
        assert "--out" in (caught.value.next_step or "")


def test_code_that_takes_no_votes_is_refused_for_votes(tmp_path: Path) -> None:
    own = {"harness.py": "def solve(example, model, tools, context):\n    return '7'\n"}
    harness_folder(tmp_path / "own", **own)
    file = written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\nkind = 'best-of-n'\nharness = 'own'\n")
    with pytest.raises(ConfigError, match="code of its own"):
        read_experiment(file, plugins())


# --- the runs ---


def test_an_experiment_is_made_once_goes_on_and_is_told(tmp_path: Path) -> None:
    home, file = tmp_path / "home", written(tmp_path, HEAD + RUN + BUDGET + ARMS)
    first = invoked("experiment", str(file), "--only", "harness", "--json", home=home)
    assert [r["run"] for r in json.loads(first.stdout)["runs"]] == ["tiny-harness-s1"]

    async def begun(store: Store) -> int:
        """Another run of the experiment was begun, and the process ended."""
        asked = read_experiment(file, plugins(), seeds=[1, 2])
        await launch.start(store, "tiny-harness-s2", start_of(asked, asked.arms[0], 2))
        return await store.log.head("bascule.tiny-harness-s1.>")

    before = on_store(home, begun)
    out = tmp_path / "out"
    done = invoked("experiment", str(file), "--seeds", "2,1", "--json", "--out", str(out), home=home)
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert {(r["run"], r["status"]) for r in found["runs"]} == {
        (f"tiny-{arm}-s{seed}", "completed") for arm in ("harness", "votes") for seed in (1, 2)
    }
    assert "goes on" in done.stderr
    # The first arm of seed 1 is done already.
    assert [n for n in "4321" if f"{n} left with it" in done.stderr] == ["3", "2", "1"]
    assert sorted(p.name for p in out.iterdir()) == ["table.csv", "table.json", "table.png"]
    harness, votes = found["rows"]
    # All answers are the same: a vote changes nothing, and the verifier's pick is no better.
    assert harness["after"]["mean"] == votes["after"]["mean"] == votes["oracle"]["mean"]
    assert (votes["votes"], votes["levers"], harness["spent"]["rollouts"] > 0) == (3, [], True)
    assert [d["against"] for d in votes["differences"]] == ["harness"]

    async def after(store: Store) -> tuple[int, str, int]:
        state = await launch.state_of(store, "tiny-votes-s1")
        first = state.steps[0].harness
        assert first is not None
        calls = [len(e.data.body.steps) for e in await store.events("tiny-votes-s1")
                 if isinstance(e.data, ev.TrajectoryLogged) and e.data.body is not None]  # fmt: skip
        return await store.log.head("bascule.tiny-harness-s1.>"), first.author, max(calls)

    head, author, calls = on_store(home, after)
    assert (head, author, calls) == (before, "given", 1)


def test_a_run_that_was_made_otherwise_is_refused_and_one_that_ended_is_told(tmp_path: Path) -> None:
    home, file = tmp_path / "home", written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\n[arms.b]\n[arms.c]\n")
    asked = read_experiment(file, plugins())

    async def begun(store: Store) -> None:
        for arm in asked.arms[:2]:
            await launch.start(store, asked.run(arm.name, 1), start_of(asked, arm, 1))
        await launch.end(store, "tiny-b-s1", cancel=True, reason="not wanted")

    on_store(home, begun)
    text = file.read_text().replace("[arms.a]", "[arms.a]\nshard_size = 3")
    done = invoked("experiment", str(written(tmp_path, text)), "--json", home=home)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    a, b, c = found["runs"]
    assert (a["status"], b["status"], c["status"]) == ("refused", "cancelled", "completed")
    assert "shard_size was 32, and is 3" in a["reason"]
    assert b["reason"] == "not wanted"
    assert [row["completed"] for row in found["rows"]] == [0, 0, 1]
    assert "2 of 3 runs" in found["notes"][0]
    shown = invoked("experiment", str(file), "--only", "b,c", home=home)
    assert "tiny-b-s1: cancelled: not wanted" in shown.stdout


def test_samples_are_scored_once_and_where_that_fails_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file = tmp_path / "home", written(tmp_path, HEAD + RUN + BUDGET + ARMS)
    kept = home / "runs" / "tiny-votes-s1" / "pass-at-n.json"

    async def broken(*_: Any) -> None:
        raise ScoringError("The scorer does not open.")

    def made(*, works: bool) -> tuple[Any, list[str], str]:
        with monkeypatch.context() as patched:
            if not works:
                patched.setattr("bascule.runtime.cli.experiment_runs.best_of_samples", broken)
            done = invoked("experiment", str(file), "--only", "votes", "--json", home=home)
        found = json.loads(done.stdout)
        assert done.exit_code == 0
        assert len(found["files"]) == 3
        unknown = [note for note in found["notes"] if "pass@n of tiny-votes-s1 is not known" in note]
        return found["rows"][0]["oracle"], unknown, done.stderr

    oracle, notes, _ = made(works=False)
    assert oracle is None
    assert "The scorer does not open" in notes[0]
    first, notes, said = made(works=True)
    assert first["mean"] >= 0
    assert "tiny-votes-s1: the samples of 6 items are scored for pass@n" in said
    assert made(works=False)[:2] == (first, [])
    whole = kept.read_text()
    for other in (whole[:-9], whole.replace('"of":"', '"of":"0')):  # cut off; of another run of that name
        kept.write_text(other)
        assert made(works=False)[0] is None
    assert made(works=True)[0] == first
    assert kept.read_text() == whole


def test_a_table_gives_way_to_none_that_lacks_runs_of_it(tmp_path: Path) -> None:
    home, file = tmp_path / "home", written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\n[arms.b]\n")

    def made(*args: str, file: Path = file) -> Any:
        return json.loads(invoked("experiment", str(file), "--json", *args, home=home).stdout)

    def files() -> list[bytes]:
        return [path.read_bytes() for path in sorted((home / "experiments" / "tiny").iterdir())]

    assert len(made("--only", "a")["files"]) == 3
    assert len(made()["files"]) == 3
    whole = files()
    part = made("--only", "a")
    assert [row["completed"] for row in part["rows"]] == [1]
    other = made("--seeds", "2")
    assert [row["completed"] for row in other["rows"]] == [1, 1]
    text = file.read_text().replace("[arms.a]", "[arms.a]\nshard_size = 3")
    refused = made(file=written(tmp_path, text, "other.toml"))
    assert [line["status"] for line in refused["runs"]] == ["refused", "completed"]
    assert files() == whole
    for found, why in ((part, "tiny-b-s1"), (other, "tiny-a-s1"), (refused, "1 run is refused")):
        assert found["files"] == []
        assert why in found["notes"][-1]
    assert len(made("--seeds", "1,2")["files"]) == 3


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    arms = '[arms.broken]\nengine = { name = "cassette", params = { path = "./none.jsonl" } }\n[arms.good]\n'
    file = written(tmp_path, HEAD + RUN + BUDGET + arms)
    (tmp_path / "none.jsonl").touch()
    asked = read_experiment(file, plugins())
    (tmp_path / "none.jsonl").unlink()  # what a check before the start cannot foresee
    said: list[str] = []

    async def made(store: Store) -> Any:
        from bascule.runtime.cli.command import live_progress

        return await make_runs(store, asked, said.append, lambda: live_progress(True))

    broken, good = on_store(tmp_path / "home", made)
    assert (broken.status, good.status) == ("failed", "completed")
    assert "none.jsonl" in broken.reason
    assert any("failed" in line and "broken" in line for line in said)


async def test_the_reason_of_a_failure_is_told_without_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-ant-0123456789abcdef"

    async def refused(*_: Any) -> None:
        raise EngineError(f"The endpoint has {key}.")

    monkeypatch.setattr(launch, "start", refused)
    asked = read_experiment(written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\n"), plugins())
    said: list[str] = []
    async with open_store(tmp_path / "home", exclusive=True, writes=True) as store:
        (line,) = await make_runs(store, asked, said.append, lambda: pytest.fail("no run was started"))
    assert line.status == "failed"
    assert "The endpoint has [redacted" in line.reason
    assert key not in line.reason + "".join(said)


def test_a_pause_names_the_run_that_is_to_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_key(*_: Any) -> None:
        raise EngineError("There is no key.", next_step="Set it, then `bascule resume RUN`.")

    monkeypatch.setattr(launch, "serve", no_key)
    asked = read_experiment(written(tmp_path, HEAD + RUN + BUDGET + "[arms.a]\n"), plugins())

    async def paused(store: Store) -> str | None:
        await launch.start(store, "tiny-a-s1", start_of(asked, asked.arms[0], 1))
        await launch.work(store, "tiny-a-s1", [])
        return (await launch.state_of(store, "tiny-a-s1")).paused

    assert on_store(tmp_path / "home", paused) == "There is no key. Set it, then `bascule resume tiny-a-s1`."


def test_durations_are_told_in_words() -> None:
    assert [duration(s) for s in (12, 89, 120, 3540, 3900)] == ["12 s", "89 s", "2 min", "59 min", "1 h 05 min"]


# --- a given harness ---


def test_a_run_begins_with_the_harness_that_was_given_and_replays(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", harness_folder(tmp_path / "mine", **{"__pycache__/x.pyc": "no part of it"})
    given = ["--harness", str(folder), *CONSTANT, "--max-gen", "1"]
    sizes = [f"evaluation.{name}=4" for name in ("dev_examples", "sealed_examples", "train_groups")]
    settings = [
        x for s in (*sizes, "author.episodes=0", "gate.guard=none", "evaluation.train_samples=1") for x in ("--set", s)
    ]
    done = invoked("run", "--run-id", "r", *given, *settings, "--json", home=home)
    assert json.loads(done.stdout)["status"] == "completed"

    async def first(store: Store) -> Any:
        state = await launch.state_of(store, "r")
        return state.config.harness, state.steps[0].harness

    files, proposed = on_store(home, first)
    assert set(files) == {"harness.py", "manifest.json", "system_prompt.md"}
    assert (proposed.author, proposed.edit, proposed.files) == ("given", "given", files)
    assert proposed.digest == make_harness(files).digest
    replayed = json.loads(invoked("replay", "r", "--json", home=home).stdout)
    assert replayed["differences"] == []
    forked = ["whatif", "r", "--from", "1", "--run-id", "f", "--json"]
    assert invoked(*forked, "--set", "gate.alpha=0.5", home=home).exit_code in (0, 1)
    with pytest.raises(ConfigError, match="keeps the run's harness"):
        invoked("whatif", "r", "--from", "1", "--run-id", "g", "--set", 'harness={"a": "b"}', home=home)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifest.json": None}, r"no manifest\.json"),
        ({"manifest.json": "{}"}, r"manifest\.json .*not valid"),
        ({"harness.py": "def solve(:\n"}, r"harness\.py, line 1"),
        ({"data.txt": "x" * MAX_BYTES}, r"over 65536 bytes"),
    ],
)
def test_a_folder_that_is_no_harness_is_refused_by_file(
    tmp_path: Path, changes: dict[str, str | None], said: str
) -> None:
    folder = harness_folder(tmp_path / "mine", **changes)
    with pytest.raises(HarnessError, match=said) as caught:
        invoked("run", "--harness", str(folder), home=tmp_path / "home")
    assert str(folder) in caught.value.message
    assert not (tmp_path / "home").exists()


def test_bytes_that_are_no_text_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = harness_folder(tmp_path / "mine")
    (folder / "notes.bin").write_bytes(b"\xff\xfe")
    for given, said in ((folder, r"notes\.bin is no UTF-8"), (tmp_path / "no", "no folder")):
        with pytest.raises(HarnessError, match=said):
            invoked("run", "--harness", str(given), home=tmp_path / "home")


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = harness_folder(tmp_path / "mine")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("x")
    with pytest.raises(HarnessError, match=r"'caf\\udce9.txt' is no name of a file"):
        invoked("run", "--harness", str(folder), home=tmp_path / "home")


def test_a_folder_is_refused_that_has_more_than_files_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("not to be recorded")
    (tmp_path / "more").mkdir()
    kinds: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "link": ("link", lambda path: path.symlink_to(tmp_path / "secret")),
        "dangling": ("link", lambda path: path.symlink_to(tmp_path / "nothing")),
        "folder": ("link", lambda path: path.symlink_to(tmp_path / "more")),
        "fifo": ("FIFO", os.mkfifo),
        "socket": ("socket", lambda path: socket.socket(socket.AF_UNIX).bind(path.name)),
    }
    for name, (kind, make) in kinds.items():
        folder = harness_folder(tmp_path / name, **{"system_prompt.md": None, "sub/note.md": "text"})
        for path in (folder / "system_prompt.md", folder / "sub" / "other"):
            monkeypatch.chdir(path.parent)  # the path of a socket is short
            make(path)
            said = f"{path.relative_to(folder)} is a {kind}"
            with pytest.raises(HarnessError, match=said) as caught:
                harness_in(folder)
            assert str(folder) in caught.value.message
            assert "copy the file itself into the folder" in (caught.value.next_step or "").lower()
            path.unlink()


def test_a_file_that_becomes_a_link_when_it_is_opened_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("not to be recorded")
    folder, opened = harness_folder(tmp_path / "mine"), os.open

    def swapped(path: Any, *args: Any, **given: Any) -> int:
        if path == "system_prompt.md":
            (folder / path).unlink()
            become[-1](folder / path)
        return opened(path, *args, **given)

    monkeypatch.setattr(os, "open", swapped)
    kinds: list[tuple[Callable[[Path], Any], str]] = [
        (lambda path: path.symlink_to(tmp_path / "secret"), "cannot be read"),
        (os.mkfifo, "is a FIFO"),
    ]
    become = []
    for make, said in kinds:
        become.append(make)
        harness_folder(folder)
        with pytest.raises(HarnessError, match=rf"system_prompt\.md {said}"):
            harness_in(folder)
        (folder / "system_prompt.md").unlink()


def test_a_folder_that_is_given_as_a_link_is_taken_and_left_out_folders_are_not_looked_at(tmp_path: Path) -> None:
    folder = harness_folder(tmp_path / "mine", **{"sub/note.md": "text", ".git/config": "x"})
    (folder / ".git" / "head").symlink_to("config")
    (tmp_path / "link").symlink_to(folder)
    assert harness_in(tmp_path / "link") == harness_in(folder)
    assert set(harness_in(folder)) == {"harness.py", "manifest.json", "sub/note.md", "system_prompt.md"}


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ('{"name": "m", "packages": ["numpy"]}', "package 'numpy'; the task arith allows none"),
        ('{"name": "m", "data": "train"}', "which only prepare gets"),
        ('{"name": "m", "memory_mb": 999999}', "MiB of memory"),
    ],
)
def test_a_given_harness_gets_no_more_than_its_task_allows(tmp_path: Path, manifest: str, said: str) -> None:
    folder = harness_folder(tmp_path / "mine", **{"manifest.json": manifest})
    with pytest.raises(HarnessError, match=said):
        invoked("run", "--harness", str(folder), *CONSTANT, home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_given_harness_that_holds_a_key_is_refused(tmp_path: Path) -> None:
    key = "sk-ant-api03-" + "A1b2C3d4" * 6
    folder = harness_folder(tmp_path / "mine", **{"notes.md": f"the key is {key}\n"})
    with pytest.raises(BasculeError, match=r"notes\.md .*looks like a key") as caught:
        invoked("run", "--harness", str(folder), *CONSTANT, home=tmp_path / "home")
    assert key not in str(caught.value)
