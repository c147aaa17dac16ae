"""What policies and authors see: folded from the log or pinned by the run, aggregates of dev, nothing sealed."""

from __future__ import annotations

from bascule.plugins.policy import NO_EDIT, AuthorInput, PolicyInput, TrainEvidence
from bascule.runtime.state import RunState, Step
from bascule.runtime.world import World, seed_of
from bascule.schemas.events import CandidatePromoted
from bascule.schemas.trajectory import Scored


def policy_input(state: RunState, world: World, generation: int) -> PolicyInput:
    """What the policy sees; everything in it is folded from the log or pinned by the run."""
    best = state.best
    assert best is not None
    harness = state.harnesses[state.candidate(best).harness]
    return PolicyInput(
        generation=generation,
        max_generations=world.config.max_generations,
        levers=world.config.levers,
        history=state.history(),
        best=best,
        algorithms=world.algorithms,
        edits_left=world.author.edits_left(harness, tried(state, best)),
    )


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
            )
        )
    return AuthorInput(
        generation=generation,
        seed=seed_of(world.config.seed, "author", generation),
        description=public.description,
        max_answer_tokens=public.max_answer_tokens,
        harness=state.harnesses[candidate.harness],
        history=state.history(),
        tried=tried(state, best),
        train=public.train,
        answers=public.answers,
        evidence=tuple(evidence),
        allows=public.allows,
        restricted=public.restricted,
    )


def tried(state: RunState, parent: int) -> tuple[str, ...]:
    """What was tried on the parent's harness and did not replace it, as ``AuthorInput.tried`` has it."""
    digest = state.candidate(parent).harness
    found = (_attempt(state, step, digest) for _, step in sorted(state.steps.items()))
    return tuple(edit for edit in found if edit is not None)


def _attempt(state: RunState, step: Step, digest: str) -> str | None:
    """The edit of the harness ``digest`` that a generation tried in vain; None if there is none."""
    if step.harness is not None:
        lost = step.harness.parent == digest and not isinstance(step.gate, CandidatePromoted)
        return step.harness.edit if lost else None
    if step.author_failed is None or step.lever is None:
        return None
    return NO_EDIT if state.candidate(step.lever.parent).harness == digest else None
