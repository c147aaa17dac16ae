"""The conformance kit: sound tasks pass, and each planted fault is found by the check that is for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.plugins.kit import Check, face_checks, leaves
from bascule.plugins.kit_scores import GARBAGE, bound, score_checks
from bascule.plugins.loader import plugins
from bascule.plugins.task import Task
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.own import Own, named
from bascule.plugins.tasks.own_new import write_file
from bascule.plugins.tasks.rooms import Rooms
from bascule.runtime.audit.conformance import conformance
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Verdict
from bascule.verifiers.scoring_process import Request, judge

VERIFY = 'answer.strip() == item["answer"]'
ITEM = '{"question": f"{n} {middle} {n + 1}", "answer": str(middle)}'


def text_of(verify: str = VERIFY, item: str = ITEM) -> str:
    """A task that asks for the number in the middle, with another verifier or other items."""
    return f"""
import re
DESCRIPTION = "Say the number in the middle."
def items(split):
    first = {{"train": 0, "dev": 1000, "sealed": 2000}}[split]
    return [one(n, n * 7 % 60 + 100) for n in range(first, first + 60)]
def one(n, middle):
    return {item}
def verify(item, answer):
    return {verify}
"""


async def broken(task: Task, outcome: str = "broken") -> dict[str, Check]:
    """What does not hold, by the process's own judge."""
    public = task.public()
    face = task.private()

    async def score(split: Split, example: str, answer: str | None) -> Verdict:
        # As the scorer sends it: JSON cannot hold a lone surrogate.
        text = None if answer is None else answer.encode("utf-8", "replace").decode()
        return judge(face, Request(id=0, split=split, example=example, answer=text))

    checks = [*face_checks(task, public), *[c async for c in score_checks(public, score)]]
    for check in checks:
        assert (check.next_step != "") == (check.outcome in ("broken", "warns")), check
    return {c.name: c for c in checks if c.outcome == outcome}


def own(path: Path, text: str) -> Own:
    path.write_text(text)
    found = named(str(path))
    assert found is not None
    return Own(found["params"])


@pytest.mark.parametrize("task", [Arith({}), Rooms({})], ids=["arith", "rooms"])
async def test_the_built_in_tasks_hold(task: Task) -> None:
    assert await broken(task) == {}


async def test_a_sound_file_and_the_template_hold(tmp_path: Path) -> None:
    assert await broken(own(tmp_path / "sound.py", text_of())) == {}
    found = named(str(write_file(tmp_path / "template.py")))
    assert found is not None
    assert await broken(Own(found["params"])) == {}


@pytest.mark.parametrize(
    ("verify", "names"),
    [
        ('item["answer"] in answer', {"fields", "prose", "twice"}),
        ('int(answer) == int(item["answer"])', {"garbage"}),
        ('answer in item["answer"]', {"garbage", "constants"}),
        ("len(answer) / 1000", {"garbage", "prose"}),
        ("float('nan')", {"truths"}),
        ('eval(answer) == int(item["answer"])', {"garbage", "code"}),
        ('bool(re.fullmatch("[0-9]+([+]0)?", answer)) and eval(answer) == int(item["answer"])', {"code"}),
        ('answer.format(item=item) == item["answer"]', {"garbage", "code"}),
        ("False", {"truths"}),
        ("True", {"garbage", "constants", "fields", "prose", "twice"}),
        ('answer.strip() == item["answer"] or answer.isdigit()', {"garbage", "constants"}),
    ],
)
async def test_a_verifier_with_a_hole_is_found(tmp_path: Path, verify: str, names: set[str]) -> None:
    found = await broken(own(tmp_path / "bad.py", text_of(verify=verify)))
    assert names <= set(found)
    assert "truths" in names or "truths" not in found


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ('{"question": f"{n}", "answer": "yes" if n % 10 else "no"}', {"constants"}),
        ('{"question": f"{n}", "answer": str(n % 1000)}', {"constants", "stands", "leaks"}),
        ('{"input": {"question": f"{n}", "more": {"key": middle}}, "answer": str(middle)}', {"fields"}),
        ('{"input": {"question": f"{n}", "truth": n}, "answer": str(middle)}', {"answers"}),
        ('{"id": f"i{n}", "question": f"{n % 1000}", "answer": str(n % 1000 % 7 + 90)}', {"questions"}),
    ],
)
async def test_items_that_give_themselves_away_are_found(tmp_path: Path, item: str, names: set[str]) -> None:
    assert set(await broken(own(tmp_path / "bad.py", text_of(item=item)))) == names


async def test_a_field_that_says_much_of_the_answer_and_a_baseline_that_answers_not_all_warn(tmp_path: Path) -> None:
    item = '{"input": {"question": f"{n}", "hint": str(middle) if n % 5 else ""}, "answer": str(middle)}'
    task = own(tmp_path / "much.py", text_of(item=item))
    assert "fields" in await broken(task, "warns")

    class Partly(Arith):
        def baselines(self, public: Any) -> Any:
            first, *rest = super().baselines(public)
            return [msgspec.structs.replace(first, answers={**first.answers, "sealed": {}}), *rest]

    found = {c.name: c.outcome for c in face_checks(Partly({}), Partly({}).public())}
    assert found["baselines"] == "warns"


async def test_a_face_that_is_not_sound_is_found() -> None:
    class Odd(Arith):
        calls = 0

        def public(self) -> Any:
            face = super().public()
            Odd.calls += 1
            first = msgspec.structs.replace(face.dev[0], id=face.dev[1].id, group=face.train[0].group)
            return msgspec.structs.replace(
                face,
                dev=(first, *face.dev[1:]),
                description=f" {'' if Odd.calls < 2 else Odd.calls}",
                answers={k: v for k, v in face.answers.items() if k != face.train[0].id},
            )

        def harness(self) -> dict[str, str]:
            return {**super().harness(), "manifest.json": json.dumps({"name": "n", "tools": ["fly"]})}

        def baselines(self, public: Any) -> Any:
            first, *_ = super().baselines(public)
            return [first, msgspec.structs.replace(first, answers={**first.answers, "sealed": {}})]

        def defaults(self) -> dict[str, Any]:
            return {"max_generations": -1}

    task = Odd({})
    public = task.public()
    names = {c.name for c in face_checks(task, public) if c.outcome == "broken"}
    assert names == {"same-face", "told", "ids", "groups", "answers", "harness", "baselines", "defaults"}


def test_a_bound_is_a_little_over_what_equal_shares_would_give() -> None:
    public = Arith({}).public()
    assert 0.1 < bound(public) < 0.15
    assert bound(msgspec.structs.replace(public, answers=dict.fromkeys(public.answers, "x"))) == 1.0
    two = {k: "ab"[i % 2] for i, k in enumerate(public.answers)}
    assert bound(msgspec.structs.replace(public, answers=two)) == pytest.approx(0.725)


def test_fields_are_told_by_their_places() -> None:
    value = {"a": 1, "b": {"c": [True, {"d": "x"}], "e": None}}
    assert list(leaves(value)) == [("a", "1"), ("b.c[]", "True"), ("b.c[].d", "x")]
    assert None in GARBAGE.values()


def bascule(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bascule.runtime.cli", *args],
        env={k: v for k, v in os.environ.items() if k != "BASCULE_HOME"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_new_and_check_work_from_the_command_line(tmp_path: Path) -> None:
    """The whole suite: another process, the scoring process, an episode of the first harness, baselines."""
    path = tmp_path / "mine.py"
    assert bascule("tasks", "new", str(path)).returncode == 0
    assert "is there already" in bascule("tasks", "new", str(path)).stderr
    done = bascule("tasks", "check", str(path), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), [c for c in found["checks"] if c["outcome"] == "broken"]
    names = {c["name"] for c in found["checks"]}
    assert {"same-elsewhere", "truths", "garbage", "constants", "allowed", "episode", "scored-baselines"} <= names


def test_a_task_that_does_not_hold_exits_with_1_and_says_what_to_do(tmp_path: Path) -> None:
    """Its items follow from the hash seed, its verifier searches the answer, and its harness crashes."""
    path = tmp_path / "bad.py"
    crash = {"harness.py": "raise RuntimeError('no')", "manifest.json": '{"name": "n"}', "system_prompt.md": "x"}
    text = text_of(verify='item["answer"] in answer', item=ITEM.replace("{n} {middle}", "{n} {hash('a')} {middle}"))
    path.write_text(f"{text}\nHARNESS = {crash!r}\n")
    done = bascule("tasks", "check", str(path))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    broken_ones = {line.split()[1] for line in lines if line.startswith("BROKEN")}
    assert {"same-elsewhere", "prose", "episode"} <= broken_ones
    assert any("Compare the whole answer" in line for line in lines)
    assert "Traceback" not in done.stderr


async def test_a_file_that_does_not_load_is_one_broken_check(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def items(:\n")
    (check,) = [c async for c in conformance(plugins(), "own", {"path": str(path)})]
    assert (check.name, check.outcome) == ("face", "broken")
    assert "line 1" in check.found
    with pytest.raises(ConfigError, match="There is no task 'nothing'"):
        await anext(conformance(plugins(), "nothing", {}))


@pytest.mark.parametrize(
    ("item", "outcome", "names"),
    [
        ('{"question": f"{n}? ({middle})", "answer": str(middle)}', "warns", {"stands", "leaks"}),
        ('{"question": "so " * (n % 30) + str(middle) + " so" * (n % 7), "answer": str(middle)}', "warns", {"stands"}),
        ('{"id": f"{n}-{middle}", "question": f"{n}", "answer": str(middle)}', "broken", {"stands", "leaks"}),
        ('{"question": f"{n} or {n + 1}? yes or no", "answer": "yes" if n * 7 % 3 % 2 else "no"}', "warns", set()),
    ],
)  # fmt: skip
async def test_a_truth_in_its_own_question_or_id_is_found_and_one_by_chance_is_not(
    tmp_path: Path, item: str, outcome: str, names: set[str]
) -> None:
    assert set(await broken(own(tmp_path / "leak.py", text_of(item=item)), outcome)) == names


async def test_a_leak_in_the_sealed_split_alone_is_found(tmp_path: Path) -> None:
    item = '{"question": f"{n}?" + (f" {middle}" if n >= 2000 else ""), "answer": str(middle)}'
    found = await broken(own(tmp_path / "leak.py", text_of(item=item)), "warns")
    assert set(found) == {"leaks"}
    assert "sealed" in found["leaks"].found
    assert "train" not in found["leaks"].found


async def checked(path: Path, text: str, **options: Any) -> dict[str, Check]:
    """The whole check of a file, with the processes that it is made of."""
    path.write_text(text)
    return {c.name: c async for c in conformance(plugins(), "own", {"path": str(path)}, **options)}


async def test_a_verifier_that_ends_its_process_is_started_once_and_the_check_stops(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    log = tmp_path / "started"
    log.touch()
    log.chmod(0o666)
    text = text_of(verify=f"open({str(log)!r}, 'a').write('x') and __import__('os')._exit(3)")
    found = await checked(tmp_path / "exits.py", text)
    assert log.read_text() == "x"
    assert found["verifier"].outcome == "broken"
    assert "exit status 3" in found["verifier"].found
    assert "truths" not in found
    assert found["splits"].outcome == "held"


async def test_a_verifier_that_hangs_is_named_with_the_item_and_the_bound(tmp_path: Path) -> None:
    found = await checked(tmp_path / "hang.py", text_of(verify="__import__('time').sleep(3600)"), seconds=2.0)
    assert found["verifier"].outcome == "broken"
    assert "within 2 s" in found["verifier"].found
    assert "train item" in found["verifier"].found
    assert "scored-baselines" not in found


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        ("exit(4)", "SystemExit at bad.py, line 10"),
        ("[1]", "verify returned a list"),
        ('{"reward": 1, "steps": [1.0] * 10**5}', "4096 steps"),
    ],
)
async def test_a_verifier_without_any_verdict_is_one_broken_line(tmp_path: Path, verify: str, said: str) -> None:
    found = await checked(tmp_path / "bad.py", text_of(verify=verify))
    assert [name for name, c in found.items() if c.outcome == "broken"] == ["truths"]
    assert said in found["truths"].found
    assert "garbage" not in found


async def test_rewards_beyond_0_to_1_are_told_with_their_range(tmp_path: Path) -> None:
    found = await checked(tmp_path / "scale.py", text_of(verify=f"7 if {VERIFY} else -5"))
    assert found["scale"].outcome == "warns"
    assert "from -5 to 7" in found["scale"].found
    assert "without an answer gets 0" in found["scale"].found
    assert found["verifier"].outcome == "held"


@pytest.mark.parametrize(
    ("more", "name", "said"),
    [
        ('BASELINES = {"x": lambda item: 1 / 0}', "scored-baselines", "line 12, fails in BASELINES['x']"),
        ('BASELINES = {"x": lambda item: None}', "scored-baselines", "no answer"),
        ("def tools(item): return 5", "episode", "gives an int in tools(item)"),
        ("def tools(item): return {'a': 5}", "episode", "the tool 'a'"),
        ("def tools(item): return item['answer']", "episode", "line 12, fails in tools(item): KeyError"),
    ],
)
async def test_a_fault_of_the_file_names_its_line_and_what_held_is_told(
    tmp_path: Path, more: str, name: str, said: str
) -> None:
    found = await checked(tmp_path / "bad.py", f"{text_of()}\n{more}\n")
    assert found[name].outcome == "broken"
    assert said in found[name].found
    assert "bad.py" in found[name].found
    assert found["truths"].outcome == "held"


async def test_packages_that_are_not_installed_are_found(tmp_path: Path) -> None:
    path = tmp_path / "allows.py"
    task = own(path, text_of() + "\nALLOWS = {'packages': ['msgspec', 'nonexistent-zz']}\n")
    (check,) = [c for c in face_checks(task, task.public()) if c.outcome == "broken"]
    assert check.name == "allows"
    assert "nonexistent-zz" in check.found
    assert "msgspec" not in check.found


HANGING = """
import pathlib, time
DESCRIPTION = "x"
def items(split):
    pathlib.Path(__file__).with_suffix(".began").touch()
    time.sleep(3600)
def verify(item, answer):
    return True
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [("tasks", "check"), ("run", "--engine", "constant", "--task")])
def test_a_file_that_hangs_while_it_is_loaded_can_be_stopped(
    tmp_path: Path, command: tuple[str, ...], number: int
) -> None:
    path = tmp_path / "hang.py"
    path.write_text(HANGING)
    arguments = [sys.executable, "-m", "bascule.runtime.cli", *command, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not path.with_suffix(".began").exists():
                assert process.poll() is None
            process.send_signal(number)
            process.communicate(timeout=90)
        finally:
            process.kill()
    assert process.returncode in (128 + number, -number), "stopped by the signal, not by the bound for loading"


def test_each_line_of_a_check_comes_when_it_is_done(tmp_path: Path) -> None:
    """The lines of the public face are there while the verifier still waits for the file that lets it go on."""
    tmp_path.chmod(0o777)
    path, go = tmp_path / "waits.py", tmp_path / "go"
    path.write_text(f"import os, time\n{text_of(verify=f'wait() or {VERIFY}')}\n"
                    f"def wait():\n    while not os.path.exists({str(go)!r}):\n        time.sleep(0.01)\n")  # fmt: skip
    arguments = [sys.executable, "-m", "bascule.runtime.cli", "tasks", "check", str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = ""
        while not seen.startswith("held   same-elsewhere"):
            seen = process.stdout.readline()
            assert seen, "it ended before it waited"
        go.touch()
        assert "0 are broken" in process.communicate()[0]
