"""The command line as a person meets it: quick, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    *("--engine", "constant", "--set", 'engine.params.text="7"', "--levers", "harness", "--max_gen", "0"),
    *("--set", "evaluation.dev_examples=4", "--set", "evaluation.sealed_examples=4"),
    *("--set", "evaluation.train_groups=2", "--set", "evaluation.train_samples=1"),
]


def bascule(home: Path, *args: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")} | {"BASCULE_HOME": str(home)}
    if cache is not None:
        env["BASCULE_CACHE"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "bascule.runtime.cli", *args],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one small finished run, ``done``."""
    folder = tmp_path_factory.mktemp("cli")
    result = bascule(folder, "run", "--run_id", "done", *SMALL)
    assert result.returncode == 0, result.stderr
    return folder


def test_help_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'anthropic', 'transformers', 'nats', 'matplotlib', 'numpy'}"
    script = (
        "import sys; from bascule.runtime.cli import app\n"
        "sys.argv = ['bascule', '--help']\n"
        "try: app.main()\n"
        f"except SystemExit: assert not {heavy} & set(sys.modules), sorted({heavy} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ablate" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "--task", "nope"], ["no task 'nope'", "arith"]),
        (["run", "--engine", "nope"], ["no engine 'nope'", "transformers"]),
        (["run", "--policy", "nope"], ["no policy 'nope'", "rules"]),
        (["run", "--author", "nope"], ["no author 'nope'", "operators"]),
        (["run", "--model", "nope-7b"], ["nope-7b"]),
        (["run", "--levers", "gears"], ["levers", "gears"]),
        (["run", "--levers", ""], ["at least one lever"]),
        (["run", "--seed", "-4"], ["seed"]),
        (["run", "--set", "gate.alpha=7"], ["gate.alpha"]),
        (["run", "--set", "gate.alfa=0.1"], ["alfa"]),
        (["run", "--set", "nonsense"], ["KEY=VALUE"]),
        (["run", "--set", "task=5"], ["does not name a task"]),
        (["run", "--set", "algorithms.grpo.groups=0"], ["groups"]),
        (["run", "--set", "algorithms.grpo.learning_rate=-1"], ["learning_rate"]),
        (["run", "--set", "algorithms.grpo.lernrate=1"], ["grpo", "lernrate", "learning_rate"]),
        (["run", "--set", "policy.params.patience=0"], ["patience"]),
        (["run", "--run-id", "Not.A.Token", *SMALL], ["Not.A.Token"]),
        (["run", "--url", "http://127.0.0.1:1"], ["NATS"]),
        (["resume", "nope"], ["no run 'nope'", "done"]),
        (["replay", "nope"], ["no run 'nope'", "done"]),
        (["explain", "done", "7"], ["step 7"]),
        (["serve", "cook", "--url", "nats://127.0.0.1:1"], ["no service 'cook'", "rollout"]),
        (["run", "--run-id", "done", *SMALL], ["done", "already", "resume"]),
        (["run", "--engine", "cassette", "--levers", "harness"], ["cassette", "engine.params.path"]),
    ],
)
def test_bad_input_gets_one_clear_paragraph(home: Path, args: list[str], says: list[str]) -> None:
    result = bascule(home, *args)
    assert result.returncode not in (0, 1)
    assert "Traceback" not in result.stderr
    for part in says:
        assert part in result.stderr
    runs = json.loads(bascule(home, "status", "--json").stdout)
    assert [r["run"] for r in runs] == ["done"], "nothing may be half-written"


def test_a_model_folder_without_weights_is_refused_before_anything_is_recorded(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = bascule(home, "run", "--model", str(tmp_path))
    assert result.returncode == 3
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_the_json_report_is_one_object_and_alone_on_standard_output(home: Path) -> None:
    report = json.loads(bascule(home, "status", "done", "--json").stdout)
    assert report["run"] == "done"
    assert report["generations"][0].keys() >= {"lever", "algorithm", "dev", "promoted", "tokens", "seconds"}
    assert report["sealed"].keys() >= {"before", "after", "p"}


def test_the_log_is_printed_as_it_was_recorded(home: Path) -> None:
    lines = bascule(home, "log", "done", "--json").stdout.splitlines()
    assert json.loads(lines[0])["type"] == "bascule.run.started"
    assert len(lines) == json.loads(bascule(home, "status", "done", "--json").stdout)["events"]


def test_a_store_in_use_is_refused_by_name_of_its_holder(home: Path) -> None:
    env = os.environ | {"BASCULE_HOME": str(home)}
    command = [sys.executable, "-m", "bascule.runtime.cli"]
    broker = subprocess.Popen([*command, "broker", "--json"], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert broker.stdout is not None
        url = json.loads(broker.stdout.readline())["url"]
        refused = bascule(home, "run", *SMALL)
        assert refused.returncode == 3
        assert str(broker.pid) in refused.stderr
        port = url.rsplit(":", 1)[1]
        taken = bascule(home.parent / "other", "broker", "--port", port)
        assert taken.returncode == 3
        assert port in taken.stderr
        assert "done" in bascule(home, "status").stdout, "reading goes on through the running server"
    finally:
        broker.kill()
        broker.wait()


def test_the_tasks_tell_their_baselines(home: Path) -> None:
    assert json.loads(bascule(home, "tasks", "--json").stdout).keys() >= {"arith", "spaceship-titanic"}
    scores = json.loads(bascule(home, "tasks", "baseline", "arith", "--json").stdout)
    assert all(0 < by_split["sealed"] < 0.2 for by_split in scores.values())


def test_brackets_in_a_path_are_no_markup(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "h[bold]y[x]"
    result = bascule(folder, "run", "--run-id", "b", *SMALL)
    assert result.returncode == 0, result.stderr
    assert str(folder / "runs" / "b" / "report.png") in result.stdout


def test_a_cassette_that_is_not_usable_is_refused_before_a_run_is_recorded(home: Path, tmp_path: Path) -> None:
    cassette = tmp_path / "broken.jsonl"
    for line in ('{"subject": "a.b.c.d.e", "x": ' + "[" * 100_000, "garbage", ""):
        cassette.write_text(line + "\n")
        result = bascule(home, "run", "--engine", "cassette", "--set", f"engine.params.path={cassette}")
        assert result.returncode == 3
        assert f"Line 1 of the cassette {cassette} is not usable" in result.stderr
    assert [r["run"] for r in json.loads(bascule(home, "status", "--json").stdout)] == ["done"]


def test_a_run_that_has_ended_cannot_be_cancelled(home: Path) -> None:
    again = bascule(home, "cancel", "done")
    assert again.returncode == 3
    assert "ended already" in again.stderr


def test_wrong_usage_has_its_own_exit_code(home: Path) -> None:
    assert bascule(home, "verify", "done", "--hom", "x").returncode == 3
    assert bascule(home, "verify", "done").returncode == 0


def test_a_name_that_leaves_the_home_makes_no_folder(home: Path) -> None:
    for command in ("cancel", "pause", "resume", "ablate"):
        assert bascule(home, command, "../../escape").returncode == 3
    assert not (home.parent / "escape").exists()
    assert {p.name for p in (home / "runs").iterdir()} == {"done"}


def test_plugins_lists_what_each_provides(home: Path) -> None:
    assert "algorithm:grpo" in bascule(home, "plugins").stdout


def test_pausing_says_so_to_people_and_programs(home: Path) -> None:
    ended = bascule(home, "pause", "done", "--json")
    assert ended.returncode == 3
    assert "has ended already" in ended.stderr


def test_verify_tells_a_run_from_an_export_of_that_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ex").mkdir()
    found = bascule(home, "verify", "ex")
    assert found.returncode == 3
    assert "./ex" in found.stderr


def test_dead_letters_of_an_unknown_run_are_not_simply_none(home: Path) -> None:
    assert bascule(home, "dlq", "list", "nope").returncode == 3
    assert bascule(home, "dlq", "list", "done").returncode == 0
