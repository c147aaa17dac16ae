"""vLLM itself, on the CPU: `make vllm-test` installs it and runs these."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

import torch

from bascule.plugins.engine import SampleRequest
from bascule.plugins.kit_engine import Conditions, check_engine
from bascule.runtime.engines import vllm
from bascule.runtime.engines.vllm_server import find_python
from bascule.runtime.services.adapter_probe import NotServed, probe_served
from bascule.schemas.errors import ConfigError, EngineError
from bascule.schemas.trajectory import Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import DEFAULT_MODEL, load_model, resolve_model
from bascule.trainers.lora import adapter_files, attach_lora
from bascule.trainers.params import TrainParams
from bascule.trainers.probe import probe_files, probe_ids
from tests.engines.served import oracle_of

CONTEXT = 512


def _python() -> str:
    try:
        return find_python()
    except ConfigError:
        return ""


pytestmark = pytest.mark.skipif(not _python(), reason="vLLM is not installed; `make vllm-test` installs and runs it")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of one adapter, three training steps apart."""
    model = attach_lora(load_model(resolve_model()), TrainParams(lora_r=8), 0)
    generator = torch.Generator().manual_seed(1)
    found = {}
    folder = tmp_path_factory.mktemp("adapters")
    for name, steps in (("v1", 200), ("v2", 3)):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.add_(2e-4 * steps * torch.randn(parameter.shape, generator=generator).sign())
        found[name] = folder / name
        found[name].mkdir()
        for file, data in adapter_files(model).items():
            (found[name] / file).write_bytes(data)
    return found


def make(folder: Path) -> vllm.VllmEngine:
    given: dict[str, Any] = {
        "dtype": "float32",
        "eager": True,
        "max_model_len": CONTEXT,
        "max_lora_rank": 8,
        "folder": str(folder),
    }
    given["start_s"] = 1800.0
    engine = vllm.make(DEFAULT_MODEL, given)
    assert isinstance(engine, vllm.VllmEngine)
    return engine


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[vllm.VllmEngine]:
    engine = make(tmp_path)
    yield engine
    await engine.close()


async def test_it_keeps_what_the_kit_asks_of_every_engine(engine: vllm.VllmEngine, adapters: dict[str, Path]) -> None:
    await engine.start()  # before the kit's patience begins
    oracle = oracle_of(resolve_model(), adapters)
    given = Conditions(oracle=oracle, tolerance=1e-3, adapters=adapters, context=CONTEXT, max_tokens=4)
    checks = [c async for c in check_engine(engine, given)]
    assert {c.name: c.found for c in checks if c.outcome == "broken"} == {}
    assert {c.name for c in checks if c.outcome == "held"} > {"logprobs", "oracle", "adapters", "two-adapters"}


def test_vllm_within_a_process_keeps_it_too(adapters: dict[str, Path]) -> None:
    """In the Python that has vLLM, which is not this one."""
    folder = next(iter(adapters.values())).parent
    done = subprocess.run(
        [_python(), "-m", "tests.engines.vllm_within", str(folder), str(CONTEXT)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: said for name, (outcome, said) in found.items() if outcome == "broken"} == {}
    assert {name for name, (outcome, _) in found.items() if outcome == "held"} > {"logprobs", "oracle", "two-adapters"}


async def test_a_hot_swap_under_load_attributes_every_answer_and_a_stale_version_is_caught(
    engine: vllm.VllmEngine, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = resolve_model()
    oracle = oracle_of(base, adapters)
    ids = probe_ids(base)
    files = {name: {p.name: p.read_bytes() for p in folder.iterdir()} for name, folder in adapters.items()}
    probes = {name: probe_files(base, held, ids) for name, held in files.items()}
    info = await engine.start()

    def request(i: int, adapter: str) -> SampleRequest:
        return SampleRequest(
            trajectory=f"g00-dev-{i:04d}-s0",
            call=0,
            prompt=f"{i} + 1 =",
            n=2,
            sampling=Sampling(max_tokens=6),
            seed=i,
            adapter=adapter,
        )

    await engine.load_adapter("v1", adapters["v1"])
    served = await probe_served(engine, info, "v1", probes["v1"], {})
    assert served.largest < served.bound < served.from_base
    early = [asyncio.create_task(engine.sample(request(i, "v1"))) for i in range(8)]
    await asyncio.sleep(0)
    await engine.load_adapter("v2", adapters["v2"])
    await probe_served(engine, info, "v2", probes["v2"], {"v1": probes["v1"]})
    late = [asyncio.create_task(engine.sample(request(i, "v2"))) for i in range(8)]
    await engine.unload_adapter("v1")
    for name, calls in (("v1", early), ("v2", late)):
        other = "v2" if name == "v1" else "v1"
        for sampled in await asyncio.gather(*calls):
            for output in sampled.outputs:
                tokens, found = unpack_ids(output.token_ids), unpack_floats(output.logprobs)
                own, wrong = (oracle(sampled.prompt_ids, tokens, 1.0, who) for who in (name, other))
                assert _off(found, own) < 1e-3
                assert _off(found, own) < _off(found, wrong)
    with pytest.raises(EngineError, match="'v1', which is not loaded"):
        await engine.sample(request(0, "v1"))
    await engine.load_adapter("v3", adapters["v1"])  # a new name, the files of an earlier version
    with pytest.raises(NotServed, match="nearer to those of the adapter 'v1'"):
        await probe_served(engine, info, "v3", probes["v2"], {"v1": probes["v1"]})


def _off(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
