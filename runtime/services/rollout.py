"""rollout: runs episodes on an inference engine, many at once, and serves adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from bascule.plugins.engine import Engine
from bascule.plugins.perturb import perturbed
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.episodes.batch import Batch, batch_of
from bascule.runtime.episodes.broker import EpisodeSpec, MakeTools, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.runtime.metering import Meter
from bascule.runtime.services.inference import load_adapter, served_name
from bascule.runtime.services.probing import probed
from bascule.runtime.services.waiting import told_of_waiting
from bascule.runtime.state import RunState
from bascule.runtime.work import work_off
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.codec import INLINE_BYTES
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import EngineError
from bascule.schemas.events import RESTRICTED, AdapterProbe, AdapterServed, EpisodesRequested, TrajectoryLogged
from bascule.schemas.landscape import WorkMeasured
from bascule.schemas.run import PluginChoice
from bascule.schemas.sandbox import SandboxReport
from bascule.schemas.trajectory import EpisodeError, ModelCall, Trajectory
from bascule.verifiers.sandbox.probe import choose

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME = "rollout"
SHARDS_IN_FLIGHT = 12


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """The rollout service decides nothing."""
    del state, event, world
    return []


class Episodes(Protocol):
    """What runs episodes: harnesses that ask an engine."""

    async def __call__(self, spec: EpisodeSpec, engine: Engine, tools: MakeTools) -> Trajectory:
        """Run one episode."""
        ...

    async def over(self, key: str) -> None:
        """No more episodes of the batches of this key will come."""
        ...


class HarnessEpisodes:
    """Episodes with their harness in a process of its own; ``report`` says what confines it."""

    def __init__(self, world: World, pool: HarnessPool, report: SandboxReport) -> None:
        self.report = report
        self._world = world
        self._pool = pool

    async def __call__(self, spec: EpisodeSpec, engine: Engine, tools: MakeTools) -> Trajectory:
        refused = refusal(spec.harness.manifest, self._world.public)
        if refused is not None:
            return Trajectory(error=EpisodeError(kind="crash", message=refused))
        return await run_episode(spec, engine, self._pool, tools, self._world.redaction)

    async def over(self, key: str) -> None:
        await self._pool.retire(key)


@contextlib.asynccontextmanager
async def harness_processes(world: World) -> AsyncIterator[Episodes]:
    """Episodes with their harness in a process of its own, confined unless the run says otherwise.

    Raises:
        EpisodeProcessError: none can be started, or none that is confined.
        ConfigError: this machine's sandbox does not hold what the run requires.
    """
    _, report = await asyncio.to_thread(choose, world.config.sandbox)
    pool = HarnessPool(children=world.config.concurrency, unsafe=world.config.sandbox.unsafe)
    await pool.start()
    try:
        yield HarnessEpisodes(world, pool, report)
    finally:
        await pool.close()


class Rollout:
    """The rollout service's effects: every trajectory of a requested shard, once.

    Args:
        episodes: opens what runs episodes; processes unless a test says otherwise.
    """

    def __init__(self, episodes: Callable[[World], AbstractAsyncContextManager[Episodes]] = harness_processes) -> None:
        self._episodes = episodes
        self._devices: dict[int, str] = {}
        self._meter: Meter | None = None
        self._loaded: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._batches: dict[str, Batch] = {}
        self._probes: dict[str, AdapterProbe] = {}  # of superseded adapters too, which the run forgets

    async def run(self, view: View) -> None:
        await view.ready()
        self._meter = Meter(view.clock)
        async with contextlib.AsyncExitStack() as stack:
            episodes = await stack.enter_async_context(self._episodes(view.world))
            stack.push_async_callback(self._close, view)
            stack.enter_context(told_of_waiting(view.logger))
            if isinstance(episodes, HarnessEpisodes):
                await probed(view, NAME, episodes.report)
            await self._engine(view, None)
            shard = partial(self._shard, view, episodes)
            await work_off(view, NAME, f"bascule.{view.run}.episodes.*.requested", shard, slots=SHARDS_IN_FLIGHT)

    async def _close(self, view: View) -> None:
        for loading in self._loaded.values():
            loading.cancel()
        await asyncio.gather(*self._loaded.values(), return_exceptions=True)
        await view.engines.leave(self)

    async def _engine(self, view: View, choice: PluginChoice | None) -> Engine:
        engine, info = await view.engines.take(view, choice or view.world.config.engine, self)
        self._devices[id(engine)] = info.versions.get("device", "")
        return engine

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
        probe = await load_adapter(view, engine, adapter, self._probes)
        if found.probe is not None:
            self._probes[adapter] = found.probe
        await self._unload_superseded(view, engine, adapter)
        if adapter not in view.state.served:
            name = view.world.config.engine.name
            served = AdapterServed(adapter=adapter, sha256=found.sha256, engine=name, probe=probe)
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
        batch = await self._batch(view, request)
        # What one of them runs into is no reason to lose the others.
        done = await asyncio.gather(
            *(self._episode(view, episodes, engine, event, batch, position, sample) for position, sample in missing),
            return_exceptions=True,
        )
        failed = [e for e in done if isinstance(e, Exception)]
        if failed:
            raise failed[0] if len(failed) == 1 else ExceptionGroup(f"{len(failed)} episodes failed", failed)
        if batch is not None:
            await self._leave(view, episodes, request)

    async def _batch(self, view: View, request: EpisodesRequested) -> Batch | None:
        """What the episodes of an evaluation share; all its shards are known before the first of them is prepared."""
        harness = view.state.harnesses[request.harness]
        if harness.manifest.isolation != "batch":
            return None
        name = request.evaluation

        def known(state: RunState) -> bool:
            evaluation = state.evaluations[name]
            return evaluation.completed is not None or len(evaluation.shards) == request.shards

        await view.until(known)
        if name not in self._batches:
            asked = view.state.evaluations[name].examples
            batch = batch_of(harness, view.world.public, request.split, asked, key=name, seed=request.seed)
            assert batch is not None
            self._batches[name] = batch
        return self._batches[name]

    async def _leave(self, view: View, episodes: Episodes, request: EpisodesRequested) -> None:
        """After a shard: the batch has no more to do once every episode of its evaluation is logged."""
        name = request.evaluation
        await view.until(lambda s: not s.evaluations[name].missing(request))
        evaluation = view.state.evaluations[name]
        if evaluation.completed is None and any(evaluation.missing(shard) for shard in evaluation.shards.values()):
            return
        self._batches.pop(name, None)
        await episodes.over(name)

    async def _episode(
        self,
        view: View,
        episodes: Episodes,
        engine: Engine,
        cause: Recorded,
        batch: Batch | None,
        position: int,
        sample: int,
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
        if request.perturbed is True:
            # By the run's seed, so that every candidate is asked in the same words.
            example = perturbed(view.world.task, example, seed_of(view.world.config.seed, "perturbed", example.id))
        spec = EpisodeSpec(
            trajectory=name,
            harness=harness,
            example=example.input,
            sampling=request.sampling,
            seed=seed_of(request.seed, position, sample),
            adapter=adapter,
            forced_temperature=request.split == "train",
            batch=batch,
        )
        view.logger.info("episode.started", trajectory=name)
        started = view.clock()
        assert self._meter is not None
        with self._meter.share() as share:
            found = await episodes(spec, engine, partial(view.world.task.tools, example))
        trajectory = view.redaction.value(found)
        if trajectory.error is not None and trajectory.error.kind == "engine":
            # Not the policy's failure, so no trajectory: the service stops, and the episode runs after a resume.
            raise EngineError(f"The engine could not answer {name}: {trajectory.error.message}")
        body = msgspec.json.encode(trajectory)
        inline = len(body) <= INLINE_BYTES and not public.restricted
        media = "application/json" + (RESTRICTED if public.restricted else "")
        blob = None if inline else await view.blobs.put(body, media)
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
            measured=WorkMeasured(
                seconds=view.clock() - started, share=share.seconds, device=self._devices.get(id(engine), "")
            ),
            body=trajectory if inline else None,
            blob=blob,
        )
        subject = subjects.trajectory_logged(view.run, name)
        await view.append(NAME, [Draft(subject=subject, step=request.generation, data=data, cause=cause.envelope.id)])


def tokens_of(trajectory: Trajectory) -> tuple[int, int]:
    """Prompt and output tokens of an episode: those whose ids are there, 4 bytes each, and those only counted."""
    calls = [s for s in trajectory.steps if isinstance(s, ModelCall)]
    counted = [c.usage for c in calls if c.usage is not None]
    return (
        sum(len(c.prompt_ids) for c in calls) // 4 + sum(prompt for prompt, _ in counted),
        sum(len(o.token_ids) for c in calls for o in c.outputs) // 4 + sum(output for _, output in counted),
    )
