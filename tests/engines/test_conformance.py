"""The engines that bascule brings keep what the kit asks of every engine, and broken ones are found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")


from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest, asked
from bascule.plugins.kit import Check
from bascule.plugins.kit_engine import Conditions, check_engine
from bascule.runtime.engines import cassette, constant, transformers
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.landscape import WorkMeasured
from bascule.schemas.subjects import trajectory_logged
from bascule.schemas.trajectory import ModelCall, Trajectory, pack_ids
from tests.engines.served import oracle_of
from tests.tiny_model import make_tiny_adapter, make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f"v{i}": make_tiny_adapter(base, tmp_path_factory.mktemp("adapter"), i) for i in range(2)}


@pytest.fixture
def given(base: Path, adapters: dict[str, Path]) -> Conditions:
    return Conditions(
        oracle=oracle_of(base, adapters), tolerance=1e-4, adapters=adapters, context=256, ends=frozenset([2])
    )


def embedded(base: Path) -> Engine:
    return transformers.make(str(base), {"threads": 1, "tokens": 64, "rows": 20})


async def checked(engine: Engine, given: Conditions | None = None) -> dict[str, Check]:
    return {c.name: c async for c in check_engine(engine, given)}


def outcomes(checks: dict[str, Check], outcome: str) -> dict[str, str]:
    return {c.name: c.found for c in checks.values() if c.outcome == outcome}


class Recording:
    """Passes on to an engine what it is asked, and keeps the answers."""

    def __init__(self, engine: Engine) -> None:
        self.answers: dict[str, tuple[SampleRequest, Sampled]] = {}
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def sample(self, request: SampleRequest) -> Sampled:
        answer = await self._engine.sample(request)
        self.answers[request.trajectory] = (request, answer)
        return answer

    def write(self, path: Path) -> None:
        lines = []
        for name, (request, answer) in self.answers.items():
            call = ModelCall(
                kind="completion",
                asked=asked(request),
                prompt_ids=pack_ids(answer.prompt_ids),
                outputs=answer.outputs,
                sampling=request.sampling,
                seed=request.seed,
            )
            data = TrajectoryLogged(
                trajectory=name,
                evaluation="kit",
                example="e",
                position=0,
                sample=0,
                answer=None,
                error=None,
                prompt_tokens=0,
                output_tokens=0,
                measured=WorkMeasured(),
                body=Trajectory(steps=(call,)),
            )
            draft = Draft(subject=trajectory_logged("kit", name), step=0, data=data)
            producer = Producer(service="rollout", version="0", hash="")
            lines.append(encode(draft, run="kit", producer=producer, time="2026-01-01T00:00:00Z", root=None) + b"\n")
        path.write_bytes(b"".join(lines))


async def test_the_embedded_engine_keeps_every_promise(base: Path, given: Conditions) -> None:
    checks = await checked(embedded(base), given)
    assert outcomes(checks, "broken") == outcomes(checks, "warns") == outcomes(checks, "does not apply") == {}


async def test_the_constant_engine_keeps_what_applies_to_it() -> None:
    checks = await checked(constant.make("", {"text": "always 42"}))
    assert outcomes(checks, "broken") == outcomes(checks, "warns") == {}
    assert checks["stop"].outcome == checks["close"].outcome == "held"


async def test_a_cassette_of_the_suite_keeps_it_too(base: Path, tmp_path: Path) -> None:
    recording = Recording(embedded(base))
    assert outcomes(await checked(recording), "broken") == {}
    recording.write(tmp_path / "suite.jsonl")
    checks = await checked(cassette.make("", {"path": str(tmp_path / "suite.jsonl")}))
    assert outcomes(checks, "broken") == outcomes(checks, "warns") == {}
    assert {"tokens", "logprobs", "seeds", "stop"} <= outcomes(checks, "held").keys()


class Broken(Recording):
    """An engine whose answers or requests are spoilt."""

    def __init__(
        self,
        engine: Engine,
        *,
        request: Callable[[SampleRequest], SampleRequest] = lambda r: r,
        answer: Callable[[Sampled], Sampled] = lambda s: s,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(engine)
        self._spoilt = (request, answer, info or {})

    async def start(self) -> EngineInfo:
        return msgspec.structs.replace(await self._engine.start(), **self._spoilt[2])

    async def sample(self, request: SampleRequest) -> Sampled:
        spoil, spoil_answer, _ = self._spoilt
        return spoil_answer(await self._engine.sample(spoil(request)))


def with_outputs(**change: Any) -> Callable[[Sampled], Sampled]:
    def changed(sampled: Sampled) -> Sampled:
        outputs = tuple(msgspec.structs.replace(o, **change) for o in sampled.outputs)
        return msgspec.structs.replace(sampled, outputs=outputs)

    return changed


def with_request(**change: Any) -> Callable[[SampleRequest], SampleRequest]:
    return lambda request: msgspec.structs.replace(request, **change)


def at_temperature_one(request: SampleRequest) -> SampleRequest:
    heat = request.sampling.temperature and 1.0
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, temperature=heat))


def without_stop(request: SampleRequest) -> SampleRequest:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, stop=()))


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [
        ({"request": with_request(seed=7)}, {"seeds"}),
        ({"request": with_request(adapter=None)}, {"unknown-adapter", "adapters", "two-adapters"}),
        ({"request": with_request(n=1)}, {"samples"}),
        ({"request": at_temperature_one}, {"oracle"}),
        ({"request": without_stop}, {"stop"}),
        ({"answer": with_outputs(logprobs=b"")}, {"logprobs"}),
        ({"answer": with_outputs(token_ids=b"", logprobs=b"")}, {"tokens"}),
        ({"info": {"logprobs": False}}, {"logprobs"}),
        ({"info": {"token_ids": False}}, {"tokens"}),
    ],
    ids=lambda p: "" if isinstance(p, dict) else "-".join(sorted(p)),
)
async def test_an_engine_that_breaks_a_promise_is_found_out(
    base: Path, given: Conditions, spoilt: dict[str, Any], found: set[str]
) -> None:
    broken = outcomes(await checked(Broken(embedded(base), **spoilt), given), "broken")
    assert found <= broken.keys()
