"""`bascule doctor`: what fails is one line with its next step, what is not needed does not fail, and nothing hangs."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bascule.plugins.loader import plugins
from bascule.plugins.tasks.harness_files import reference_files
from bascule.runtime.cli import doctor as doctor_command
from bascule.runtime.cli import runs
from bascule.runtime.cli.app import app
from bascule.runtime.cli.store import open_store
from bascule.runtime.doctor.configured import check_configuration, check_model, check_task, made_config
from bascule.runtime.doctor.endpoints import Wanted, check_endpoints, wanted
from bascule.runtime.doctor.finding import Asked, Finding
from bascule.runtime.doctor.machine import check_place
from bascule.runtime.doctor.packages import check_versions, declared, needed_extras
from bascule.runtime.doctor.report import examine
from bascule.runtime.doctor.room import check_disk, check_memory
from bascule.schemas.errors import ConfigError
from bascule.schemas.run import PluginChoice, RunConfig
from tests import ordinary_user
from tests.plugin_site import install_plugin

#: Seconds for all checks, on a busy machine too.
PATIENT = 300
ARITH = PluginChoice(name="arith")
KEY = "plain-words-that-are-the-key-4711"
CONSTANT = ("--task", "arith", "--engine", "constant", "--set", 'engine.params.text="7"', "--set", 'levers=["harness"]')


class Report:
    """What the command printed as JSON."""

    def __init__(self, ran: subprocess.CompletedProcess[str]) -> None:
        assert ran.returncode in (0, 1), ran.stderr
        self.text = ran.stdout + (ran.stderr or "")
        found = json.loads(ran.stdout)
        self.code, self.ok = ran.returncode, found["ok"]
        self.lines = {line["about"]: Finding(**line) for line in found["findings"]}
        assert self.ok == (self.code == 0) == all(line.outcome != "fails" for line in self.lines.values())

    def failing(self) -> set[str]:
        return {about for about, line in self.lines.items() if line.outcome == "fails"}


def doctor(folder: Path, *arguments: str, **environment: str) -> Report:
    """The command in an environment that has nothing but a path and an empty home folder."""
    given = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PIP_NO_INDEX": "1", **environment}
    ran = subprocess.run(
        [sys.executable, "-m", "bascule.runtime.cli", "doctor", "--json", "--seconds", str(PATIENT), *arguments],
        env=given,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENT,
        check=False,
    )
    return Report(ran)


@contextmanager
def models_server(*models: str, key: str = KEY, status: int = 200, body: bytes | None = None) -> Iterator[str]:
    """A server that lists models to whoever has the key, in either provider's header; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.headers.get("x-api-key") or (self.headers.get("authorization") or "").removeprefix("Bearer ")
            if sent != key:
                self._answer(401, json.dumps({"error": {"message": f"Incorrect API key provided: {sent}"}}).encode())
            elif self.path.partition("?")[0] == "/v1/models":
                listed = json.dumps({"data": [{"id": m} for m in models]}).encode()
                self._answer(status, listed if body is None else body)
            else:
                self._answer(404, b"{}")

        def _answer(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.send_header("location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def thinking(url: str, model: str = "claude-x", provider: str = "anthropic", key_env: str = "MY_KEY") -> RunConfig:
    """A configuration whose author asks an endpoint."""
    base = f"{url}/v1" if provider == "openai" else url
    params = {"provider": provider, "model": model, "base_url": base, "key_env": key_env}
    return RunConfig(task=ARITH, author=PluginChoice(name="claude", params=params))


def asked(config: RunConfig, *, online: bool = True, patience: float = PATIENT) -> dict[str, Finding]:
    """The lines about keys and endpoints, by what they are about; the last of several."""
    given = Asked(home="/nowhere", online=online, config=config, patience=patience)
    return {line.about: line for line in check_endpoints(given)}


def test_a_bare_environment_is_looked_at_as_a_whole_and_nothing_is_fetched(tmp_path: Path) -> None:
    report = doctor(tmp_path)
    assert report.ok, report.failing()
    model = report.lines["model smollm2-135m-instruct"]
    assert model.outcome == "warns"
    assert "is fetched from the package index" in model.found
    assert report.lines["memory"].figures["need"] > 2**30
    expected = {"python", "bascule", "packages", "plugins", "configuration", "task arith", "gpu", "disk: home"}
    assert expected | {"sandbox", "nats-server", "home", "import torch", "endpoints"} <= set(report.lines)
    assert not list(tmp_path.rglob("*.whl")) + list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / ".local").exists()


def test_what_shapes_the_configuration_of_a_run_can_be_said_to_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"run_id", "url", "credentials"}  # they say where a run is, not what
    lacking = set(inspect.signature(runs.run).parameters) - set(inspect.signature(doctor_command.doctor).parameters)
    assert lacking == elsewhere
    files = reference_files(name="mine", system_prompt="Say the number.", params={"extract": "last_integer"})
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    given: list[Asked] = []
    monkeypatch.setattr("bascule.runtime.doctor.report.examine", lambda asked, **_: given.append(asked) or [])
    options = ("--levers", "harness, weights", "--model", "7", "--seed", "3", "--max_gen", "2", "--unsafe-no-sandbox")
    more = ("--harness", str(tmp_path), "--set", "seed=4", "--json")
    assert CliRunner().invoke(app, ["doctor", *options, *more]).exit_code == 0
    config = made_config(given[0])
    assert (config.levers, config.model, config.seed, config.max_generations) == (("harness", "weights"), "7", 4, 2)
    assert (config.sandbox.unsafe, config.harness) == (True, files)
    arguments = ["doctor", "--task", "lawbench", "--regime", "retrieval", "--json"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert made_config(given[1]).task.params["regime"] == "retrieval"
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 0
    assert made_config(given[2]) == made_config(Asked(home="/nowhere"))


def test_a_profile_whose_key_is_missing_fails_with_the_variable_and_asks_nobody(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        'engine = { name = "constant", params = { text = "7" } }\nlevers = ["harness"]\n[author]\nname = "claude"\n'
        'params = { provider = "anthropic", model = "m", base_url = "http://127.0.0.1:1", key_env = "MY_KEY" }\n'
    )
    report = doctor(tmp_path, "--profile", str(file))
    assert report.failing() == {"key MY_KEY"}
    assert "MY_KEY" in report.lines["key MY_KEY"].next_step
    assert report.lines["endpoints"].outcome == "skipped"
    assert report.lines["import anthropic"].outcome == "ok"
    assert report.lines["model smollm2-135m-instruct"].outcome == "skipped"


def test_a_wrong_key_an_unknown_model_and_a_dead_port_each_have_their_line(tmp_path: Path) -> None:
    with models_server("claude-right") as url:
        params = '{ provider = "anthropic", model = "claude-wrong", base_url = "%s", key_env = "%s" }'
        dead = f"http://127.0.0.1:{free_port()}/v1"
        file = tmp_path / "p.toml"
        file.write_text(
            f'levers = ["harness"]\nengine = {{ name = "constant", params = {{ text = "7", url = "{dead}" }} }}\n'
            f'[policy]\nname = "claude"\nparams = {params % (url, "GOOD_KEY")}\n'
            f'[author]\nname = "claude"\nparams = {params % (url, "BAD_KEY")}\n'
        )
        report = doctor(tmp_path, "--profile", str(file), "--online", GOOD_KEY=KEY, BAD_KEY=f"x{KEY}")
    assert report.failing() == {
        "key BAD_KEY",
        "model claude-wrong",
        f"endpoint {dead.removeprefix('http://').removesuffix('/v1')}",
    }
    assert "claude-right" in report.lines["model claude-wrong"].next_step
    assert report.lines["key GOOD_KEY"].outcome == "ok"
    assert KEY not in report.text
    assert KEY[:12] not in report.text


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_an_endpoint_that_takes_the_key_and_has_the_model_is_ok(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with models_server("other", "claude-x") as url:
        lines = asked(thinking(url, provider=provider))
        assert {line.outcome for line in lines.values()} == {"ok"}
        assert set(lines) == {"key MY_KEY", f"endpoint {url.removeprefix('http://')}", "model claude-x"}
        assert {line.about for line in asked(thinking(url), online=False).values() if line.outcome == "skipped"} == {
            "endpoints"
        }


@pytest.mark.parametrize(
    ("given", "outcome", "said"),
    [
        ({"status": 404}, "warns", "no list of models"),
        ({"status": 503}, "warns", "status 503"),
        ({"status": 302}, "warns", "status 302"),
        ({"body": b"<html>"}, "fails", "not of the provider"),
        ({"body": b"[]"}, "fails", "not of the provider"),
    ],
)
def test_an_endpoint_that_answers_otherwise_is_said_to(
    given: dict[str, Any], outcome: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with models_server("claude-x", **given) as url:
        line = asked(thinking(url))[f"endpoint {url.removeprefix('http://')}"]
    assert line.outcome == outcome
    assert said in line.found


def test_an_endpoint_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        line = asked(thinking(f"http://{host}"), patience=1)[f"endpoint {host}"]
    assert line.outcome == "fails"
    assert "cannot be reached" in line.found


@pytest.mark.parametrize("url", ["https://{}", "http://no-such-host.invalid"])
def test_tls_that_fails_and_a_name_that_nobody_knows_are_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with models_server("claude-x") as plain:
        lines = asked(thinking(url.format(plain.removeprefix("http://"))))
    (line,) = [line for about, line in lines.items() if about.startswith("endpoint")]
    assert line.outcome == "fails"
    assert "cannot be reached" in line.found
    assert line.next_step


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "first\nsecond")
    with models_server("claude-x") as url:
        lines = asked(thinking(url))
    assert lines["key MY_KEY"].outcome == "fails"
    assert "holds white space" in lines["key MY_KEY"].found
    assert not any("first" in str(line) for line in lines.values())


def test_endpoints_are_asked_once_for_all_who_name_them() -> None:
    config = thinking("http://127.0.0.1:1/")
    both = RunConfig(
        task=config.task,
        author=config.author,
        policy=config.author,
        model="/srv/gpt-oss-20b",
        engine=PluginChoice(
            name="vllm", params={"urls": ["http://gpu:8000"], "key_env": "VLLM_API_KEY", "served_model": "served"}
        ),
    )
    thought, served = wanted(both)
    assert (thought.who, thought.url) == ("policy, author", "http://127.0.0.1:1/v1")
    assert served == Wanted(
        who="engine", provider="openai", url="http://gpu:8000/v1", model="served", key_env="VLLM_API_KEY"
    )
    assert needed_extras(both) == {"torch", "claude", "openai", "harmony"}
    (usual,) = wanted(RunConfig(task=config.task, model="gpt-x", engine=PluginChoice(name="openai")))
    assert (usual.host, usual.model, usual.key_env) == ("api.openai.com", "gpt-x", "OPENAI_API_KEY")
    (claude,) = wanted(RunConfig(task=config.task, model="gpt-x", engine=PluginChoice(name="anthropic")))
    assert (claude.host, claude.key_env) == ("api.anthropic.com", "ANTHROPIC_API_KEY")


@pytest.mark.parametrize("params", [{}, {"model": "claude-x"}])
async def test_the_model_that_the_engine_anthropic_will_ask_is_looked_for(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    engine = PluginChoice(name="anthropic", params=params)
    (one,) = wanted(RunConfig(task=ARITH, engine=engine))
    started = await plugins().registry.engines.get("anthropic")(RunConfig(task=ARITH).model, params).start()
    assert one.model == started.model


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("second=nosuch",), "nosuch"),
        (("evaluation.fresh_dev=1000",), "fresh examples of dev"),
        (('algorithms.grpo.lora_target_modules=["experts"]', "policy.algorithm=grpo"), "names experts"),
    ],
)
def test_what_a_run_would_be_refused_for_fails(settings: tuple[str, ...], why: str, tmp_path: Path) -> None:
    given = Asked(home=str(tmp_path / "home"), overrides=settings)
    given = Asked(home=given.home, config=made_config(given))
    lines = [line for check in (check_task, check_model) for line in check(given)]
    (failing,) = [line for line in lines if line.outcome == "fails"]
    assert why in failing.found


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "1e9"])
def test_a_time_that_is_none_is_refused(seconds: str) -> None:
    assert CliRunner().invoke(app, ["doctor", "--seconds", seconds]).exit_code == 2


@pytest.mark.parametrize(
    ("settings", "untold", "why"),
    [
        (("algorithms.grpo.lora_r=-1",), {"disk: a run", "memory"}, "lora_r"),
        (("engine.typo=1",), {"memory"}, "typo"),
        (("engine=vllm", "engine.urls=5"), {"endpoints", "memory"}, "urls"),
        (("engine=vllm", "engine.urls=[5]"), {"endpoints", "memory"}, "urls"),
        (("author=claude", "author.max_retries=many", "author.model=5"), {"endpoints"}, "model"),
        (("author=claude", "author.base_url=http://me:hunter2@host"), {"endpoints"}, "'host' with a user's name"),
        (("engine=openai", "engine.url=http://[bad", 'levers=["harness"]'), {"endpoints"}, "url"),
        (("engine=vllm", "engine.url=http://[bad"), {"endpoints", "memory"}, "url"),
    ],
)
def test_what_depends_on_a_configuration_that_is_refused_says_so_in_a_line(
    settings: tuple[str, ...], untold: set[str], why: str, tmp_path: Path
) -> None:
    given = Asked(home=str(tmp_path / "home"), overrides=settings)
    given = Asked(home=given.home, config=made_config(given))
    assert [line.outcome for line in check_configuration(given)] == ["fails"]
    lines = [line for check in (check_disk, check_memory, check_endpoints) for line in check(given)]
    skipped = {line.about: line.found for line in lines if "the configuration is refused" in line.found}
    assert set(skipped) == untold
    assert all(why in found for found in skipped.values())
    assert "hunter2" not in str(lines)
    assert {"disk: home", "disk: cache", "disk: temporary"} <= {line.about for line in lines}
    assert {line.about for line in check_versions(given)} >= {"python"}


def test_a_package_that_breaks_when_it_is_imported_is_a_line_and_no_traceback(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, source in (("anthropic", "raise RuntimeError('half installed')"), ("peft", "import os\nos._exit(7)")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(source + "\n")
    author = ("--set", "author=claude", "--set", "author.key_env=")
    report = doctor(tmp_path, *author, PYTHONPATH=str(site))
    assert report.failing() >= {"import anthropic", "import peft"}
    assert "RuntimeError: half installed" in report.lines["import anthropic"].found
    assert "status 7" in report.lines["import peft"].found
    assert "Traceback" not in report.text
    assert "pip install" in report.lines["import anthropic"].next_step


def test_what_a_check_said_before_it_ended_is_told_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of what it said the end is told; that begins within the key.
    said = "import os, sys\nsys.stderr.write(os.environ['MY_API_KEY'] + '.' * 292)\nsys.stderr.flush()\nos._exit(3)\n"
    install_plugin(tmp_path, "rude", said)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MY_API_KEY", KEY)
    lines = {f.about: f for f in examine(Asked(home=str(tmp_path / "home")), seconds=PATIENT)}
    assert lines["plugins"].outcome == "fails"
    assert "ended with status 3: " in lines["plugins"].found
    assert not any(KEY[-8:] in str(line) for line in lines.values())


def test_a_plugin_that_breaks_warns_and_one_that_ends_its_process_fails_by_name_of_what_looked(tmp_path: Path) -> None:
    install_plugin(tmp_path / "one", "broken", "raise RuntimeError('no such thing')\n")
    report = doctor(tmp_path, *CONSTANT, PYTHONPATH=str(tmp_path / "one"))
    assert report.ok
    assert "no such thing" in report.lines["plugin broken"].found
    install_plugin(tmp_path / "two", "rude", "import os\nos._exit(3)\n")
    report = doctor(tmp_path, *CONSTANT, PYTHONPATH=str(tmp_path / "two"))
    assert {"plugins", "configuration"} <= report.failing()
    assert report.lines["nats-server"].outcome == "ok"


def test_what_hangs_is_cut_off_and_the_rest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "slow", "import time\ntime.sleep(3600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = {f.about: f for f in examine(Asked(home=str(tmp_path / "home")), seconds=20)}
    assert lines["plugins"].outcome == "fails"
    assert "was not done" in lines["plugins"].found
    assert "python" in lines or "versions" in lines


def test_a_configuration_that_is_refused_is_a_line_and_the_machine_is_looked_at_all_the_same(tmp_path: Path) -> None:
    report = doctor(tmp_path, "--set", "gate.alpha=high", "--task", "arith")
    assert report.failing() == {"configuration"}
    assert "gate.alpha" in report.lines["configuration"].found
    assert {"python", "sandbox", "nats-server", "home", "disk: home"} <= set(report.lines)


def test_a_profile_or_a_plugin_that_is_not_there_is_refused_as_a_run_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        made_config(Asked(home="/nowhere", profile="/nowhere/nothing.toml"))
    config = made_config(Asked(home="/nowhere", engine="nobody"))
    (line,) = check_configuration(Asked(home="/nowhere", config=config))
    assert line.outcome == "fails"
    assert "no engine 'nobody'" in line.found


def test_a_model_folder_that_is_not_there_fails() -> None:
    (line,) = check_model(Asked(home="/nowhere", config=RunConfig(task=ARITH, model="/nowhere/model")))
    assert line.outcome == "fails"
    assert "no base model '/nowhere/model'" in line.found


def test_a_task_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: dict[str, Any]) -> Any:
        raise OSError("not today")

    monkeypatch.setitem(plugins().registry.tasks.items, "broken", broken)
    (line,) = check_task(Asked(home="/nowhere", config=RunConfig(task=PluginChoice(name="broken"))))
    assert line.outcome == "fails"
    assert "not today" in line.found
    assert line.next_step


async def test_a_home_that_another_process_has_fails_with_its_pid_and_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with open_store(home, exclusive=True) as store:
        report = await asyncio.to_thread(doctor, tmp_path, *CONSTANT, "--home", str(home))
        assert report.failing() == {"home"}
        assert str(os.getpid()) in report.lines["home"].found
        assert report.lines["log"].figures == {"runs": 0}
        assert await store.log.extent()
    assert doctor(tmp_path, *CONSTANT, "--home", str(home)).lines["home"].outcome == "ok"


def test_a_log_that_is_behind_its_anchor_fails(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = [sys.executable, "-m", "bascule.runtime.cli", "run", *CONSTANT, "--max-gen", "0", "--home", str(home)]
    small = ["--set", "evaluation.dev_examples=2", "--set", "evaluation.sealed_examples=2"]
    small += ["--set", "evaluation.train_groups=1", "--set", "evaluation.train_samples=1"]
    subprocess.run([*run, *small, "--json"], check=True, capture_output=True, timeout=2 * PATIENT)
    report = doctor(tmp_path, *CONSTANT, "--home", str(home))
    assert report.ok
    assert report.lines["log"].figures == {"runs": 1}
    for file in (home / "nats").rglob("*.blk"):
        file.unlink()
    report = doctor(tmp_path, *CONSTANT, "--home", str(home))
    assert "log" in report.failing()
    assert report.lines["log"].next_step


def test_a_folder_that_has_no_room_or_is_none_fails(tmp_path: Path) -> None:
    line = check_place("disk: home", tmp_path / "new", 2**62, "--home")
    assert line.outcome == "fails"
    assert "needed" in line.found
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert "is no folder" in check_place("disk: home", tmp_path / "file" / "below", 1, "--home").found
    assert check_place("disk: home", tmp_path / "new" / "below", 1, "--home").outcome == "ok"


def test_a_disk_that_is_full_fails(tmp_path: Path, on_small_disk: Callable[[Path], bool]) -> None:
    if not on_small_disk(tmp_path):
        pytest.skip("a tmpfs cannot be mounted: not root")
    (tmp_path / "rest").write_bytes(b"1" * (60 << 10))
    line = check_place("disk: home", tmp_path / "home", 1, "--home")
    assert line.outcome == "fails"
    assert "No space left" in line.found


@pytest.fixture
def on_small_disk() -> Iterator[Callable[[Path], bool]]:
    mounted: list[Path] = []

    def mount(folder: Path) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        mounted.extend([folder] * done)
        return done

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_home_that_cannot_be_written_fails_for_an_ordinary_user() -> None:
    with ordinary_user.folder() as folder:
        command = [
            sys.executable,
            "-m",
            "bascule.runtime.cli",
            "doctor",
            "--json",
            "--seconds",
            str(PATIENT),
            *CONSTANT,
        ]
        ran = ordinary_user.run([*command, "--home", "/proc/bascule"], home=folder)
    report = Report(ran)
    assert "disk: home" in report.failing()
    assert "cannot be written" in report.lines["disk: home"].found


def test_a_model_that_does_not_fit_fails_with_the_figures_before_anything_is_fetched() -> None:
    config = RunConfig(task=ARITH, model="openai/gpt-oss-120b", engine=PluginChoice(name="constant"))
    lines = {line.about: line for line in check_memory(Asked(home="/nowhere", config=config, gpu_free=80 << 30))}
    assert lines["memory"].outcome == "fails"
    assert "does not fit" in lines["memory"].found
    assert lines["memory"].figures["need"] > 217 << 30
    (line,) = check_memory(Asked(home="/nowhere", config=RunConfig(task=config.task, model="/no/such/thing")))
    assert line.outcome == "skipped"


def test_the_ranges_are_those_of_the_project_and_every_part_that_is_missing_says_how_to_get_it() -> None:
    python, extras = declared()
    assert python.startswith(">=3")
    assert {r.name for r in extras["torch"]} >= {"torch", "transformers", "peft"}
    assert {r.name for r in extras[""]} >= {"msgspec", "nats-py"}
