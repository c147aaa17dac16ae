"""What policies and authors see: folded from the log or pinned by the run, aggregates of dev, nothing sealed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bascule.plugins.policy import NO_EDIT, AuthorInput, Generation, PolicyInput, TrainEvidence, TrainOutcome
from bascule.runtime.services import budgets
from bascule.runtime.state import RunState, Step
from bascule.runtime.world import World, seed_of
from bascule.schemas import subjects
from bascule.schemas.run import RunConfig
from bascule.schemas.trajectory import Scored
from bascule.verifiers.gate import reported_score, withheld, without_second


def policy_input(state: RunState, world: World, generation: int) -> PolicyInput:
    """What the policy sees; everything in it is folded from the log or pinned by the run."""
    best = state.best
    assert best is not None
    harness = state.harnesses[state.candidate(best).harness]
    spent = budgets.spent_levers(state)
    return PolicyInput(
        generation=generation,
        max_generations=world.config.max_generations,
        levers=tuple(lever for lever in world.config.levers if lever not in spent),
        history=shown(state.history(), world.config),
        best=best,
        algorithms=world.algorithms,
        edits_left=world.author.edits_left(harness, tried(state, best)),
        outcomes=_outcomes(state, f"g{best:02d}-train"),
        budget_left=budgets.left(state),
        ordinal=world.ordinal,
    )


def shown(history: Sequence[Generation], config: RunConfig) -> tuple[Generation, ...]:
    """The finished generations as levers may see them: of dev what the guard reports, of a second verifier nothing.

    What was rejected shows how it did on dev only by being rejected, and what kind of thing spoke against it; a lever
    that was told more could adapt to dev, which is asked again in each generation. What was promoted shows dev where
    the guard reports the score that was measured. Where nothing is guarded, or each generation's dev is fresh, all of
    dev is shown.
    """
    open_ = config.gate.version == 1 or config.gate.guard == "none" or bool(config.evaluation.fresh_dev)
    return tuple(_shown(g, open_) for g in history)


def _shown(generation: Generation, open_: bool) -> Generation:
    gate, promoted = generation.gate, generation.outcome == "promoted"
    if gate is None:
        return generation
    if open_ or (promoted and reported_score(gate) == gate.score):
        return msgspec.structs.replace(generation, gate=without_second(gate))
    return msgspec.structs.replace(generation, gate=withheld(gate, promoted=promoted), dev=None, dev_event=None)


def _outcomes(state: RunState, evaluation: str) -> tuple[TrainOutcome, ...]:
    """What came of each episode of an evaluation."""
    found = state.evaluations[evaluation]
    outcomes = []
    for key in found.trajectories():
        verdict = found.verdicts[key]
        outcomes.append(
            TrainOutcome(
                trajectory=subjects.trajectory_id(evaluation, *key),
                error=found.logged[key].error,
                reward=verdict.reward if isinstance(verdict, Scored) else None,
            )
        )
    return tuple(outcomes)


def author_input(state: RunState, world: World, generation: int) -> AuthorInput:
    """What the author sees: train items in full, aggregates of dev, never a dev or sealed item."""
    best = state.best
    assert best is not None
    candidate = state.candidate(best)
    public = world.public
    evaluation = state.evaluations[f"g{best:02d}-train"]
    evidence = []
    for key in evaluation.trajectories():
        example = public.train[key[0]]
        logged, verdict = evaluation.logged[key], evaluation.verdicts[key]
        evidence.append(
            TrainEvidence(
                example=example,
                truth=public.answers[example.id],
                answer=logged.answer,
                error=logged.error,
                reward=verdict.reward if isinstance(verdict, Scored) else None,
                trajectory=subjects.trajectory_id(f"g{best:02d}-train", *key),
            )
        )
    return AuthorInput(
        generation=generation,
        seed=seed_of(world.config.seed, "author", generation),
        description=public.description,
        max_answer_tokens=public.max_answer_tokens,
        harness=state.harnesses[candidate.harness],
        history=shown(state.history(), world.config),
        best=best,
        tried=tried(state, best),
        train=public.train,
        answers=public.answers,
        evidence=tuple(evidence),
        allows=public.allows,
        restricted=public.restricted,
    )


def tried(state: RunState, parent: int) -> tuple[str, ...]:
    """What was tried on the parent's harness, as ``AuthorInput.tried`` has it."""
    digest = state.candidate(parent).harness
    found = (_attempt(state, step, digest) for _, step in sorted(state.steps.items()))
    return tuple(edit for edit in found if edit is not None)


def _attempt(state: RunState, step: Step, digest: str) -> str | None:
    """The edit of the harness ``digest`` that a generation tried; None if there is none."""
    if step.harness is not None:
        return step.harness.edit if step.harness.parent == digest else None
    if step.author_failed is None or step.lever is None:
        return None
    return NO_EDIT if state.candidate(step.lever.parent).harness == digest else None
