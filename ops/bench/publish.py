"""From an adapter's bytes in the trainer to the first answer with it: the blob store, the engine's check and merge."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bascule.plugins.engine import SampleRequest
from bascule.runtime.engines.transformers import TransformersEngine, make
from bascule.runtime.log.blobs import FileBlobs
from bascule.schemas.trajectory import Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import DEFAULT_MODEL, load_model, resolve_model
from bascule.trainers.lora import adapter_files, attach_lora
from bascule.trainers.params import TrainParams
from ops.bench.report import Figure, figure

VERSIONS = 20
TARGET = 300  # ms from publishing to the first answer, p50
RANK = 16
PROMPT = "A bascule is a balance with two"


@dataclass(frozen=True)
class Taken:
    """Milliseconds of one version: to store it durably, to fetch and load it, and until the first answer."""

    store: float
    load: float
    answer: float


def run(model_name: str = DEFAULT_MODEL, versions: int = VERSIONS) -> tuple[dict[str, Figure], list[str]]:
    """Publish versions one after another, each also to PEFT, and compare the answers.

    Raises:
        AssertionError: an answer's log-probability is not that of PEFT's model with the same files.
    """
    return asyncio.run(_run(model_name, versions))


async def _run(model_name: str, versions: int) -> tuple[dict[str, Figure], list[str]]:
    engine = make(model_name, {})
    assert isinstance(engine, TransformersEngine)
    info = await engine.start()
    base = resolve_model(model_name)
    params = TrainParams(lora_r=RANK, lora_alpha=2.0 * RANK)
    trained: Any = attach_lora(load_model(base), params, seed=0).eval()
    peft: Any = attach_lora(load_model(base), params, seed=0).eval()
    ours: list[Taken] = []
    theirs: list[float] = []
    worst = 0.0
    # The first version warms both up.
    for version in range(versions + 1):
        _train(trained, version)
        files = adapter_files(trained)
        with tempfile.TemporaryDirectory() as folder:
            taken, token, logprob = await _publish(engine, Path(folder), files, version)
            theirs.append(_load_with_peft(peft, Path(folder) / "served", version))
        ours.append(taken)
        worst = max(worst, abs(logprob - _logprob(peft, engine.encode(PROMPT), token)))
        assert worst < 1e-3, f"version {version} answers {worst:.2g} nats beside PEFT"
    await engine.close()
    totals = sorted(t.store + t.load + t.answer for t in ours[1:])
    baseline = statistics.median(theirs[1:])
    ratio = baseline / statistics.median(totals)
    figures = {
        "published to answered, p50": figure(totals, "ms", baseline="PEFT load_adapter alone", ratio=ratio),
        "published to answered, p90": figure([totals[round(0.9 * (versions - 1))]], "ms"),
        "of it stored durably": figure([t.store for t in ours[1:]], "ms"),
        "of it fetched and loaded": figure([t.load for t in ours[1:]], "ms"),
        "of it merged and answered": figure([t.answer for t in ours[1:]], "ms"),
        "PEFT load_adapter": figure(theirs[1:], "ms"),
    }
    size = sum(map(len, files.values())) / 2**20
    p50 = statistics.median(totals)
    return figures, [
        f"{'ok' if p50 <= TARGET else 'UNDER'}: p50 {p50:.0f} ms, at most {TARGET}",
        f"{versions} versions of rank {RANK} on all linear layers, {size:.1f} MiB each.",
        f"An answer is one greedy token; its log-probability is at most {worst:.1g} nats from PEFT's.",
        f"{info.model}, {', '.join(f'{k} {v}' for k, v in info.versions.items())}.",
    ]


def _train(model: Any, version: int) -> None:
    """Stand for an update: new weights in every B."""
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


async def _publish(
    engine: TransformersEngine, folder: Path, files: dict[str, bytes], version: int
) -> tuple[Taken, int, float]:
    """What the services do: blobs in, blobs out, load, unload the version before, and answer; with what is answered."""
    blobs = FileBlobs(folder / "blobs")
    name = f"v{version}"
    start = time.perf_counter()
    refs = {n: await blobs.put(data, "application/x-safetensors") for n, data in files.items()}
    stored = time.perf_counter()
    served = folder / "served"
    served.mkdir()
    for n, ref in refs.items():
        data = await blobs.get(ref)
        await asyncio.to_thread((served / n).write_bytes, data)
    await engine.load_adapter(name, served)
    await engine.unload_adapter(f"v{version - 1}")
    loaded = time.perf_counter()
    answer = await engine.sample(
        SampleRequest(
            trajectory=f"bench-{version:04d}-n0",
            call=0,
            prompt=PROMPT,
            n=1,
            sampling=Sampling(temperature=0, max_tokens=1),
            seed=0,
            adapter=name,
        )
    )
    end = time.perf_counter()
    (output,) = answer.outputs
    taken = Taken(1e3 * (stored - start), 1e3 * (loaded - stored), 1e3 * (end - loaded))
    return taken, unpack_ids(output.token_ids)[0], unpack_floats(output.logprobs)[0]


def _load_with_peft(model: Any, folder: Path, version: int) -> float:
    """Milliseconds of PEFT's ``load_adapter`` from a folder."""
    start = time.perf_counter()
    model.load_adapter(str(folder), f"v{version}")
    taken = 1e3 * (time.perf_counter() - start)
    model.set_adapter(f"v{version}")
    if f"v{version - 1}" in model.peft_config:
        model.delete_adapter(f"v{version - 1}")
    return taken


def _logprob(model: Any, prompt: tuple[int, ...], token: int) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return float(logits.float().log_softmax(-1)[token])
