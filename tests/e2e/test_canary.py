"""Keys that a harness, a tool, a setting, a fault and the environment leak are in nothing that a run leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import Plugins, load_plugins
from bascule.runtime.audit import replay as audit
from bascule.runtime.audit.whatif import whatif
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.runtime.world import merged, plain
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import PluginError
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import ModelCall, Note, ToolCall, Trajectory, unpack_ids
from tests.plugin_site import install_plugin

HERE = Path(__file__).parent
RUN = "canary"


def leaky() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaky", HERE / "leaky.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LEAKY = leaky()


def found_in(text: str | bytes) -> list[str]:
    """The canaries that stand in a text."""
    raw = text if isinstance(text, bytes) else text.encode()
    return [c for c in LEAKY.CANARIES if c.encode() in raw]


async def trajectories(logged: list[ev.TrajectoryLogged], blobs: FileBlobs) -> list[Trajectory]:
    """The trajectories, of which at least one is a blob, and none of those holds a key."""
    refs = [data.blob for data in logged if data.blob is not None]
    found = [await blobs.get(ref) for ref in refs]
    assert found
    assert not [blob for blob in found if found_in(blob)]
    return [data.body for data in logged if data.body] + [msgspec.json.decode(b, type=Trajectory) for b in found]


def check_steps(logged: list[Trajectory]) -> None:
    """Each leak was there, and what is left of it is a mark."""
    errors = [t.error.message for t in logged if t.error is not None]
    assert any("[redacted:environment] was refused with [redacted:anthropic-key]" in e for e in errors)
    assert any(t.answer and t.answer.endswith("[redacted:anthropic-key]") for t in logged)
    steps = [s for t in logged for s in t.steps]
    assert Note(text="asking with [redacted:anthropic-key]") in steps
    tools = [s for s in steps if isinstance(s, ToolCall)]
    assert json.loads(tools[0].arguments) == {
        "password": "[redacted:named-value]",
        "url": "nats://me:[redacted:url-password]@host",
    }
    assert tools[0].result is not None
    assert json.loads(json.loads(tools[0].result)) == {
        "key": "[redacted:anthropic-key]",
        "login": "[redacted:environment]",
    }


@pytest.fixture
def leaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """This process with the plugin installed and the variable set, and so the scoring process that it starts."""
    site = tmp_path / "site"
    install_plugin(site, "leaky", (HERE / "leaky.py").read_text())
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv(LEAKY.VARIABLE, LEAKY.LOGIN)
    sys.modules.pop("bascule_leaky", None)
    return load_plugins()


def view_of(log: MemoryLog, home: Path, plugins: Plugins) -> View:
    return View(log, FileBlobs(home / "blobs"), plugins, RUN, producer, home=home, fresh=True)


async def start(log: MemoryLog, home: Path, plugins: Plugins) -> None:
    given = {"task": {"name": "leaky"}, "engine": {"name": "letters"}}
    config = configure(given, [f"task.params.api_key={LEAKY.SETTING}"], plugins)
    draft = Draft(subject=subjects.run_started(RUN), step=0, data=preflight(config, plugins))
    await view_of(log, home, plugins).append("cli", [draft])


async def test_no_key_is_in_any_payload_blob_or_token_of_a_run(tmp_path: Path, leaking: Plugins) -> None:
    log = MemoryLog()
    await start(log, tmp_path, leaking)
    await serve(view_of(log, tmp_path, leaking), list(SERVICES.values()))
    events = [e async for e in log.read(f"bascule.{RUN}.>")]
    for event in events:
        assert not found_in(event.payload), event.subject
    assert any(isinstance(e.data, ev.RunCompleted) for e in events)
    (started,) = [e.data for e in events if isinstance(e.data, ev.RunStarted)]
    assert started.config.task.params == {"api_key": "[redacted:named-value]"}
    harness = next(e.data for e in events if isinstance(e.data, ev.HarnessProposed))
    assert harness.files["system_prompt.md"] == "Your key is [redacted:anthropic-key].\n"

    recorded = [e.data for e in events if isinstance(e.data, ev.TrajectoryLogged)]
    logged = await trajectories(recorded, FileBlobs(tmp_path / "blobs"))
    check_steps(logged)
    steps = [s for t in logged for s in t.steps]
    refused = "The model refused a prompt: [redacted:environment] may not ask with [redacted:anthropic-key]"
    assert refused in [s.text for s in steps if isinstance(s, Note) and s.refused]
    calls = [s for s in steps if isinstance(s, ModelCall)]
    prompts = [bytes(unpack_ids(c.prompt_ids)).decode() for c in calls]
    assert "password='[redacted:named-value]' [redacted:environment]" in prompts
    assert any("[redacted:anthropic-key] [redacted:environment]" in p for p in prompts)
    assert not [p for p in prompts if found_in(p)]
    assert {o.text for c in calls for o in c.outputs} == {"b [redacted:anthropic-key]"}


async def test_a_run_that_was_redacted_is_replayed_without_a_difference(tmp_path: Path, leaking: Plugins) -> None:
    log = MemoryLog()
    await start(log, tmp_path, leaking)
    await serve(view_of(log, tmp_path, leaking), list(SERVICES.values()))
    events = [e async for e in log.read(f"bascule.{RUN}.>")]
    assert audit.replay(RUN, events, leaking).differences == ()


async def test_no_key_is_in_a_fork_that_is_given_one(tmp_path: Path, leaking: Plugins) -> None:
    log = MemoryLog()
    await start(log, tmp_path, leaking)
    await serve(view_of(log, tmp_path, leaking), list(SERVICES.values()))
    events = [e async for e in log.read(f"bascule.{RUN}.>")]
    config = parse_config(merged(plain(RunState.of(RUN, events).config), {"max_generations": 0}))
    changes: dict[str, Any] = {"max_generations": 0, "author": {"params": {"api_key": LEAKY.SETTING}}}
    producers = {service: producer(service) for service in (*SERVICES, "cli")}
    made = whatif(events, "fork", step=1, config=config, changes=changes, plugins=leaking, producers=producers)
    payloads = b"".join(event.payload for event in made.events)
    assert b'"api_key":"[redacted:named-value]"' in payloads
    assert not found_in(payloads)


async def test_what_a_failing_redactor_has_not_seen_is_not_appended(tmp_path: Path, leaking: Plugins) -> None:
    class Broken:
        name, version = "broken", "7"

        def redact(self, text: str, key: str | None) -> str:
            raise ValueError(text)

    leaking.registry.redactor(Broken())
    log = MemoryLog()
    with pytest.raises(PluginError, match="The redactor broken 7 raised ValueError"):
        await start(log, tmp_path, leaking)
    assert await log.head("bascule.>") == 0


async def test_no_key_is_in_anything_that_a_run_of_processes_leaves_or_says(world: Any) -> None:
    site = world.root / "leaky"
    install_plugin(site, "leaky", (HERE / "leaky.py").read_text())
    own = {"PYTHONPATH": f"{site}:{world.env['PYTHONPATH']}", LEAKY.VARIABLE: LEAKY.LOGIN}
    world = dataclasses.replace(world, env={**world.env, **own})
    arguments = ["--task", "leaky", "--model", str(world.model), "--run-id", RUN, "--set", "threads=1"]
    ran = world.bascule("run", *arguments, "--set", f"task.params.api_key={LEAKY.SETTING}", home=RUN)
    home = world.root / RUN
    files = [p for p in home.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not {str(p.relative_to(home)): found_in(p.read_bytes()) for p in files if found_in(p.read_bytes())}
    lines = [json.loads(line) for line in (home / "runs" / RUN / "services.jsonl").read_text().splitlines()]
    failed = [line for line in lines if line["event"] == "work.failed"]
    said = "no tool for [redacted:environment] at https://me:[redacted:url-password]@host with [redacted:anthropic-key]"
    assert said in json.dumps(failed[0]["exception"])

    log = world.bascule("log", RUN, "--json", home=RUN)
    events = [json.loads(line) for line in log.stdout.splitlines()]
    assert {e["type"] for e in events} >= {"bascule.run.completed", "bascule.trajectory.logged"}
    recorded = [e["data"] for e in events if e["type"] == "bascule.trajectory.logged"]
    blobs = FileBlobs(home / "blobs" / RUN)
    logged = await trajectories(msgspec.convert(recorded, list[ev.TrajectoryLogged]), blobs)
    check_steps(logged)

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(world.model / "tokenizer.json"))
    calls = [s for t in logged for s in t.steps if isinstance(s, ModelCall)]
    tokens = [unpack_ids(ids) for c in calls for ids in (c.prompt_ids, *(o.token_ids for o in c.outputs))]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in tokens]
    assert any("[redacted:anthropic-key] [redacted:environment]" in text for text in texts)
    assert not [text for text in texts if found_in(text)]

    wrong = world.bascule("explain", f"no-{LEAKY.KEY}", "1", home=RUN, ok=False)
    assert "no-[redacted:anthropic-key]" in wrong.stderr
    for done in (ran, log, wrong):
        assert not found_in(done.stdout + done.stderr)
