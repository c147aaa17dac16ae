"""Pure consequences that several services share: proposing a candidate, and asking for its episodes."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from bascule.runtime.state import RunState
from bascule.runtime.world import World, seed_of, seeded
from bascule.schemas import subjects
from bascule.schemas.decision import Lever
from bascule.schemas.envelope import Draft
from bascule.schemas.events import CandidateProposed, EpisodesRequested, Purpose, Split
from bascule.schemas.run import PluginChoice
from bascule.schemas.trajectory import Sampling


def episodes(
    state: RunState,
    world: World,
    *,
    evaluation: str,
    purpose: Purpose,
    generation: int,
    split: Split,
    positions: Sequence[int],
    samples: int,
    temperature: float,
    harness: str,
    adapter: str | None,
    cause: str,
    engine: PluginChoice | None = None,
    perturbed: bool = False,
) -> list[Draft]:
    """Fan an evaluation out into shards."""
    size = world.config.shard_size
    examples = world.public.split(split)
    shards = [positions[i : i + size] for i in range(0, len(positions), size)]
    return [
        Draft(
            subject=subjects.episodes_requested(state.run, evaluation, i),
            step=generation,
            cause=cause,
            data=EpisodesRequested(
                evaluation=evaluation,
                purpose=purpose,
                generation=generation,
                split=split,
                shard=i,
                shards=len(shards),
                positions=tuple(shard),
                examples=tuple(examples[p].id for p in shard),
                samples=samples,
                sampling=Sampling(temperature=temperature, max_tokens=world.public.max_answer_tokens),
                seed=seed_of(world.config.seed, evaluation),
                harness=harness,
                adapter=adapter,
                engine=engine,
                perturbed=perturbed or UNSET,
            ),
        )
        for i, shard in enumerate(shards)
    ]


def candidate(
    state: RunState,
    world: World,
    *,
    generation: int,
    harness: str,
    adapter: str | None,
    parent: int | None,
    lever: Lever | None,
    algorithm: str | None,
    cause: str,
) -> list[Draft]:
    """Propose a candidate and ask for what the gate and the next decision need: dev, and a landscape over train."""
    name = f"g{generation:02d}"
    e = world.config.evaluation
    train = list(world.positions("train"))
    # The same train examples for every candidate, so that landscapes can be compared.
    sample = sorted(seeded(world.config.seed, "landscape").sample(train, min(e.train_groups, len(train))))
    data = CandidateProposed(
        generation=generation, harness=harness, adapter=adapter, parent=parent, lever=lever, algorithm=algorithm
    )
    dev = dev_positions(world, generation)
    remeasured = []
    if parent is not None and e.fresh_dev:
        # On examples that are new to both.
        remeasured = evaluated(
            state,
            world,
            state.candidate(parent),
            evaluation=f"{name}-parent",
            generation=generation,
            positions=dev,
            cause=cause,
        )
    return [
        Draft(subject=subjects.candidate_proposed(state.run, generation), step=generation, cause=cause, data=data),
        *evaluated(state, world, data, evaluation=f"{name}-dev", generation=generation, positions=dev, cause=cause),
        *remeasured,
        *episodes(
            state,
            world,
            evaluation=f"{name}-train",
            purpose="landscape",
            generation=generation,
            split="train",
            positions=sample,
            samples=e.train_samples,
            temperature=e.train_temperature,
            harness=harness,
            adapter=adapter,
            cause=cause,
        ),
    ]


def dev_positions(world: World, generation: int) -> range:
    """The examples of dev for a generation's gate: all, or fresh ones."""
    fresh = world.config.evaluation.fresh_dev
    whole = world.positions("dev")
    return whole[generation * fresh : (generation + 1) * fresh] if fresh else whole


def evaluated(
    state: RunState,
    world: World,
    of: CandidateProposed,
    *,
    evaluation: str,
    generation: int,
    positions: Sequence[int],
    cause: str,
    purpose: Purpose = "gate",
    split: Split = "dev",
    perturbed: bool = False,
) -> list[Draft]:
    """Ask for one greedy episode of a candidate on each of the examples.

    Args:
        generation: for which this is measured, which need not be the candidate's own.
    """
    return episodes(
        state,
        world,
        evaluation=evaluation,
        purpose=purpose,
        generation=generation,
        split=split,
        positions=positions,
        samples=1,
        temperature=0.0,
        harness=of.harness,
        adapter=of.adapter,
        cause=cause,
        perturbed=perturbed,
    )


def sealed(state: RunState, world: World, generation: int, cause: str) -> list[Draft]:
    """Ask for the one look at the sealed split that a candidate gets after the stop."""
    return evaluated(
        state,
        world,
        state.candidate(generation),
        evaluation=f"g{generation:02d}-sealed",
        generation=generation,
        positions=world.positions("sealed"),
        cause=cause,
        purpose="report",
        split="sealed",
    )
