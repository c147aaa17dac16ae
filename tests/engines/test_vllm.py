"""The client of vLLM: exact tokens, adapters on every replica, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

import torch

from bascule.plugins.engine import Message, SampleRequest
from bascule.plugins.kit_engine import Conditions, check_engine
from bascule.plugins.loader import plugins
from bascule.runtime.cli.configuration import check_choices, configure
from bascule.runtime.engines import vllm
from bascule.runtime.engines.transformers import TransformersEngine
from bascule.runtime.engines.transformers import make as embedded
from bascule.runtime.engines.vllm_inside import InsideReplica
from bascule.runtime.engines.vllm_server import find_python
from bascule.runtime.services.adapter_probe import NotServed, probe_served
from bascule.runtime.services.inference import made_engine
from bascule.runtime.world import World
from bascule.schemas.errors import ConfigError, EngineError, PromptError
from bascule.schemas.trajectory import Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import load_model, load_tokenizer
from bascule.trainers.probe import probe_files, probe_ids
from tests.engines.served import oracle_of, write_versions
from tests.engines.vllm_protocol import KEY, Refusal, VllmProtocol
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROTOCOL_KEY", KEY)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_versions(base, tmp_path_factory.mktemp("versions"))


@pytest.fixture
async def behind(base: Path) -> AsyncIterator[TransformersEngine]:
    engine = embedded(str(base), {"threads": 1})
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def servers(behind: TransformersEngine) -> AsyncIterator[list[VllmProtocol]]:
    found = [VllmProtocol(behind) for _ in range(2)]
    for server in found:
        await server.start()
    yield found
    for server in found:
        await server.close()


def client(base: Path, tmp_path: Path, *servers: VllmProtocol, **params: Any) -> vllm.VllmEngine:
    urls = [server.url for server in servers]
    given = {"urls": urls, "key_env": "PROTOCOL_KEY", "folder": str(tmp_path / "shared"), "retries": 0, **params}
    engine = vllm.make(str(base), given)
    assert isinstance(engine, vllm.VllmEngine)
    return engine


def request(text: str = "12 + 13 =", *, adapter: str | None = None, n: int = 1, **sampling: Any) -> SampleRequest:
    sampling.setdefault("max_tokens", 6)
    return SampleRequest(
        trajectory="g00-dev-0000-s0", call=0, prompt=text, n=n, sampling=Sampling(**sampling), seed=3, adapter=adapter
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_it_keeps_what_the_kit_asks_of_every_engine(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    given = Conditions(
        oracle=oracle_of(base, adapters), tolerance=1e-4, adapters=adapters, context=256, ends=frozenset([2])
    )
    checks = [c async for c in check_engine(client(base, tmp_path, *servers), given)]
    assert {c.name: c.found for c in checks if c.outcome != "held"} == {}
    assert all(server.asked for server in servers)


async def test_raw_logprobs_are_found_out_at_the_start_and_none_is_recorded(
    base: Path, tmp_path: Path, servers: list[VllmProtocol]
) -> None:
    servers[1].raw = True
    engine = client(base, tmp_path, *servers)
    info = await engine.start()
    assert (info.logprobs, info.token_ids, info.versions["logprobs"]) == (False, True, "raw")
    assert info.versions["device"] == vllm.computes_on(engine.params)
    (output,) = (await engine.sample(request(temperature=0.7))).outputs
    assert output.logprobs == b""
    assert unpack_ids(output.token_ids)
    await engine.close()


async def test_an_adapter_is_on_every_replica_or_on_none(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    engine = client(base, tmp_path, *servers)
    await engine.start()
    servers[1].refuse_load = True
    with pytest.raises(EngineError, match=r"'v1-\S+' was not loaded.*No room"):
        await engine.load_adapter("v1", adapters["v1"])
    assert [server.served for server in servers] == [{}, {}]
    assert not list((tmp_path / "shared" / "adapters").iterdir())
    servers[1].refuse_load = False
    await engine.load_adapter("v1", adapters["v1"])
    assert servers[0].served == servers[1].served
    (folder,) = servers[0].folders("v1")
    assert folder.is_absolute()
    assert files(folder) == files(adapters["v1"])
    await engine.close()


async def test_workers_that_load_an_adapter_at_once_all_have_it(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    workers = [client(base, tmp_path, *servers) for _ in range(4)]
    for engine in workers:
        await engine.start()
    await asyncio.gather(*(engine.load_adapter("v1", adapters["v1"]) for engine in workers))
    for engine in workers:
        assert (await engine.sample(request(adapter="v1"))).outputs
    for server in servers:
        (folder,) = server.folders("v1")
        assert files(folder) == files(adapters["v1"])
    for engine in workers:
        await engine.close()


async def test_another_process_finds_what_is_loaded_and_takes_nothing_else_for_it(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    first, second = client(base, tmp_path, *servers), client(base, tmp_path, *servers)
    for engine in (first, second):
        await engine.start()
        await engine.load_adapter("v1", adapters["v1"])
    assert await second.sample(request(adapter="v1"))
    await first.close()  # it lets go; the other still has it
    assert await second.sample(request(adapter="v1"))
    await second.close()
    before = servers[0].folders("v1")
    third = client(base, tmp_path, *servers)
    await third.start()
    await third.load_adapter("v1", adapters["v2"])
    (folder,) = set(servers[0].folders("v1")) - set(before)
    assert files(folder) == files(adapters["v2"])
    await third.close()


async def test_runs_of_one_name_in_two_homes_share_servers_and_each_has_its_own_adapter(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    runs = {version: client(base, tmp_path / version, *servers) for version in adapters}
    for version, engine in runs.items():
        await engine.start()
        await engine.load_adapter("v", adapters[version])
    oracle = oracle_of(base, adapters)
    for version, engine in runs.items():
        sampled = await engine.sample(request("3 + 4 =", adapter="v"))
        (output,) = sampled.outputs
        ids, found = unpack_ids(output.token_ids), unpack_floats(output.logprobs)
        for who in adapters:
            off = max(abs(a - b) for a, b in zip(found, oracle(sampled.prompt_ids, ids, 1.0, who), strict=True))
            assert (off < 1e-4) == (who == version), (version, who, off)
    for engine in runs.values():
        await engine.close()


@pytest.mark.parametrize("mixed", [False, True])
async def test_workers_that_share_a_server_ask_its_base_model_and_its_adapters_in_turns(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path], mixed: bool
) -> None:
    workers = [client(base, tmp_path, servers[0], mixed=mixed) for _ in range(2)]
    for engine in workers:
        await engine.start()
        await engine.load_adapter("v1", adapters["v1"])
    servers[0].mixed = False
    calls = [
        engine.sample(request(f"{i} + 1 =", adapter="v1" if i % 2 else None)) for i in range(12) for engine in workers
    ]
    async with asyncio.timeout(120):
        assert len(await asyncio.gather(*calls)) == 24
    assert servers[0].mixed == mixed
    for engine in workers:
        await engine.close()


async def test_under_load_every_answer_is_of_its_own_adapter_while_another_comes_and_one_goes(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    from peft import PeftModel

    engine = client(base, tmp_path, *servers)
    await engine.start()
    await engine.load_adapter("v1", adapters["v1"])
    for server in servers:
        server.held.clear()
    early = [asyncio.create_task(engine.sample(request(f"{i} + 1 =", adapter="v1", n=2))) for i in range(12)]
    async with asyncio.timeout(60):
        while sum(server.open for server in servers) < 12:
            await asyncio.sleep(0.01)
    await engine.load_adapter("v2", adapters["v2"])
    late = [asyncio.create_task(engine.sample(request(f"{i} + 1 =", adapter="v2", n=2))) for i in range(12)]
    await engine.unload_adapter("v1")  # those of it that are open are answered first
    with pytest.raises(EngineError, match="'v1', which is not loaded"):
        await engine.sample(request(adapter="v1"))
    assert all(server.folders("v1") for server in servers)
    for server in servers:
        server.held.set()
    answers = {"v1": await asyncio.gather(*early), "v2": await asyncio.gather(*late)}
    models = {name: PeftModel.from_pretrained(load_model(base), adapters[name]).eval() for name in adapters}
    for name, sampled in answers.items():
        for one in sampled:
            for output in one.outputs:
                ids = unpack_ids(output.token_ids)
                for who, model in models.items():
                    with torch.inference_mode():
                        logits = model(input_ids=torch.tensor([[*one.prompt_ids, *ids]])).logits[0]
                    places = logits[len(one.prompt_ids) - 1 : -1].log_softmax(-1)
                    found = places.gather(1, torch.tensor(ids)[:, None])[:, 0]
                    off = float((found - torch.tensor(unpack_floats(output.logprobs))).abs().max())
                    assert (off < 1e-4) == (who == name), (name, who, off)
    async with asyncio.timeout(60):
        while any(server.folders("v1") for server in servers):
            await asyncio.sleep(0.01)
    await engine.close()


async def test_a_stale_adapter_under_a_new_name_is_caught_on_the_replica_that_has_it(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], adapters: dict[str, Path]
) -> None:
    ids = probe_ids(base)
    probes = {name: probe_files(base, files(folder), ids) for name, folder in adapters.items()}
    engine = client(base, tmp_path, *servers, dtype="float32")
    info = await engine.start()
    await engine.load_adapter("v1", adapters["v1"])
    served = await probe_served(engine, info, "v1", probes["v1"], {})
    assert served.replicas == 2
    assert served.largest < served.bound < served.from_base
    servers[1].stale["v2"] = str(adapters["v1"])
    await engine.load_adapter("v2", adapters["v2"])
    with pytest.raises(NotServed, match=r"'v2' is not served.*replica 2 of 2.*nearer to those of the adapter 'v1'"):
        await probe_served(engine, info, "v2", probes["v2"], {"v1": probes["v1"]})
    await engine.close()


async def test_a_cancelled_call_ends_on_the_server(base: Path, tmp_path: Path, servers: list[VllmProtocol]) -> None:
    server = servers[0]
    engine = client(base, tmp_path, server)
    await engine.start()
    server.held.clear()
    call = asyncio.create_task(engine.sample(request()))
    async with asyncio.timeout(60):
        while not server.open:
            await asyncio.sleep(0.01)
        call.cancel()
        while not server.cut:
            await asyncio.sleep(0.01)
    assert server.open == 0
    with pytest.raises(asyncio.CancelledError):
        await call
    waiting = asyncio.create_task(engine.sample(request()))
    async with asyncio.timeout(60):
        while not server.open:
            await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await waiting


async def test_errors_of_the_server_are_one_paragraph_with_a_next_step(
    base: Path, tmp_path: Path, servers: list[VllmProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers[0]
    engine = client(base, tmp_path, server)
    await engine.start()
    server.fail = Refusal(500, "the engine core has died")
    with pytest.raises(EngineError, match=r"answered 500: the engine core has died\.") as caught:
        await engine.sample(request())
    assert caught.value.next_step
    server.fail = Refusal(400, "This model's maximum context length is 256 tokens.")
    with pytest.raises(PromptError, match="maximum context length"):
        await engine.sample(request())
    await engine.close()
    monkeypatch.setenv("PROTOCOL_KEY", "sk-another")
    with pytest.raises(EngineError, match="401") as caught:
        await client(base, tmp_path, server).start()
    assert "sk-another" not in str(caught.value)
    monkeypatch.setenv("PROTOCOL_KEY", f"{KEY}\nmore")
    with pytest.raises(EngineError, match=r"PROTOCOL_KEY.* holds white space") as refused:
        await client(base, tmp_path, server).start()
    assert KEY not in str(refused.value)
    monkeypatch.delenv("PROTOCOL_KEY")
    with pytest.raises(EngineError, match="PROTOCOL_KEY"):
        await client(base, tmp_path, server).start()


async def test_a_server_that_ends_at_its_start_says_why(base: Path, tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ValueError: no such device' >&2\nexit 3\n")
    python.chmod(0o755)
    given = {"environment": str(tmp_path / "env"), "folder": str(tmp_path / "home"), "start_s": 120}
    with pytest.raises(EngineError, match=r"ended by itself.*vllm\.log:\n(.*\n)*ValueError: no such device"):
        await vllm.make(str(base), given).start()


async def test_a_server_and_what_it_starts_end_with_the_engine(base: Path, tmp_path: Path) -> None:
    python, child = tmp_path / "env" / "bin" / "python", tmp_path / "child"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {child}.new && mv {child}.new {child}\nwait\n")
    python.chmod(0o755)
    given = {"environment": str(tmp_path / "env"), "folder": str(tmp_path / "home")}
    starting = asyncio.create_task(vllm.make(str(base), given).start())
    async with asyncio.timeout(120):
        while not child.exists():
            await asyncio.sleep(0.05)
    pid = int(child.read_text())
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    async with asyncio.timeout(60):
        while _runs(pid):
            await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"typo": 1}, "typo"),
        ({"max_lora_rank": 513}, "max_lora_rank"),
        ({"mode": "inside", "url": "http://127.0.0.1:1"}, "inside"),
    ],
)
def test_parameters_that_cannot_be_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        vllm.make("x", params)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("params", "gpu", "device"),
    [
        ({}, False, "cpu"),
        ({}, True, "cuda"),
        ({"url": "http://127.0.0.1:1"}, False, "cpu"),
        ({"url": "http://gpu-host:8000"}, False, "cuda"),
        ({"urls": ("http://localhost:1", "http://gpu-host:8000")}, False, "cuda"),
        ({"url": "http://gpu-host:8000", "device": "cpu"}, True, "cpu"),
    ],
)
def test_seconds_count_by_what_servers_compute_on(
    params: dict[str, Any], gpu: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(vllm, "_GPUS", (str(driver),))
    if gpu:
        driver.touch()
    assert vllm.computes_on(vllm.Params(**params)) == device


def world(*settings: str) -> World:
    given = {"task": {"name": "arith"}, "engine": {"name": "vllm"}}
    return World(plugins(), configure(given, settings, plugins()))


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ((), 32),
        (("algorithms.grpo.lora_r=48",), 64),
        (("algorithms.grpo.lora_r=48", "engine.max_lora_rank=128"), 128),
    ],
)
def test_a_server_that_a_run_starts_takes_the_rank_of_its_adapters(
    settings: tuple[str, ...], rank: int, tmp_path: Path
) -> None:
    asked = world(*settings)
    check_choices(asked)
    view: Any = SimpleNamespace(
        world=asked, plugins=plugins(), home=tmp_path, run="r", logger=SimpleNamespace(info=print)
    )
    engine = made_engine(view, asked.config.engine)
    assert isinstance(engine, vllm.VllmEngine)
    assert engine.params.max_lora_rank == rank


def test_a_rank_that_a_server_of_the_run_would_not_take_is_refused_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="grpo trains adapters of rank 64, and 'vllm' is to take up to 32"):
        check_choices(world("algorithms.grpo.lora_r=64", "engine.max_lora_rank=32"))
    with pytest.raises(ConfigError, match="grpo trains adapters of rank 1024, and 'vllm' is to take up to 512"):
        check_choices(world("algorithms.grpo.lora_r=1024"))
    others = ("algorithms.grpo.lora_r=64", "engine.max_lora_rank=32")
    check_choices(world(*others, "policy.algorithm=dpo"))
    check_choices(world(*others, 'levers=["harness"]'))
    check_choices(world(*others, "engine.url=http://127.0.0.1:1"))


async def test_inside_a_chat_is_tokenised_as_the_embedded_engine_does(base: Path, behind: TransformersEngine) -> None:
    tokenizer = load_tokenizer(base)
    inside = InsideReplica(None, tokenizer, 256, adapters=False)
    chat = (Message("system", "Be short."), Message("user", "12 + 13?"))
    assert await inside.encode(chat, {}) == behind.encode(chat)
    assert await inside.encode("12 + 13 =", {}) == behind.encode("12 + 13 =")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(PromptError, match="of the served model refuses the prompt: no such role"):
        await inside.encode(chat, {})
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template of the served model"):
        await inside.encode(chat, {})


def test_where_vllm_is_looked_for_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BASCULE_VLLM", str(tmp_path))
    with pytest.raises(ConfigError, match="no Python environment") as caught:
        find_python()
    assert "make vllm-env" in str(caught.value)
    (tmp_path / "bin").mkdir()
    os.symlink(sys.executable, tmp_path / "bin" / "python")
    assert find_python() == str(tmp_path / "bin" / "python")


def test_importing_the_engine_imports_no_model_library() -> None:
    import subprocess

    code = "import sys, bascule.runtime.engines.vllm; print([m for m in ('torch', 'openai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
