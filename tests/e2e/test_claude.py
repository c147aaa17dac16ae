"""Whole runs whose policy and author think with a model behind a real socket: killed, resumed, paused, replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import secretive
from tests.e2e.test_kill import kill_everything
from tests.models.server import KEY, Answer, Fault, Script, Server, completion, message, serving, text, use
from tests.plugin_site import install_plugin

BETTER = "Answer with the digits alone."
SMALL = (
    *("--task", "arith", "--engine", "constant", "--set", 'engine.params.text="7"', "--levers", "harness"),
    *("--policy", "claude", "--author", "claude", "--max-gen", "1", "--run-id", "thinks", "--json"),
    *("--set", "evaluation.dev_examples=12", "--set", "evaluation.sealed_examples=12"),
    *("--set", "evaluation.train_groups=3", "--set", "evaluation.train_samples=2"),
    *("--set", "policy.key_env=THE_MODEL_KEY", "--set", "author.key_env=THE_MODEL_KEY"),
    *("--set", "author.positions=3", "--set", "policy.max_retries=0", "--set", "author.max_retries=0"),
)


def thinking(request: dict[str, Any], _: int) -> Answer:
    """A model that pulls the harness, looks, writes, tries, and proposes."""
    if any(t["name"] == "choose_lever" for t in request["tools"]):
        considered = [{"choice": "harness", "score": 0.9, "reason": "no edit was tried yet"}]
        return message(
            use("choose_lever", {"choice": "harness", "reasons": ["all answers are wrong"], "considered": considered})
        )
    turn = sum(m["role"] == "assistant" for m in request["messages"])
    acts: list[tuple[dict[str, Any], ...]] = [
        (text("I look."), use("list_files", {}, "a"), use("read_file", {"path": "system_prompt.md"}, "b")),
        (use("write_file", {"path": "system_prompt.md", "content": BETTER}), use("try_on_train", {}, "c")),
        (use("finish", {"summary": "asks for digits alone"}),),
    ]
    return message(*acts[turn], cache_read_input_tokens=30)


@dataclass
class Place:
    """Where runs are, and the server that they ask."""

    folder: Path
    server: Server
    site: str = ""

    def popen(self, *arguments: str, key: bool = True) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("BASCULE_", "ANTHROPIC_", "OPENAI_"))}
        own = {"BASCULE_HOME": str(self.folder / "home"), **({"THE_MODEL_KEY": KEY} if key else {})}
        if self.site:
            own["PYTHONPATH"] = os.pathsep.join(filter(None, (self.site, kept.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-m", "bascule.runtime.cli", *arguments],
            env={**kept, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def bascule(self, *arguments: str, key: bool = True, expected: int = 0) -> str:
        process = self.popen(*arguments, key=key)
        out, err = process.communicate(timeout=600)
        assert process.returncode == expected, err
        return out

    def run(self, *arguments: str, provider: str = "anthropic", **options: Any) -> str:
        return self.bascule("run", *SMALL, *self.endpoint(provider), *arguments, **options)

    def endpoint(self, provider: str = "anthropic") -> list[str]:
        url = self.server.url if provider == "anthropic" else f"{self.server.url}/v1"
        given = {"base_url": url, "provider": provider, "model": "m-1"}
        return [x for who in ("policy", "author") for k, v in given.items() for x in ("--set", f"{who}.{k}={v}")]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bascule("log", "thinks", "--json", key=False).splitlines()]

    def calls(self) -> list[dict[str, Any]]:
        return [e["data"] for e in self.events() if e["type"] == "bascule.model.called"]


def chatting(request: dict[str, Any], number: int) -> Answer:
    """The same model behind ``/chat/completions``."""
    names = [t["function"]["name"] for t in request["tools"]]
    said = [m for m in request["messages"] if m["role"] != "tool"]
    answer = thinking({"tools": [{"name": n} for n in names], "messages": said}, number)
    assert isinstance(answer, dict)
    return completion(None, {b["name"]: json.dumps(b["input"]) for b in answer["content"] if b["type"] == "tool_use"})


def test_a_run_that_a_model_steers_is_recorded_and_replayed_without_it(tmp_path: Path) -> None:
    with serving(thinking) as server:
        here = Place(tmp_path, server)
        report = json.loads(here.run())
        asked = len(server.requests)
    assert report["status"] == "completed"
    events = here.events()
    chosen = next(e["data"] for e in events if e["type"] == "bascule.lever.chosen")
    assert (chosen["policy"], chosen["lever"], chosen["reasons"]) == ("claude", "harness", ["all answers are wrong"])
    assert chosen["options"][0]["score"] == 0.9
    proposed = [e["data"] for e in events if e["type"] == "bascule.harness.proposed"][-1]
    assert proposed["author"] == "claude"
    assert proposed["edit"] == "asks for digits alone"
    assert proposed["files"]["system_prompt.md"] == BETTER
    calls = here.calls()
    assert asked == len(calls) == 4
    assert [c["cache_read_tokens"] for c in calls[1:]] == [30, 30, 30]
    assert {c["stop_reason"] for c in calls} == {"tool_use"}
    (trial,) = [e["data"] for e in events if e["type"] == "bascule.tool.called"]
    assert json.loads(trial["result"])["n"] == 3
    # The server is off, and there is no key.
    replayed = json.loads(here.bascule("replay", "thinks", "--json", key=False))
    assert replayed["differences"] == []
    assert json.loads(here.bascule("verify", "thinks", "--json", key=False))["faults"] == []
    everything = "".join(p.read_text(errors="replace") for p in (tmp_path / "home").rglob("*") if p.is_file())
    assert KEY not in everything


def test_a_model_behind_an_openai_compatible_endpoint_steers_a_run_as_well(tmp_path: Path) -> None:
    with serving(chatting) as server:
        here = Place(tmp_path, server)
        assert json.loads(here.run(provider="openai"))["status"] == "completed"
        assert set(server.paths) == {"/v1/chat/completions"}
    proposed = [e["data"] for e in here.events() if e["type"] == "bascule.harness.proposed"][-1]
    assert proposed["files"]["system_prompt.md"] == BETTER
    assert json.loads(here.bascule("replay", "thinks", "--json", key=False))["differences"] == []


def test_no_text_of_a_restricted_item_is_sent_or_recorded(tmp_path: Path) -> None:
    install_plugin(tmp_path / "site", "secretive", Path(secretive.__file__).read_text())
    with serving(thinking) as server:
        here = Place(tmp_path, server, str(tmp_path / "site"))
        report = json.loads(here.run("--task", "secretive", "--set", "policy.reads=0"))
        sent = json.dumps(server.requests).casefold()
    assert report["status"] == "completed"
    assert "g00-train-0" in sent
    assert "unpublished colours" not in sent
    assert "unpublished colours" not in here.bascule("log", "thinks", "--json").casefold()
    assert json.loads(here.bascule("replay", "thinks", "--json", key=False))["differences"] == []


@pytest.mark.parametrize("under_way", [0, 1, 3])
def test_a_run_that_is_killed_in_a_call_asks_no_recorded_one_again(tmp_path: Path, under_way: int) -> None:
    def hanging(request: dict[str, Any], number: int) -> Answer:
        return Fault(hang=True) if number == under_way else thinking(request, number)

    with serving(hanging) as server:
        here = Place(tmp_path, server)
        process = here.popen("run", *SMALL, *here.endpoint())
        try:
            server.wait_for(under_way + 1)  # so the calls before it are recorded: they are what it follows from
        finally:
            kill_everything(process)  # type: ignore[arg-type]
        report = json.loads(here.bascule("resume", "thinks", "--json"))
        asked = Counter(json.dumps(r, sort_keys=True) for r in server.requests)
    assert report["status"] == "completed"
    assert len(here.calls()) == 4
    assert sorted(asked.values()) == [1, 1, 1, 2]
    assert json.loads(here.bascule("replay", "thinks", "--json", key=False))["differences"] == []


def test_without_a_key_the_run_pauses_before_it_spends_anything(tmp_path: Path) -> None:
    with serving(thinking) as server:
        here = Place(tmp_path, server)
        report = json.loads(here.run(key=False, expected=1))
        assert report["status"] == "paused"
        assert "THE_MODEL_KEY" in report["reason"]
        assert server.requests == []
        assert json.loads(here.bascule("resume", "thinks", "--json"))["status"] == "completed"


def faulty(fault: Answer) -> Script:
    """Answers with the fault once, then as it should."""
    return lambda request, number: fault if number == 0 else thinking(request, number)


@pytest.mark.parametrize(
    ("fault", "said", "recorded"),
    [
        (Fault(529, "busy"), "529", 0),
        (message(stop_reason="refusal"), "refused to answer", 1),
        (message(use("choose_lever", {}), stop_reason="max_tokens"), "cut off at max_tokens", 1),
    ],
    ids=["busy", "refused", "cut off"],
)
def test_a_call_that_fails_pauses_the_run_and_a_resume_asks_again(
    tmp_path: Path, fault: Answer, said: str, recorded: int
) -> None:
    with serving(faulty(fault)) as server:
        here = Place(tmp_path, server)
        report = json.loads(here.run(expected=1))
        assert report["status"] == "paused"
        assert said in report["reason"]
        assert len(here.calls()) == recorded
        assert json.loads(here.bascule("resume", "thinks", "--json"))["status"] == "completed"
        assert server.requests[0] == server.requests[1]
    assert len(here.calls()) == 4 + recorded
    assert json.loads(here.bascule("replay", "thinks", "--json", key=False))["differences"] == []


@pytest.mark.parametrize(("key", "said"), [(False, "THE_MODEL_KEY, which is to hold"), (True, "cannot be reached")])
def test_an_engine_that_cannot_be_asked_pauses_the_run(tmp_path: Path, key: bool, said: str) -> None:
    small = ("--task", "arith", "--levers", "harness", "--max-gen", "1", "--run-id", "thinks", "--json", *SMALL[17:25])
    asked = ("--engine", "openai", "--set", "engine.key_env=THE_MODEL_KEY", "--set", "engine.retries=0")
    with serving(lambda *_: completion("7")) as server:
        here = Place(tmp_path, server)
        url = "http://127.0.0.1:9/v1" if key else f"{server.url}/v1"
        ended = json.loads(here.bascule("run", *small, *asked, "--set", f"engine.url={url}", key=key, expected=1))
        assert ended["status"] == "paused"
        assert said in ended["reason"]
        assert "bascule resume thinks" in ended["reason"]
        if not key:
            assert server.requests == []
            assert json.loads(here.bascule("resume", "thinks", "--json"))["status"] == "completed"
