"""Commands for users of SIA: its directories run, its generations are graded, its settings are read without keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.runtime.cli.app import app
from bascule.schemas.errors import ConfigError


def bascule(*arguments: str) -> str:
    """The output of a command in this process."""
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SIA's own four directories, as the command writes them."""
    folder = tmp_path_factory.mktemp("sia") / "tasks"
    written = json.loads(bascule("unpack-sia", str(folder), "--json"))
    assert [Path(path).name for path in written] == ["gpqa", "lawbench", "longcot-chess", "spaceship-titanic"]
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def graded(task: Path, gen: Path) -> dict[str, Any]:
    return dict(json.loads(bascule("grade-sia", str(task), str(gen), "--json")))


def test_unpack_overwrites_nothing(four: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        bascule("unpack-sia", str(four))


def test_one_answer_of_198_is_100_percent_by_theirs_and_one_198th_by_ours(four: Path, tmp_path: Path) -> None:
    questions = json.loads((four / "gpqa/data/private/diamond_questions.json").read_text())
    first = {"question_id": questions[0]["id"], "model_answer": questions[0]["correct_answer_letter"]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "submission.json").write_text(json.dumps({"details": [first]}))
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 1.0, "details": []}))
    before = snapshot(four / "gpqa") | snapshot(tmp_path)
    found = graded(four / "gpqa", tmp_path)
    assert (found["ours"], found["theirs"], found["recorded"]) == (1 / 198, 1.0, 1.0)
    assert (found["counted"]["answered"], found["counted"]["missing"]) == (1, 197)
    assert "divides by the questions that it read a letter for" in found["differences"][0]
    assert snapshot(four / "gpqa") | snapshot(tmp_path) == before


def test_a_repeated_row_counts_once_by_ours(four: Path, tmp_path: Path) -> None:
    one = {"question_id": "knight_path_hard_1", "solution": 218}
    (tmp_path / "responses.json").write_text(json.dumps([one] * 10))
    found = graded(four / "longcot-chess", tmp_path)
    assert (found["ours"], found["theirs"]) == (1 / 50, 1.0)
    assert found["counted"]["repeated"] == 9


def test_a_generation_that_holds_a_link_scores_0_and_the_link_is_not_followed(four: Path, tmp_path: Path) -> None:
    os.symlink(four / "longcot-chess/data/private/answers.json", tmp_path / "responses.json")
    found = graded(four / "longcot-chess", tmp_path)
    assert (found["ours"], found["theirs"]) == (0.0, None)
    assert "is a link" in found["why_ours"]


def test_where_there_is_no_evaluator_only_ours_grades(four: Path, tmp_path: Path) -> None:
    sample = four / "spaceship-titanic/data/public/sample_submission.csv"
    (tmp_path / "submission.csv").write_bytes(sample.read_bytes())
    text = bascule("grade-sia", str(four / "spaceship-titanic"), str(tmp_path))
    assert "0.5034 by our grader, none (The directory has no evaluate.py)" in text


def test_a_folder_that_is_no_task_directory_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    for command in (("run", "--task-dir", str(tmp_path)), ("grade-sia", str(tmp_path), str(tmp_path))):
        with pytest.raises(ConfigError, match=r"no data/public/task\.md"):
            bascule(*command)


def test_a_run_on_gpqas_directory_records_no_item_and_says_what_their_evaluator_says(
    four: Path, tmp_path: Path
) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BASCULE_")} | {"BASCULE_HOME": str(tmp_path)}

    def ran(*arguments: str) -> str:
        command = [sys.executable, "-m", "bascule.runtime.cli", *arguments]
        return subprocess.run(command, env=clean, stdout=subprocess.PIPE, check=True, timeout=600, text=True).stdout

    engine = ("--engine", "constant", "--set", 'engine.params.text="A"', "--levers", "harness", "--max-gen", "1")
    report = json.loads(ran("run", "--task-dir", str(four / "gpqa"), *engine, "--json"))
    assert (report["run"], report["status"]) == ("gpqa-1", "completed")
    assert report["sealed"]["before"] == 57 / 198
    assert {b["name"]: b["sealed"] for b in report["baselines"]}["all-C"] == 51 / 198
    assert report["notes"][0].endswith("0.2879 by our grader, 0.2879 by the directory's own evaluator")
    log = ran("log", "gpqa-1", "--json")
    questions = json.loads((four / "gpqa/data/public/diamond_questions.json").read_text())
    quoted = [q["id"] for q in questions if json.dumps(q["Question"])[1:60] in log or q["Question"][:60] in log]
    assert quoted == []
    logged = [e["data"] for e in map(json.loads, log.splitlines()) if e["type"] == "bascule.trajectory.logged"]
    assert all(e["answer"].startswith("sia-submission") for e in logged)
    assert all(e["blob"]["media"].endswith("; restricted") for e in logged)


SECRET = "sk-" + "a1b2c3d4" * 6


def configured(folder: Path) -> Path:
    """A folder as SIA's users have it, with a key in each place where people put one by mistake."""
    (folder / "mine").mkdir()
    (folder / "mine" / "main.py").write_text("")
    (folder / "model").mkdir()
    files = {
        "providers/near.json": {
            "provider_id": "near",
            "client_kind": "openai",
            "base_url": f"https://me:{SECRET}@host.example/v1?key={SECRET}",
            "api_key_env": "NEAR_API_KEY",
            "api_key": SECRET,
        },
        "providers/odd.json": {"provider_id": "odd", "client_kind": "openai", "api_key_env": SECRET},
        "profiles/a-meta.json": {
            "profile_id": "writer",
            "agent_impl": "openhands",
            "model": "big",
            "provider_id": "odd",
        },
        "profiles/b-target.json": {
            "profile_id": "target",
            "model": "model",
            "provider_id": "near",
            "agent_reference": {"source": "mine", "entrypoint": "main.py"},
        },
        "profiles/c-target.json": {"profile_id": "lost", "model": "far/away", "provider_id": "gone"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_import_tells_what_has_a_counterpart_and_what_has_none_and_never_a_key(tmp_path: Path) -> None:
    folder = configured(tmp_path)
    text, found = bascule("import-sia", str(folder)), json.loads(bascule("import-sia", str(folder), "--json"))
    assert SECRET not in text + json.dumps(found)
    meta, target, lost = found
    assert (meta["role"], meta["key_variable"], meta["options"]) == ("meta", None, [])
    assert any("is no variable's name" in line for line in meta["without"])
    assert target["config"] == {
        "model": str(folder / "model"),
        "task": {"name": "sia-dir", "params": {"agent": str(folder / "mine"), "entry": "main.py"}},
    }
    assert target["key_variable"] == "NEAR_API_KEY"
    assert any("https://host.example/v1)" in line for line in target["without"])
    assert any("the field api_key of the provider near" in line for line in target["without"])
    assert any("the provider gone" in line for line in lost["without"])
    assert any("far/away" in line for line in lost["without"])


def test_imported_options_are_options_of_run(four: Path, tmp_path: Path) -> None:
    from bascule.plugins.tasks.sia_dir import SiaDir, named
    from bascule.runtime.cli.configuration import override

    (_, target, _) = json.loads(bascule("import-sia", str(configured(tmp_path)), "--json"))
    given = [target["options"][i + 1].strip("'") for i, word in enumerate(target["options"]) if word == "--set"]
    params = {k: v for item in given for k, v in override(item)["task"]["params"].items()}
    chosen = named(str(four / "gpqa"))
    assert chosen is not None
    assert "agent/main.py" in SiaDir({**chosen["params"], **params}).harness()


@pytest.mark.parametrize("content", ["{", "[]", '{"profile_id": "x"}', '{"profile_id": 1, "model": "m"}'])
def test_a_profile_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.json is no profile of SIA"):
        bascule("import-sia", str(tmp_path))
    with pytest.raises(ConfigError, match="no profiles of SIA"):
        bascule("import-sia", str(tmp_path / "profiles"))
