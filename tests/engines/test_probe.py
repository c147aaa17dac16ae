"""A probe tells an adapter that is served as published from one that is not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("torch")


from bascule.runtime.engines.transformers import TransformersEngine, make
from bascule.runtime.services.adapter_probe import NotServed, probe_served
from bascule.trainers.probe import probe_files, probe_ids
from tests.engines.served import version_files, write_versions
from tests.oracles import within
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
async def engine(base: Path, tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    engine = make(str(base), {"threads": 1})
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    for name, folder in write_versions(base, tmp_path).items():
        await engine.load_adapter(name, folder)
    yield engine
    await engine.close()


class Stale:
    """Scores under another adapter than the one that is asked for."""

    def __init__(self, engine: TransformersEngine, served: str | None) -> None:
        self._engine, self._served = engine, served

    async def score(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        return await self._engine.score(self._served, ids)


async def test_an_adapter_that_is_served_as_published_passes(engine: TransformersEngine, base: Path) -> None:
    ids = probe_ids(base)
    for name, scale in (("v1", 1.0), ("v2", 1.1)):
        probe = probe_files(base, version_files(base, scale), ids)
        served = await probe_served(engine, await engine.start(), name, probe, {})
        within("log-probabilities of a served adapter", "the trainer's forward pass", served.largest, 1e-4)
        assert served.tokens == len(ids) - 1
        assert served.from_base > 0.01


async def test_log_probabilities_that_are_no_numbers_are_caught(engine: TransformersEngine, base: Path) -> None:
    probe = probe_files(base, version_files(base, 1.0), probe_ids(base))

    class Broken:
        async def score(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
            (right,) = await engine.score(adapter, ids)
            return ((*right[:-1], float("nan")),)

    with pytest.raises(NotServed, match="nan off"):
        await probe_served(Broken(), await engine.start(), "v1", probe, {})


@pytest.mark.parametrize("instead", ["v1", None])
async def test_a_stale_adapter_and_a_forgotten_one_are_caught(
    engine: TransformersEngine, base: Path, instead: str | None
) -> None:
    probe = probe_files(base, version_files(base, 1.1), probe_ids(base))
    with pytest.raises(NotServed, match=r"'v2' is not served as it was trained"):
        await probe_served(Stale(engine, instead), await engine.start(), "v2", probe, {})
