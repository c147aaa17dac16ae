"""One's own task in a file or folder: what it may say, what is wrong with a bad one, and that a change is noticed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.task import Ranks, ScoresEpisodes
from bascule.plugins.tasks import own_file
from bascule.plugins.tasks.own import Own, OwnPrivate, named, verdict
from bascule.plugins.tasks.own_new import write_file, write_folder
from bascule.runtime.cli.own_tasks import chosen_task, stem_of
from bascule.runtime.world import World, task_digest
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import make_harness
from bascule.schemas.run import PluginChoice, parse_config, task_label
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Scored, ToolCall, Trajectory, Unscored
from bascule.verifiers.scoring_process import Request, judge

GOOD = """
DESCRIPTION = "Say the word."
def items(split):
    return [{"id": f"{split}-{i}", "question": f"{split} {i}", "answer": f"word {split} {i}"} for i in range(3)]
def verify(item, answer):
    return answer == item["answer"]
"""
CALL = ModelCall(
    kind="chat",
    asked="",
    prompt_ids=b"",
    outputs=(Output(token_ids=b"", logprobs=b"", text="hm"),),
    sampling=Sampling(),
)


def task_of(path: Path, text: str = GOOD) -> Own:
    path.write_text(text)
    return Own(named_params(path))


def named_params(path: Path) -> dict[str, Any]:
    found = named(str(path))
    assert found is not None
    params: dict[str, Any] = found["params"]
    return params


def test_three_names_make_a_task(tmp_path: Path) -> None:
    task = task_of(tmp_path / "words.py")
    public = task.public()
    assert (public.name, public.description) == ("words", "Say the word.")
    assert public.answers == {f"train-{i}": f"word train {i}" for i in range(3)}
    assert public.dev[1].input == {"question": "dev 1"}
    assert "word dev" not in str(public)
    private = task.private()
    assert private.score("dev", "dev-1", "word dev 1") == Scored(reward=1.0, passed=True)
    assert private.score("dev", "dev-1", "word dev 2") == Scored(reward=0.0, passed=False)
    assert private.score("dev", "dev-1", None) == Scored(reward=0.0, passed=False, well_formed=False)
    harness = make_harness(task.harness())
    assert harness.files["system_prompt.md"] == "Say the word.\n"
    assert "word " not in str({k: v for k, v in harness.files.items() if k != "harness.py"})
    assert parse_config({"task": {"name": "own"}, **task.defaults()}).task.name == "own"


def test_a_task_that_names_levels_says_that_its_rewards_are_ranks(tmp_path: Path) -> None:
    levels = 'LEVELS = ("wrong", "close", "right")\n'
    for name, text, ranks in (("ranks", GOOD + levels, True), ("numbers", GOOD, False)):
        task = task_of(tmp_path / f"{name}.py", text)
        config = parse_config({"task": {"name": "own", "params": named_params(tmp_path / f"{name}.py")}})
        assert isinstance(task, Ranks)
        assert task.ordinal is ranks
        assert World(plugins(), config).ordinal is ranks
    assert not World(plugins(), parse_config({"task": {"name": "arith"}})).ordinal


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, Scored(reward=1.0, passed=True)),
        (False, Scored(reward=0.0, passed=False)),
        (None, Scored(reward=0.0, passed=False, well_formed=False)),
        (0.25, Scored(reward=0.25)),
        (3, Scored(reward=3.0)),
        ("wrong", Scored(reward=0.0, passed=False)),
        ("close", Scored(reward=0.5, passed=False)),
        ("right", Scored(reward=1.0, passed=True)),
        ({"reward": 0.5}, Scored(reward=0.5)),
        ({"reward": 0.5, "passed": True, "well_formed": False}, Scored(reward=0.5, passed=True, well_formed=False)),
        ({"reward": "close", "steps": [0, 0.5]}, Scored(reward=0.5, passed=False, steps=(0.0, 0.5))),
    ],
)
def test_a_verifier_may_give_a_truth_value_a_number_a_rank_or_a_dict(given: Any, expected: Scored) -> None:
    assert verdict(given, ("wrong", "close", "right")) == expected


@pytest.mark.parametrize(
    "expression",
    ["float('nan')", "float('-inf')", "'good'", "[1]", "{}", "1 / 0", "{'reward': 1, 'steps': [float('nan')]}"],
)
def test_what_a_verifier_may_not_give_is_unscored_and_tells_no_truth(tmp_path: Path, expression: str) -> None:
    task = task_of(tmp_path / "t.py", GOOD.replace('answer == item["answer"]', expression))
    found = judge(task.private(), Request(id=0, split="dev", example="dev-1", answer="word dev 1"))
    assert isinstance(found, Unscored)
    assert "word" not in found.reason


class Unruly:
    """Whose every use tells its text, as an exception's message."""

    def __float__(self) -> float:
        raise ValueError("word dev 1")

    def __bool__(self) -> bool:
        raise ValueError("word dev 1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["word dev 1"], "verify returned a list."),
        ({1}, "verify returned a set."),
        ("word dev 1", "verify returned a str, which is none of the 2 LEVELS."),
        (float("nan"), "verify returned NaN."),
        (float("inf"), "verify returned a number beyond 1,000,000,000."),
        (10**400, "verify returned a number beyond 1,000,000,000."),
        (-1e308, "verify returned a number beyond 1,000,000,000."),
        ({"passed": True}, "verify returned a dict without a reward."),
        ({"reward": "word dev 1"}, "verify returned a str as the reward of a dict, which is none of the 2 LEVELS."),
        ({"reward": {"reward": 1}}, "verify returned a dict as the reward of a dict."),
        ({"reward": 1, "steps": 3}, "verify returned a dict whose steps are an int, not a list."),
        ({"reward": 1, "steps": ["word dev 1"]}, "verify returned a str as the reward of a step."),
        ({"reward": 1, "steps": [0.0] * 5000}, "verify returned a dict with more than 4096 steps."),
        (Unruly(), "verify returned an Unruly that is no number (ValueError)."),
        (
            {"reward": 1, "passed": Unruly()},
            "verify returned a dict whose passed is an Unruly without a truth value (ValueError).",
        ),
    ],
)
def test_what_is_no_verdict_is_named_by_its_type_and_nothing_that_it_holds(given: Any, said: str) -> None:
    assert verdict(given, ("wrong", "right")) == Unscored(reason=said)


def test_the_most_that_a_reward_may_be_is_a_reward() -> None:
    assert verdict(-1e9) == Scored(reward=-1e9)
    assert verdict(1e9) == Scored(reward=1e9)


def test_a_verifier_that_fails_is_named_with_its_own_line(tmp_path: Path) -> None:
    """Also where the exception is one of a library that it calls; its text is not told."""
    for call, error in (("__import__('json').loads(answer)", "JSONDecodeError"), ("exit(answer)", "SystemExit")):
        task = task_of(tmp_path / "t.py", GOOD.replace('answer == item["answer"]', call))
        found = judge(task.private(), Request(id=0, split="dev", example="dev-1", answer="word dev 1"))
        assert found == Unscored(reason=f"verify failed: {error} at t.py, line 6.")


def test_numpy_values_are_values(tmp_path: Path) -> None:
    import numpy as np

    assert verdict(np.bool_(True)) == Scored(reward=1.0, passed=True)
    assert verdict(np.float32(0.5)) == Scored(reward=0.5)
    assert verdict(np.array([True])) == Scored(reward=1.0, passed=True)
    assert verdict({"reward": np.array(0.5), "steps": np.array([1, 2])}) == Scored(reward=0.5, steps=(1.0, 2.0))
    assert verdict(np.array([0.5, 1.0])) == Unscored(
        reason="verify returned a ndarray of more or less than one element."
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (GOOD.replace("    return [", "    while True: pass\n    return [", 1), "line 4, .* in items\\('train'\\)"),
        (GOOD.replace("\nDESC", "\n__import__('time').sleep(3600)\nDESC"), "line 2, .* when it is loaded"),
        (GOOD + "BASELINES = {'b': lambda item: __import__('time').sleep(3600)}", r"line 7, .* in BASELINES\['b'\]"),
    ],
)
def test_a_file_that_hangs_is_given_up_and_its_line_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr(own_file, "LOAD_SECONDS", 0.5)
    task = task_of(tmp_path / "t.py", text)
    with pytest.raises(ConfigError, match=what) as e:
        task.baselines(task.public())
    assert "is not done after 0.5 s" in e.value.message
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_verifier_cannot_change_the_items_that_it_gets(tmp_path: Path) -> None:
    text = GOOD.replace("return answer ==", 'item["answer"] = item["input"]["question"] = answer; return answer ==')
    text = text.replace('"question": f"{split} {i}"', '"input": {"question": f"{split} {i}"}')
    task = task_of(tmp_path / "t.py", text)
    private = task.private()
    private.score("dev", "dev-1", "x")
    assert isinstance(private, OwnPrivate)
    assert private.item("dev", "dev-1")["answer"] == "word dev 1"
    assert task.public().dev[1].input == {"question": "dev 1"}


def test_an_episode_may_be_judged_by_its_calls_with_a_reward_for_each(tmp_path: Path) -> None:
    text = GOOD + (
        "def verify_episode(item, answer, calls):\n"
        "    steps = [0.1 for c in calls if 'model' in c]\n"
        "    used = [c for c in calls if c.get('tool') == 'spell' and c['result'] == 'w o']\n"
        "    return {'reward': bool(used) and verify(item, answer), 'steps': steps}\n"
        "def tools(item):\n"
        "    state = []\n"
        "    def spell(word):\n"
        "        state.append(word)\n"
        "        return ' '.join(word) + ('!' if len(state) > 1 else '')\n"
        "    return {'spell': spell}\n"
    )
    task = task_of(tmp_path / "t.py", text)
    private = task.private()
    assert isinstance(private, ScoresEpisodes)
    used = ToolCall(name="spell", arguments='{"word": "wo"}', result='"w o"')
    done = Trajectory(steps=(CALL, used, CALL), answer="word dev 1")
    assert private.score_episode("dev", "dev-1", done) == Scored(reward=1.0, passed=True, steps=(0.1, 0.1))
    without = Trajectory(steps=(CALL,), answer="word dev 1")
    assert private.score_episode("dev", "dev-1", without) == Scored(reward=0.0, passed=False, steps=(0.1,))
    silent = Trajectory(steps=(CALL, CALL))
    failed = Scored(reward=0.0, passed=False, well_formed=False, steps=(0.0, 0.0))
    assert private.score_episode("dev", "dev-1", silent) == failed
    example = task.public().dev[1]
    one, other = task.tools(example)["spell"], task.tools(example)["spell"]
    said = [asyncio.run(tool({"word": "ab"})) for tool in (one, one, other)]
    assert said == ["a b", "a b!", "a b"]


BAD = [
    ("def items(:", r"line 2, does not parse"),
    ("1 / 0", r"line 2, fails when it is loaded: ZeroDivisionError"),
    ("import sys; sys.exit(0)", r"line 2, fails when it is loaded: SystemExit"),
    (GOOD.replace("def verify", "def check"), "defines no function verify"),
    (GOOD.replace("DESCRIPTION", "TEXT"), "has no DESCRIPTION"),
    (GOOD.replace("def items", "def entries"), "defines no function items"),
    (GOOD.replace('f"{split}-{i}"', "'same'"), "has two items with the id 'same', in train and train"),
    (GOOD.replace('f"{split}-{i}"', "str(i)"), "has two items with the id '0', in train and dev"),
    (GOOD.replace('"question"', '"group": "g", "question"'), "has items of the group 'g' in train and dev"),
    (GOOD.replace("range(3)", "range(3 if split != 'dev' else 0)"), "has no items in the split dev"),
    (GOOD.replace("range(3)", "range(1 // 0)"), r"line 4, fails in items\('train'\): ZeroDivisionError"),
    (GOOD.replace('"question"', '"text"'), "gives item 0 of train neither a question nor a dict input"),
    (GOOD.replace('"answer": f', '"reply": f'), "gives item 0 of train no answer"),
    (GOOD.replace('"answer": f', '"hint": 1, "answer": f'), "unknown field 'hint'"),
    (GOOD.replace('f"word {split} {i}"', "{1, object()}"), "something that JSON cannot hold"),
    (GOOD.replace('f"{split}-{i}"', "i"), "the id 0, which is no text"),
    (GOOD + 'HARNESS = {"harness.py": 1}', "has a HARNESS of another form"),
    (GOOD + 'ALLOWS = {"packages": "numpy"}', "has a ALLOWS of another form"),
    (GOOD + 'ALLOWS = {"memory": 1}', "has an ALLOWS with the unknown field 'memory'"),
    (GOOD + 'ALLOWS = {"memory_mb": -1}', "has an ALLOWS whose memory_mb is -1"),
    (GOOD + "NAME = 3", "has a NAME that is no str"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_file_gets_one_paragraph_that_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text if text.startswith("\n") else f"\n{text}\n")
    with pytest.raises(ConfigError, match=message) as e:
        Own(named_params(path)).public()
    assert str(path) in e.value.message
    assert "\n" not in str(e.value)
    assert e.value.next_step


def test_a_path_without_a_task_is_refused(tmp_path: Path) -> None:
    for text in (str(tmp_path / "none.py"), str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(ConfigError, match="There is no task at"):
            named(text)
    assert named("arith") is None
    assert named("rg:chain_sum") is None
    with pytest.raises(ConfigError, match="needs the path"):
        Own({}).public()
    with pytest.raises(ConfigError, match="no parameter"):
        Own({"file": "x"})


def test_a_folder_may_hold_lists_a_description_and_a_harness(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def verify(item, answer):\n    return int(answer) == item['answer']['n']\n")
    (tmp_path / "description.md").write_text("Count.\n")
    for split in ("train", "dev", "sealed"):
        line = json.dumps({"id": split, "input": {"question": split, "more": [1]}, "answer": {"n": 3}})
        (tmp_path / f"{split}.jsonl").write_text(f"{line}\n\n")
    task = Own(named_params(tmp_path))
    public = task.public()
    assert (public.description, public.name) == ("Count.", tmp_path.name)
    assert public.dev[0].input == {"question": "dev", "more": [1]}
    assert public.answers == {"train": '{"n":3}'}
    assert task.private().score("dev", "dev", "3") == Scored(reward=1.0, passed=True)
    (tmp_path / "dev.jsonl").write_text('{"id": "dev"}\n{no\n')
    with pytest.raises(ConfigError, match=r"dev\.jsonl, line 2, is no JSON object"):
        Own(named_params(tmp_path)).public()


@pytest.mark.parametrize("folder", [False, True])
def test_what_new_writes_works_and_nothing_is_written_over(tmp_path: Path, folder: bool) -> None:
    path = (write_folder if folder else write_file)(tmp_path / "mine")
    task = Own(named_params(path))
    public = task.public()
    assert (len(public.train), len(public.dev), len(public.sealed)) == (200, 80, 80)
    for e in public.train:
        assert int(public.answers[e.id]) == sum(letter in "aeiou" for letter in e.id)
    assert make_harness(task.harness()).manifest.params["extract"] == "last_integer"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="is there already"):
        (write_folder if folder else write_file)(tmp_path / "mine")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="no name of a Python file"):
        write_file(tmp_path / "mine.txt")


def test_a_change_is_another_version_and_what_was_pinned_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "mine")
    params = named_params(path)
    before = Own(params).public()
    (path / "harness" / "system_prompt.md").write_text("Otherwise.\n")
    after = Own(named_params(path)).public()
    assert before.version != after.version
    assert task_digest(before) != task_digest(after)
    for open_ in (lambda: Own(params).public(), lambda: Own(params).private(), lambda: Own(params).harness()):
        with pytest.raises(ConfigError, match="has changed"):
            open_()
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "task.pyc").write_bytes(b"x")
    assert Own(named_params(path)).public().version == after.version


def test_a_path_is_a_choice_and_runs_are_called_by_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "My Task.v2.py"
    path.write_text(GOOD)
    chosen = chosen_task(str(path), {})
    assert chosen["name"] == "own"
    assert chosen["params"]["path"] == str(path)
    assert stem_of(PluginChoice(name="own", params=chosen["params"])) == "my-task-v2"
    assert chosen_task("arith", {"split_seed": 1}) == {"name": "arith", "params": {"split_seed": 1}}
    assert chosen_task("arith", {}) == {"name": "arith"}
    assert stem_of(PluginChoice(name="rg:chain_sum")) == "rg-chain_sum"
    assert task_label(PluginChoice(name="own", params=chosen["params"])) == "My Task.v2.py"
    assert task_label(PluginChoice(name="own", params={"path": "/tasks/folder/"})) == "folder"
    assert task_label(PluginChoice(name="arith", params={"path": "x"})) == "arith"
    pin = plugins().pin("task", "own")
    assert pin.name == "own"


def bascule(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bascule.runtime.cli", *args],
        env={**os.environ, "BASCULE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_on_a_file_scores_with_it_and_notices_when_it_changes(tmp_path: Path) -> None:
    """A whole run, on an engine that always says 3."""
    path = write_file(tmp_path / "vowels.py")
    small = {"dev_examples": 8, "sealed_examples": 8, "train_groups": 2, "train_samples": 1}
    done = bascule(
        tmp_path / "home",
        *("run", "--task", str(path), "--levers", "harness", "--max-gen", "0", "--engine", "constant", "--json"),
        *("--set", 'engine.text="3"', *(a for k, v in small.items() for a in ("--set", f"evaluation.{k}={v}"))),
    )
    assert done.returncode == 0, done.stderr
    assert "vowels.py with the constant engine" in done.stderr
    assert "smollm2" not in done.stderr
    report = json.loads(done.stdout)
    assert report["task"] == "vowels.py"
    assert report["run"] == "vowels-1"
    assert report["status"] == "completed"
    assert report["generations"][0]["dev"] == 1 / 8
    path.write_text(path.read_text().replace("of the first harness", "of the very first harness"))
    refused = bascule(tmp_path / "home", "ablate", "vowels-1")
    assert refused.returncode == 3
    assert "has changed" in refused.stderr
    assert "Traceback" not in refused.stderr
