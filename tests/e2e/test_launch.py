"""Training as several processes of a launcher: the adapters of one process, and an end of all with the end of any."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bascule.runtime.services.catalog import SERVICES
from tests.e2e.test_kill import children_of, kill_everything
from tests.oracles import within

HOME = "launched"
#: Several micro-batches; small steps, from answers that were recorded of adapters that took larger ones.
GRPO = {"max_nodes": 40, "learning_rate": 0.001, "max_kl": 10}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def launched(world: Any, *arguments: str) -> list[str]:
    return [*TORCHRUN, *world.command(*arguments)[1:]]


@contextlib.contextmanager
def broker_of(world: Any, home: str) -> Iterator[tuple[str, Any]]:
    """The address of a server on the home, and what its users log in with."""
    server = subprocess.Popen(
        world.command("broker", "--json"), env=world.environment(home), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        yield found["url"], json.loads(Path(found["credentials"]).read_text())
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def home(world: Any, recorded: dict[str, Any]) -> str:
    """A finished run whose trainer was two processes, with updates of several micro-batches."""
    env = world.environment(HOME)
    with broker_of(world, HOME) as (url, credentials):
        workers = []
        for service in SERVICES:
            own = world.root / f"{HOME}-{service}.json"
            own.write_text(json.dumps({service: credentials[service]}))
            command = ("serve", service, "--url", url, "--credentials", str(own))
            start = launched(world, *command) if service == "trainer" else world.command(*command)
            workers.append(subprocess.Popen(start, env=env, stderr=subprocess.DEVNULL))
        asks = world.root / f"{HOME}-cli.json"
        asks.write_text(json.dumps({"cli": credentials["cli"]}))
        given = [arg for name, value in GRPO.items() for arg in ("--set", f"algorithms.grpo.{name}={value}")]
        where = ("--url", url, "--credentials", str(asks))
        try:
            report = world.json(*world.cassette_run(recorded["cassette"]), *given, *where, home=HOME)
        finally:
            for process in workers:
                kill_everything(process)
    assert any(g["algorithm"] == "grpo" for g in report["generations"])
    return HOME


def generation(world: Any, home: str) -> str:
    """That trained with grpo."""
    lines = world.bascule("log", "same", "--type", "train.requested", "--json", home=home).stdout.splitlines()
    return next(str(d["generation"]) for d in (json.loads(line)["data"] for line in lines) if d["algorithm"] == "grpo")


def test_a_trainer_of_two_processes_is_one_of_five_services(world: Any, home: str) -> None:
    lines = world.bascule("log", "same", "--type", "train.started", "--json", home=home).stdout.splitlines()
    started = [json.loads(line)["data"] for line in lines]
    assert [s["versions"]["processes"] for s in started] == ["2"] * len(started) != []
    assert world.json("verify", "same", home=home)["faults"] == []
    assert world.json("replay", "same", home=home)["differences"] == []


def test_one_process_trains_what_two_did_to_1e_5_and_says_so(world: Any, home: str) -> None:
    text = world.bascule("train", "same", "--request", generation(world, home), home=home).stdout
    assert "1 process(es), where 2 are recorded" in text
    assert "another adapter: " in text  # that it is rounded otherwise shows that the work was shared
    apart = re.search(r"largest difference (\S+),", text)
    assert apart is not None
    within("adapter of one process", "two launched ones", float(apart[1]), 1e-5)


def test_two_launched_processes_train_the_same_adapter_again_and_one_of_them_prints(world: Any, home: str) -> None:
    command = launched(world, "train", "same", "--request", generation(world, home), "--json")
    done = subprocess.run(
        command, env=world.environment(home), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] is True
    assert [(i["processes"], i["recorded_processes"]) for i in found["iterations"]] == [(2, 2)] * 3


@pytest.mark.nightly
def test_two_launched_processes_train_what_one_did_to_1e_5(world: Any, recorded: dict[str, Any]) -> None:
    request = next(str(g["generation"]) for g in recorded["report"]["generations"] if g["algorithm"] == "grpo")
    done = subprocess.run(
        launched(world, "train", "live", "--request", request, "--json"),
        env=world.environment("home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(i["processes"], i["recorded_processes"]) for i in found["iterations"]] == [(2, 1)] * 3
    distance = 0.0 if found["same"] else found["distance"]["max_abs"]
    within("adapter of two launched processes", "one process", distance, 1e-5)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_the_end_of_one_process_is_the_end_of_the_launch(world: Any, rank: int) -> None:
    with broker_of(world, "idle") as (url, credentials):
        own = world.root / "idle-trainer.json"
        own.write_text(json.dumps({"trainer": credentials["trainer"]}))
        process = subprocess.Popen(
            launched(world, "serve", "trainer", "--url", url, "--credentials", str(own)),
            env=world.environment("idle"),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            assert any("trainer: serving" in line for line in process.stderr)
            both = {rank_of(pid): pid for pid in children_of(process.pid)}
            assert set(both) == {0, 1}
            os.kill(both[rank], signal.SIGKILL)
            process.stderr.read()
            assert process.wait(60) != 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in both.values())
        finally:
            kill_everything(process)


def rank_of(pid: int) -> int:
    found = [e for e in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if e.startswith(b"RANK=")]
    return int(found[0].removeprefix(b"RANK="))


@pytest.mark.parametrize("command", [("status",), ("run", "--task", "parity"), ("serve", "rollout")])
def test_a_command_that_does_not_train_is_refused_under_a_launcher(world: Any, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        world.command(*command),
        env={**world.environment("none"), "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "Launch `train` or `serve trainer` so" in done.stderr
    assert not (world.root / "none").exists()
