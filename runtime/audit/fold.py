"""The state of a run after some of its events, and what that hashes to."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import msgspec
from msgspec.structs import replace

from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.errors import NotFound


class Folded(msgspec.Struct, frozen=True, kw_only=True):
    """A run's state after its first ``count`` of ``events`` events.

    Attributes:
        subject, time: of the last event that was folded.
        best: the promoted generation; open: by evaluation that is not complete, its verdicts
            and the trajectories asked for.
        hash: blake2b-128 of the state's digest. It holds no place in a store: an imported run has the same.
        state: the digest itself, as JSON.
    """

    run: str
    count: int
    events: int
    subject: str
    time: str
    status: str
    generations: tuple[FoldedStep, ...]
    best: int | None
    open: dict[str, tuple[int, int]]
    adapters: tuple[str, ...]
    hash: str
    state: msgspec.Raw


class FoldedStep(msgspec.Struct, frozen=True, kw_only=True):
    """One generation: its lever, its candidate and what became of it, as far as the fold went."""

    generation: int
    lever: str | None
    algorithm: str | None
    harness: str | None
    adapter: str | None
    outcome: str


async def fold(run: str, events: AsyncIterator[Recorded], *, at: int | None = None, step: int | None = None) -> Folded:
    """Fold a run's events: the first ``at``, or those up to the lever choice of generation ``step``, or all.

    All events are read, so that the source of them has checked itself to its end.

    Raises:
        NotFound: the run has fewer events, or no such choice; names what there is.
    """
    state, last, total, done, steps = RunState(run=run), None, 0, False, list[int]()
    async for event in events:
        total += 1
        if isinstance(event.data, ev.LeverChosen):
            steps.append(event.data.generation)
        if done:
            continue
        last = event
        state.apply(replace(event, seq=total))
        done = total == at or (isinstance(event.data, ev.LeverChosen) and event.data.generation == step)
    if last is None or (not done and at is not None):
        raise NotFound(f"The run {run} has {total} events, not {at}.", next_step=f"Give a count from 1 to {total}.")
    if not done and step is not None:
        raise NotFound(
            f"No lever was chosen at step {step} of {run}.",
            next_step=f"Steps with a choice: {', '.join(map(str, steps)) or 'none yet'}.",
        )
    digest = state.digest()
    return Folded(
        run=run,
        count=state.events,
        events=total,
        subject=last.subject,
        time=last.envelope.time,
        status=state.status,
        generations=tuple(_step(state, number) for number in sorted(state.steps)),
        best=state.best,
        open={name: (len(e.verdicts), e.size) for name, e in sorted(state.evaluations.items()) if e.completed is None},
        adapters=tuple(sorted(state.adapters)),
        hash=hashlib.blake2b(digest, digest_size=16).hexdigest(),
        state=msgspec.Raw(digest),
    )


def _step(state: RunState, number: int) -> FoldedStep:
    step = state.steps[number]
    lever, candidate, training = step.lever, step.candidate, step.training
    if step.gate is not None:
        outcome = step.gate.TYPE.rpartition(".")[2]
    elif step.author_failed is not None or (training is not None and training.failed is not None):
        outcome = "failed"
    else:
        outcome = "stop" if lever is not None and lever.lever == "stop" else "open"
    return FoldedStep(
        generation=number,
        lever=lever.lever if lever else None,
        algorithm=lever.algorithm if lever else None,
        harness=candidate.harness if candidate else None,
        adapter=candidate.adapter if candidate else None,
        outcome=outcome,
    )
