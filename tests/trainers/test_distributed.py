"""Several processes make the steps that one would make, whether they hold the base weights whole or split."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.schemas.errors import ConfigError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.distributed import Ranks
from bascule.trainers.tensorfile import read_tensors
from tests.oracles import within
from tests.tiny_model import make_tiny_model
from tests.trainers.architectures import KINDS, tiny
from tests.trainers.bandit import PARAMS, alternating_credit, make_job, sample_batch, train
from tests.trainers.conversations import conversations
from tests.trainers.distributed_job import Case, Outcome, main

ROOT = Path(__file__).parents[2]
LAUNCH = {"DDP": ["--multi_gpu"], "FSDP2": ["--use_fsdp", "--fsdp_version", "2"]}
SEVERAL: dict[str, Any] = {**PARAMS, "max_nodes": 30, "num_iterations": 2, "num_mini_batches": 2, "beta": 0.1}
EXPERTS = {
    "lora_target_modules": ["q_proj", "o_proj"],
    "lora_target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
}


def launch(folder: Path, how: list[str]) -> subprocess.CompletedProcess[str]:
    command = ["accelerate.commands.launch", *how, "--num_processes", "2", "--num_machines", "1"]
    quiet = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    program = ["-m", "tests.trainers.distributed_job", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", *command, *quiet, *program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def outcomes(folder: Path, processes: int) -> dict[str, list[Outcome]]:
    """Of each case, that of each process."""
    names = sorted({p.name.rsplit("-", 2)[0] for p in folder.glob(f"*-{processes}-0.json")})
    paths = {name: [folder / f"{name}-{processes}-{rank}.json" for rank in range(processes)] for name in names}
    return {n: [msgspec.json.decode(p.read_bytes(), type=Outcome) for p in found] for n, found in paths.items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Case], dict[str, Trajectory]]:
    base = make_tiny_model(tmp_path_factory.mktemp("base"))
    experts = tmp_path_factory.mktemp("experts")
    tiny("GptOss", **KINDS["GptOss"]).save_pretrained(experts)
    parent = tmp_path_factory.mktemp("parent")
    job = make_job(base, {**PARAMS, "learning_rate": 2e-2}, seed=2)
    first = sample_batch(job, seed=0)
    train(job, first, alternating_credit(first), 0)
    for name, data in job.adapter_files().items():
        (parent / name).write_bytes(data)
    batch = conversations(job.model, seed=3, groups=3)
    rewards = {t: None if i % 5 == 4 else float(i % 3) for i, t in enumerate(sorted(batch))}

    def case(algorithm: str, params: Mapping[str, Any], **more: Any) -> Case:
        given = {"base": str(base), "parent": str(parent), **more}
        return Case(algorithm=algorithm, params=dict(params), rewards=rewards, **given)

    cases = {name: case(name, SEVERAL) for name in ("ppo", "grpo", "dpo")}
    cases["one-micro-batch"] = case("ppo", {**SEVERAL, "max_nodes": 4096, "num_mini_batches": 1})
    cases["promoted"] = case("dpo", {**SEVERAL, "kl_reference": "promoted", "lora_dropout": 0.1}, recompute=True)
    cases["experts"] = case("best_of_n", {**SEVERAL, **EXPERTS}, base=str(experts), parent=None)
    cases["refused"] = case("grpo", {**SEVERAL, "max_ratio": 1.6})
    cases["memory"] = case("grpo", {**SEVERAL, "max_nodes": 60}, nodes=30)
    return cases, batch


@pytest.fixture(scope="module")
def alone(
    given: tuple[dict[str, Case], dict[str, Trajectory]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """What one process ends with; one that has no process of rank 1 has all the memory, so it is told the half."""
    cases, batch = given
    half = msgspec.structs.replace(cases["memory"], params={**cases["memory"].params, "max_nodes": 30})
    folder = write(tmp_path_factory.mktemp("alone"), {**cases, "memory": half}, batch)
    main(folder)
    return {name: found[0] for name, found in outcomes(folder, 1).items()}


def write(folder: Path, cases: Mapping[str, Case], batch: Mapping[str, Trajectory]) -> Path:
    (folder / "cases.json").write_bytes(msgspec.json.encode(cases))
    (folder / "batch.json").write_bytes(msgspec.json.encode(batch))
    return folder


@pytest.mark.parametrize("how", sorted(LAUNCH))
def test_two_processes_give_the_result_of_one(
    given: tuple[dict[str, Case], dict[str, Trajectory]], alone: dict[str, Outcome], tmp_path: Path, how: str
) -> None:
    cases, batch = given
    if how == "FSDP2":
        cases = {name: case for name, case in cases.items() if name != "memory"}
    done = launch(write(tmp_path, cases, batch), LAUNCH[how])
    assert done.returncode == 0, done.stderr
    found = outcomes(tmp_path, 2)
    assert set(found) == set(cases)
    for name, (first, second) in found.items():
        one = alone[name]
        assert (first.state, first.refused) == (second.state, second.refused)
        assert bool(one.refused) == bool(first.refused) == (name == "refused")
        if one.refused:
            assert "max_ratio" in one.refused
            assert first.refused == one.refused
            continue
        tensors, wanted = (read_tensors(o.state, name)[0] for o in (first, one))
        assert set(tensors) == set(wanted)
        trained = [k for k in wanted if k.startswith(("adapter/", "critic/"))]
        assert any(k.startswith("critic/") for k in trained) == (cases[name].algorithm == "ppo")
        apart = max(float((tensors[k] - wanted[k]).abs().max()) for k in trained)
        within(f"adapter and critic of two processes ({how}, {name})", "one process", apart, 1e-5)
        for a, b in zip(first.metrics, one.metrics, strict=True):
            exact = ("trained_tokens", "nodes", "max_nodes", "optimizer_steps")
            assert [a[k] for k in exact] == [b[k] for k in exact]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        if how == "FSDP2":
            assert max(first.weights, second.weights) < 0.8 * one.weights  # embeddings are whole
        else:
            assert first.weights == second.weights == one.weights
    if how == "DDP":
        assert found["memory"][0].metrics[0]["max_nodes"] == 30


def test_the_end_of_one_process_ends_the_other(
    given: tuple[dict[str, Case], dict[str, Trajectory]], tmp_path: Path
) -> None:
    cases, batch = given
    dying = msgspec.structs.replace(cases["grpo"], dies=True)
    done = launch(write(tmp_path, {"dying": dying}, batch), LAUNCH["DDP"])
    assert done.returncode != 0
    assert not list(tmp_path.glob("dying-*"))


@pytest.mark.parametrize("sharded", [False, True])
def test_micro_batches_go_round_and_each_counts_once(sharded: bool) -> None:
    for size in (1, 2, 3):
        for count in range(8):
            processes = [Ranks() for _ in range(size)]
            for rank, process in enumerate(processes):
                process.rank, process.size, process.sharded = rank, size, sharded
            turns = [list(p.turns(count)) for p in processes]
            assert sorted(i for t in turns for i, counts in t if counts) == list(range(count))
            assert all(i < count for t in turns for i, _ in t)
            if sharded:
                assert len({len(t) for t in turns}) == 1
            else:
                assert all(counts for t in turns for _, counts in t)


def test_a_model_that_does_not_name_its_layers_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from bascule.trainers import distributed

    process: Any = object.__new__(distributed._Launched)
    process.sharded = True
    model = tiny("Llama")
    monkeypatch.setattr(type(model), "_no_split_modules", None)
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="llama"):
        process.shard(model)
