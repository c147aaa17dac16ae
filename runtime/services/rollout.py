"""rollout: runs episodes on an inference engine, many at once, and serves adapters."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from bascule.plugins.engine import Engine
from bascule.plugins.task import Tool
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.runtime.state import RunState
from bascule.runtime.work import work_off
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.codec import INLINE_BYTES
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import EngineError
from bascule.schemas.events import AdapterServed, EpisodesRequested, TrajectoryLogged
from bascule.schemas.landscape import Measured
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.trajectory import ModelCall, Trajectory

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME = "rollout"
SHARDS_IN_FLIGHT = 12


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """The rollout service decides nothing."""
    del state, event, world
    return []


class Episodes(Protocol):
    """What runs one episode: a harness that asks an engine."""

    async def __call__(self, spec: EpisodeSpec, engine: Engine, tools: Mapping[str, Tool]) -> Trajectory: ...


@contextlib.asynccontextmanager
async def harness_processes(world: World) -> AsyncIterator[Episodes]:
    """Episodes with their harness in a process of its own."""
    pool = HarnessPool(children=world.config.concurrency)
    await pool.start()
    try:
        yield lambda spec, engine, tools: run_episode(spec, engine, pool, tools, world.redaction)
    finally:
        await pool.close()


class Rollout:
    """The rollout service's effects: every trajectory of a requested shard, once.

    Args:
        episodes: opens what runs episodes; processes unless a test says otherwise.
    """

    def __init__(self, episodes: Callable[[World], AbstractAsyncContextManager[Episodes]] = harness_processes) -> None:
        self._episodes = episodes
        self._engines: dict[str, Engine] = {}
        self._loaded: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self, view: View) -> None:
        await view.ready()
        async with contextlib.AsyncExitStack() as stack:
            episodes = await stack.enter_async_context(self._episodes(view.world))
            stack.push_async_callback(self._close)
            await self._engine(view, None)
            shard = partial(self._shard, view, episodes)
            await work_off(view, NAME, f"bascule.{view.run}.episodes.*.requested", shard, slots=SHARDS_IN_FLIGHT)

    async def _close(self) -> None:
        for loading in self._loaded.values():
            loading.cancel()
        await asyncio.gather(*self._loaded.values(), return_exceptions=True)
        for engine in self._engines.values():
            await engine.close()

    async def _engine(self, view: View, choice: PluginChoice | None) -> Engine:
        config = view.world.config
        choice = choice or config.engine
        key = msgspec.json.encode(choice, order="sorted").decode()
        if key not in self._engines:
            engine = view.plugins.registry.engines.get(choice.name)(config.model, engine_params(config, choice))
            self._engines[key] = engine
            info = await engine.start()
            started = view.state.started
            if choice == config.engine and started is not None and info.model_digest not in ("", started.model_digest):
                raise EngineError(
                    f"The model {config.model!r} is not the one that {view.run} started with "
                    f"(digest {info.model_digest}, recorded {started.model_digest}).",
                    next_step="Put the recorded model back; a run keeps its model.",
                )
            view.logger.info("engine.started", engine=info.name, model=info.model, versions=info.versions)
        return self._engines[key]

    async def _serve_adapter(self, view: View, engine: Engine, adapter: str) -> None:
        """Load an adapter once, and record that before the first episode runs with it."""
        key = (adapter, str(id(engine)))
        if key not in self._loaded:
            self._loaded[key] = asyncio.create_task(self._load(view, engine, adapter))
        try:
            await asyncio.shield(self._loaded[key])
        except Exception:
            self._loaded.pop(key, None)  # the next attempt loads it again
            raise

    async def _load(self, view: View, engine: Engine, adapter: str) -> None:
        # The request follows its adapter in the log. If it is forgotten, its episodes are done: none is left to run.
        found = view.state.adapters.get(adapter)
        if found is None:
            return
        with tempfile.TemporaryDirectory(dir=view.home, prefix="adapter-") as folder:
            for name, ref in found.files.items():
                data = await view.blobs.get(ref)
                await asyncio.to_thread((Path(folder) / name).write_bytes, data)
            await engine.load_adapter(served_name(view.run, adapter), Path(folder))
        await self._unload_superseded(view, engine, adapter)
        if adapter not in view.state.served:
            served = AdapterServed(adapter=adapter, sha256=found.sha256, engine=view.world.config.engine.name)
            subject = subjects.adapter_served(view.run, adapter)
            await view.append(
                NAME, [Draft(subject=subject, step=int(adapter.split("-", maxsplit=1)[0][1:]), data=served)]
            )

    async def _unload_superseded(self, view: View, engine: Engine, adapter: str) -> None:
        """Within a job nobody samples with earlier checkpoints: a newer one exists because their episodes are done."""
        job = adapter.split("-", maxsplit=1)[0]
        for name, identity in list(self._loaded):
            if identity == str(id(engine)) and name.startswith(f"{job}-") and name < adapter:
                del self._loaded[name, identity]
                await engine.unload_adapter(served_name(view.run, name))

    async def _shard(self, view: View, episodes: Episodes, event: Recorded) -> None:
        request = event.data
        assert isinstance(request, EpisodesRequested)
        missing = view.state.evaluations[request.evaluation].missing(request)
        if not missing:
            return
        engine = await self._engine(view, request.engine)
        if request.adapter is not None:
            await self._serve_adapter(view, engine, request.adapter)
        # What one of them runs into is no reason to lose the others.
        done = await asyncio.gather(
            *(self._episode(view, episodes, engine, event, position, sample) for position, sample in missing),
            return_exceptions=True,
        )
        failed = [e for e in done if isinstance(e, Exception)]
        if failed:
            raise failed[0] if len(failed) == 1 else ExceptionGroup(f"{len(failed)} episodes failed", failed)

    async def _episode(
        self, view: View, episodes: Episodes, engine: Engine, cause: Recorded, position: int, sample: int
    ) -> None:
        request = cause.data
        assert isinstance(request, EpisodesRequested)
        evaluation = view.state.evaluations[request.evaluation]
        if evaluation.completed is not None or (position, sample) in evaluation.logged:
            return  # another worker recorded it since, while an adapter was loaded here
        name = subjects.trajectory_id(request.evaluation, position, sample)
        harness = view.state.harnesses[request.harness]
        public = view.world.public
        adapter = served_name(view.run, request.adapter) if request.adapter else None
        example = public.split(request.split)[position]
        spec = EpisodeSpec(
            trajectory=name,
            harness=harness,
            example=example.input,
            sampling=request.sampling,
            seed=seed_of(request.seed, position, sample),
            adapter=adapter,
            forced_temperature=request.split == "train",
        )
        view.logger.info("episode.started", trajectory=name)
        started = view.clock()
        trajectory = view.redaction.value(await episodes(spec, engine, view.world.task.tools(example)))
        if trajectory.error is not None and trajectory.error.kind == "engine":
            # Not the policy's failure, so no trajectory: the service stops, and the episode runs after a resume.
            raise EngineError(f"The engine could not answer {name}: {trajectory.error.message}")
        body = msgspec.json.encode(trajectory)
        inline = len(body) <= INLINE_BYTES
        blob = None if inline else await view.blobs.put(body, "application/json")
        prompt, output = tokens_of(trajectory)
        data = TrajectoryLogged(
            trajectory=name,
            evaluation=request.evaluation,
            example=request.examples[request.positions.index(position)],
            position=position,
            sample=sample,
            answer=trajectory.answer,
            error=trajectory.error,
            prompt_tokens=prompt,
            output_tokens=output,
            measured=Measured(seconds=view.clock() - started),
            body=trajectory if inline else None,
            blob=blob,
        )
        subject = subjects.trajectory_logged(view.run, name)
        await view.append(NAME, [Draft(subject=subject, step=request.generation, data=data, cause=cause.envelope.id)])


def engine_params(config: RunConfig, choice: PluginChoice) -> dict[str, Any]:
    """An engine's parameters; the embedded one computes on the run's thread count."""
    if choice.name == "transformers" and config.threads:
        return {"threads": config.threads, **choice.params}
    return choice.params


def served_name(run: str, adapter: str) -> str:
    """The name that an engine knows an adapter by; never used twice."""
    return f"{run}.{adapter}"


def tokens_of(trajectory: Trajectory) -> tuple[int, int]:
    """Prompt and output tokens of an episode; 4 bytes each."""
    calls = [s for s in trajectory.steps if isinstance(s, ModelCall)]
    return (
        sum(len(c.prompt_ids) for c in calls) // 4,
        sum(len(o.token_ids) for c in calls for o in c.outputs) // 4,
    )
