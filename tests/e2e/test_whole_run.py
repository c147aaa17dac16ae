"""One command, five processes, a recording: the same decisions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVICES = ("meta", "rollout", "verifier", "feedback", "trainer")


def test_a_run_pulls_both_levers_and_reports_every_generation(recorded: dict[str, Any]) -> None:
    report = recorded["report"]
    assert report["status"] == "completed"
    assert {"harness", "weights"} <= {g["lever"] for g in report["generations"]}
    assert "grpo" in {g["algorithm"] for g in report["generations"]}
    assert {"before", "after", "p", "n"} <= set(report["sealed"])
    assert Path(report["picture"]).read_bytes().startswith(b"\x89PNG")


def test_a_cassette_makes_the_same_decisions_as_the_live_engine(
    recorded: dict[str, Any], unkilled: dict[str, Any]
) -> None:
    """Apart from the gate's and the policy's names for the engine, nothing may depend on who answers."""
    assert [g["dev"] for g in recorded["report"]["generations"]] == [g["dev"] for g in unkilled["generations"]]
    assert recorded["report"]["decision_hash"] == unkilled["decision_hash"]


def test_replay_makes_every_decision_again_without_torch_or_network(world: Any, recorded: dict[str, Any]) -> None:
    del recorded
    script = (
        "import socket, sys\n"
        "real = socket.socket.connect\n"
        "def connect(self, address):\n"
        "    assert self.family == socket.AF_UNIX or address[0] == '127.0.0.1', address\n"
        "    return real(self, address)\n"
        "socket.socket.connect = connect\n"
        "from bascule.runtime.cli import app\n"
        "sys.argv = ['bascule', 'replay', 'live', '--json']\n"
        "try:\n"
        "    app.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'anthropic'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=world.environment("home"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["differences"] == []
    assert result["decisions"] > 20


def test_verify_finds_the_log_intact(world: Any, recorded: dict[str, Any]) -> None:
    del recorded
    assert world.json("verify", "live")["faults"] == []


def test_explain_names_the_figures_and_the_rejected_options(world: Any, recorded: dict[str, Any]) -> None:
    step = next(g["generation"] for g in recorded["report"]["generations"] if g["lever"] == "weights")
    text = world.bascule("explain", "live", str(step)).stdout
    for part in ("weights with grpo", "train informative", "best_of_n", "rejected", "chosen", "because of"):
        assert part in text


def test_five_serve_processes_make_the_same_decisions(
    world: Any, recorded: dict[str, Any], unkilled: dict[str, Any]
) -> None:
    """A server of its own, one process a service with that service's rights, and one that only starts the run."""
    home = "served"
    env = world.environment(home)
    server = subprocess.Popen(
        world.command("broker", "--json"), env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    broker = json.loads(server.stdout.readline())
    credentials = json.loads(Path(broker["credentials"]).read_text())
    workers = []
    for i, service in enumerate((*SERVICES, "rollout", "verifier")):
        own = world.root / f"{service}.json"
        own.write_text(json.dumps({service: credentials[service]}))
        # One of each finds the broker of its home by itself, the others are told of it.
        where = ("--url", broker["url"], "--credentials", str(own)) if i < len(SERVICES) else ()
        command = world.command("serve", service, *where)
        workers.append(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL))
    asks = world.root / "cli.json"
    asks.write_text(json.dumps({"cli": credentials["cli"]}))
    try:
        command = world.cassette_run(recorded["cassette"])
        report = world.json(*command, "--url", broker["url"], "--credentials", str(asks), home=home)
    finally:
        for process in (*workers, server):
            process.kill()
            process.wait()
    assert report["decision_hash"] == unkilled["decision_hash"]
    services = {line.split()[2] for line in world.bascule("log", "same", home=home).stdout.splitlines()}
    assert services == {"cli", *SERVICES}
