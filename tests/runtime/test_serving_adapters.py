"""An adapter is probed before anything runs with it, and one that is not served as trained is taken away again."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import structlog
import torch

from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.runtime.engines.transformers import TransformersEngine, make
from bascule.runtime.services.adapter_probe import NotServed
from bascule.runtime.services.inference import load_adapter, served_name
from bascule.runtime.state import Adapter, RunState
from bascule.schemas.errors import EngineError
from bascule.schemas.events import BlobRef
from bascule.schemas.trajectory import Sampling
from bascule.trainers.base_model import load_model
from bascule.trainers.lora import adapter_files, attach_lora
from bascule.trainers.params import TrainParams
from bascule.trainers.probe import probe_files, probe_ids
from tests.tiny_model import make_tiny_model

RUN = "r-1"


@dataclass
class Held:
    """What loading an adapter reads of a run's view."""

    state: RunState
    home: Path
    kept: dict[str, bytes] = field(default_factory=dict)
    run: str = RUN
    logger: Any = field(default_factory=structlog.get_logger)

    @property
    def blobs(self) -> Held:
        return self

    async def get(self, ref: BlobRef) -> bytes:
        return self.kept[ref.sha256]


class Stale:
    """An engine that serves, so many times, the adapter before instead of the one that it was told to load."""

    def __init__(self, engine: TransformersEngine, times: int) -> None:
        self._engine = engine
        self._times = times
        self._before: bytes | None = None
        self.unloaded: list[str] = []

    async def start(self) -> EngineInfo:
        return await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()

    async def load_adapter(self, name: str, folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        right = file.read_bytes()
        if self._before is not None and self._times:
            self._times -= 1
            file.write_bytes(self._before)
        await self._engine.load_adapter(name, folder)
        file.write_bytes(right)
        self._before = self._before or right

    async def unload_adapter(self, name: str) -> None:
        self.unloaded.append(name)
        await self._engine.unload_adapter(name)

    async def sample(self, request: SampleRequest) -> Sampled:
        return await self._engine.sample(request)

    async def score(self, adapter: str | None, ids: Any) -> tuple[tuple[float, ...], ...]:
        return await self._engine.score(adapter, ids)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def view(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    """A run with two checkpoints of a job, and what the trainer recorded of them."""
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    held = Held(RunState(run=RUN), tmp_path)
    for name, scale in (("g01-i000", 1.0), ("g01-i001", 1.1)):
        model = attach_lora(load_model(base), TrainParams(lora_r=4, lora_alpha=8.0), 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1, generator=generator).mul_(scale if "lora_B" in key else 1.0)
        files = adapter_files(model)
        refs = {n: BlobRef(sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in files.items()}
        held.kept |= {refs[n].sha256: d for n, d in files.items()}
        held.state.adapters[name] = Adapter(refs, "0" * 64, probe_files(base, files, probe_ids(base)))
    return held


@pytest.fixture
async def engine(base: Path, view: Held) -> AsyncIterator[TransformersEngine]:
    engine = make(str(base), {"threads": 1})
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    yield engine
    await engine.close()


async def test_an_adapter_that_is_served_as_trained_is_recorded_so(view: Any, engine: TransformersEngine) -> None:
    probe = await load_adapter(view, engine, "g01-i001")
    assert probe is not None
    assert probe.dtype == "float32"
    assert probe.largest < probe.bound < probe.from_base
    assert probe.tokens == len(probe_ids(Path(engine.model_name))) - 1


async def test_an_adapter_that_is_stale_once_is_loaded_again(view: Any, engine: TransformersEngine) -> None:
    stale = Stale(engine, times=1)
    await load_adapter(view, stale, "g01-i000")
    assert await load_adapter(view, stale, "g01-i001") is not None
    assert stale.unloaded == [served_name(RUN, "g01-i001")]


async def test_one_that_stays_stale_is_taken_away_and_the_one_before_stays(
    view: Any, engine: TransformersEngine
) -> None:
    stale = Stale(engine, times=99)
    await load_adapter(view, stale, "g01-i000")
    with pytest.raises(NotServed, match="nearer to those of the adapter 'g01-i000'") as caught:
        await load_adapter(view, stale, "g01-i001")
    assert caught.value.next_step

    def asked(adapter: str) -> SampleRequest:
        return SampleRequest(
            trajectory="t",
            call=0,
            prompt="12 +",
            n=1,
            sampling=Sampling(max_tokens=2),
            seed=1,
            adapter=served_name(RUN, adapter),
        )

    assert await stale.sample(asked("g01-i000"))
    with pytest.raises(EngineError, match="not loaded"):
        await stale.sample(asked("g01-i001"))


async def test_an_adapter_whose_probe_was_not_recorded_is_loaded_as_before(
    view: Any, engine: TransformersEngine
) -> None:
    found = view.state.adapters["g01-i000"]
    view.state.adapters["g01-i000"] = Adapter(found.files, found.sha256)
    assert await load_adapter(view, engine, "g01-i000") is None
