"""What if? A run made again from one of its steps under another configuration, up to the first unknown effect.

The fork is a run of its own: it repeats the events of the other one up to the outcome that the step was decided on,
notes in ``RunForked`` what is in force from there, and decides anew. Outcomes of effects are taken from the other run
where the fork asks for the very same thing; nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from bascule.plugins.loader import Plugins
from bascule.plugins.policy import READ, TRIAL
from bascule.runtime.blob_care import refs_of
from bascule.runtime.log.chain import Chain
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.redaction import Redaction
from bascule.runtime.services.calls import pending
from bascule.runtime.services.decisions import DECIDE
from bascule.runtime.services.recording import asks_the_same
from bascule.runtime.services.trainer import next_evaluation, open_training
from bascule.runtime.state import RunState
from bascule.runtime.world import World, world_of
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import canonical, decode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.errors import ConfigError, NotFound
from bascule.schemas.run import RunConfig

#: What a fork does not repeat: it is about the other run's own course, not about what was decided and done.
_OWN = (ev.RunPaused, ev.RunResumed, ev.RunCancelled, ev.RunFailed, ev.LogCheckpointed, ev.AblationRequested)


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A what-if.

    Attributes:
        events: the fork's log, ready to be appended in order.
        copied: how many of them repeat the other run's; ``blobs`` are those that they name.
        recorded, decided: the other run's choice at the step, and the fork's.
        stopped_at: the first effect that the other run's log does not hold; None if the fork came to its end.
    """

    run: str
    events: tuple[NewEvent, ...]
    copied: int
    blobs: tuple[ev.BlobRef, ...]
    recorded: ev.LeverChosen
    decided: ev.LeverChosen | None
    stopped_at: str | None


def whatif(
    events: Sequence[Recorded],
    name: str,
    *,
    step: int,
    config: RunConfig,
    changes: dict[str, Any],
    plugins: Plugins,
    producers: dict[str, Producer],
) -> Fork:
    """Fork a run at the choice of generation ``step``.

    Args:
        events: the whole run; name: of the fork.
        config: in force from there on; ``changes`` says what is new in it.
        producers: who decides now, by service.

    Raises:
        NotFound: the run made no choice at that step.
        ConfigError: the new configuration changes what the recorded episodes depend on.
    """
    recorded, trigger = _choice(events, step)
    forker = _Forker(events, name, plugins, producers)
    _check(forker.parent_config, config)
    forker.copy(events[0])
    forker.command(ev.RunPaused(reason=f"what if, from step {step} of {forker.parent}"), subjects.run_paused(name, 1))
    chain = Chain()
    for event in events:
        if event.seq >= trigger.seq:
            break
        chain.add(event)
        if event is not events[0] and not isinstance(event.data, _OWN):
            forker.copy(event)
    forked = ev.RunForked(
        run=forker.parent,
        count=chain.count,
        head=chain.head.hex(),
        step=step,
        config=config,
        plugins=World(plugins, config).pins(),
        changes=changes,
    )
    forker.command(forked, subjects.run_forked(name, forker.state.forks + 1))
    forker.copy(trigger)
    forker.go_on([e for e in events if e.seq > trigger.seq])
    forker.erase([e for e in events if e.seq > trigger.seq])
    state = forker.state
    decided = state.steps[step].lever if step in state.steps else None
    return Fork(
        run=name,
        events=tuple(forker.written),
        copied=forker.copied,
        blobs=tuple(forker.blobs.values()),
        recorded=recorded,
        decided=decided,
        stopped_at=None if state.end is not None else first_effect(state, forker.world),
    )


def _choice(events: Sequence[Recorded], step: int) -> tuple[ev.LeverChosen, Recorded]:
    """The recorded choice of a step, and the outcome of the generation before that it followed."""
    chosen = {e.data.generation: e.data for e in events if isinstance(e.data, ev.LeverChosen)}
    if step not in chosen:
        raise NotFound(
            f"The run made no choice at step {step}.",
            next_step=f"Steps with a choice: {', '.join(map(str, sorted(chosen))) or 'none yet'}.",
        )
    outcomes = (ev.CandidatePromoted, ev.CandidateRejected, ev.TrainFailed, ev.AuthorFailed)
    trigger = next(e for e in events if isinstance(e.data, outcomes) and e.data.generation == step - 1)
    return chosen[step], trigger


def _check(old: RunConfig, new: RunConfig) -> None:
    """Everything recorded before the fork was drawn, asked and answered under these."""
    for field in ("task", "model", "engine", "seed", "evaluation", "shard_size", "harness", "second"):
        if getattr(old, field) != getattr(new, field):
            raise ConfigError(
                f"A what-if keeps the run's {field}: the log's episodes were made under it.",
                next_step="Start a new run with `bascule run` for that.",
            )


class _Forker:
    """Builds the fork's log event by event, folding and deciding as it goes."""

    def __init__(self, events: Sequence[Recorded], name: str, plugins: Plugins, producers: dict[str, Producer]) -> None:
        first = events[0]
        if not isinstance(first.data, ev.RunStarted):
            raise NotFound("The log does not begin with a run's start.", next_step="Run `bascule verify`.")
        self.parent = first.envelope.run
        self.parent_config = first.data.config
        self.state = RunState(run=name)
        self.written: list[NewEvent] = []
        self.copied = 0
        self.blobs: dict[str, ev.BlobRef] = {}
        self._plugins = plugins
        self._redaction = Redaction.of(plugins.registry)
        self._producers = producers
        self._world: World | None = None
        self._parent_by_id = {e.envelope.id: e for e in events}
        self._parent_by_subject = {e.subject: e for e in events}
        self._by_subject: dict[str, Recorded] = {}
        self._decided: list[tuple[str, Draft]] = []

    @property
    def world(self) -> World:
        assert self._world is not None
        return self._world

    def copy(self, event: Recorded) -> None:
        """Repeat an event of the other run under this one's name."""
        old = event.envelope
        subject = self._moved(event.subject)
        cause = self._parent_by_id.get(old.causationid or "")
        envelope = msgspec.structs.replace(
            old,
            id=subjects.event_id(subject),
            subject=subject,
            run=self.state.run,
            causationid=subjects.event_id(self._moved(cause.subject)) if cause else None,
            correlationid=self.state.root,
            origin="whatif",
        )
        self.copied += 1
        self.blobs |= {ref.sha256: ref for ref in refs_of(event.data)}
        self._write(subject, msgspec.json.encode(envelope))

    def command(self, data: ev.Data, subject: str) -> None:
        """Note something about the fork itself."""
        self._append("cli", Draft(subject=subject, step=0, data=data))

    def go_on(self, rest: list[Recorded]) -> None:
        """Record what is decided, and take outcomes from ``rest``, until neither is left."""
        rest = [e for e in rest if isinstance(e.data, ev.Data) and e.data.KIND == "outcome"]
        moved = True
        while moved and self.state.end is None:
            moved = False
            while self._decided:
                service, draft = self._decided.pop(0)
                if draft.subject not in self._by_subject:
                    self._append(service, draft)
                    moved = True
            for event in rest:
                if not isinstance(event.data, _OWN) and self._same_effect(event):
                    self.copy(event)
                    moved = True
                    if self._decided:
                        break
            rest = [e for e in rest if self._moved(e.subject) not in self._by_subject]

    def erase(self, rest: list[Recorded]) -> None:
        """Repeat what became of the blobs that the fork names."""
        for event in rest:
            if isinstance(event.data, ev.BlobErased) and event.data.sha256 in self.blobs:
                self.copy(event)

    def _same_effect(self, event: Recorded) -> bool:
        """Whether the fork asks for just the effect that this outcome of the other run came from."""
        match event.data:
            case ev.AdapterServed(adapter=adapter, sha256=sha256):
                return adapter in self.state.adapters and self.state.adapters[adapter].sha256 == sha256
            case ev.ModelCalled() | ev.ToolCalled() as called:
                return self._same_call(called, event.envelope.step)
            case ev.TrainStarted(generation=generation) | ev.TrainFailed(generation=generation):
                if not self._equal(subjects.train_requested(self.parent, generation)):
                    return False
            case ev.AdapterCheckpointed(generation=generation):
                if not self._equal(subjects.train_requested(self.parent, generation)):
                    return False
            case _:
                pass
        cause = self._parent_by_id.get(event.envelope.causationid or "")
        return cause is not None and self._equal(cause.subject)

    def _same_parent(self, generation: int) -> bool:
        """Whether a generation starts from what it started from in the other run: a trial says only what is other."""
        theirs = self._parent_by_subject[subjects.lever_chosen(self.parent, generation)].data
        best = self.state.best
        if best is None or not isinstance(theirs, ev.LeverChosen) or theirs.parent != best:
            return False
        adapter = self.state.candidate(best).adapter
        made = [] if adapter is None else [subjects.train_outcome(self.parent, int(adapter[1:].partition("-")[0]))]
        return all(self._equal(subject) for subject in (subjects.candidate_proposed(self.parent, best), *made))

    def _same_call(self, called: ev.ModelCalled | ev.ToolCalled, generation: int) -> bool:
        """Whether the fork asks what this call asked, and what it is told of is the same."""
        wanted = pending(self.state, self.world)
        if wanted is None or wanted[:2] != (called.session, called.ordinal):
            return False
        if not asks_the_same(called, wanted[2], self._redaction, self.world.withholding):
            return False
        match called:
            case ev.ToolCalled(name=name) if name == TRIAL:
                return self._same_parent(generation)
            case ev.ToolCalled(name=name, arguments={"trajectory": str(read)}) if name == READ:
                # What was refused was no trajectory's name.
                return called.result is None or self._equal(subjects.trajectory_logged(self.parent, read))
            case _:
                return True

    def _equal(self, subject: str) -> bool:
        """Whether the fork holds, under its own name, what the other run holds under ``subject``."""
        theirs, ours = self._parent_by_subject.get(subject), self._by_subject.get(self._moved(subject))
        return theirs is not None and ours is not None and canonical(theirs.data) == canonical(ours.data)

    def _moved(self, subject: str) -> str:
        root, _, rest = subject.split(".", 2)
        return f"{root}.{self.state.run}.{rest}"

    def _append(self, service: str, draft: Draft) -> None:
        payload = self._redaction.encoded(draft, run=self.state.run, producer=self._producers[service], origin="whatif")
        self._write(draft.subject, payload)

    def _write(self, subject: str, payload: bytes) -> None:
        event = decode(len(self.written) + 1, subject, payload)
        self.written.append(NewEvent(subject=subject, payload=payload))
        self._by_subject[subject] = event
        self.state.apply(event)
        if isinstance(event.data, ev.RunStarted | ev.RunForked) and self.state.started is not None:
            self._world = world_of(self._plugins, self.state.started)
        self._decided = [(s, d) for s, d in self._decided if d.subject != subject]
        for service, decide in DECIDE.items():
            self._decided += [(service, d) for d in decide(self.state, event, self.world)]


def first_effect(state: RunState, world: World) -> str:
    """What the run waits for: the first effect that its log does not hold."""
    call = pending(state, world)
    if call is not None:
        return f"call {call[1]} of {call[0]}"
    training = open_training(state)
    if training is not None and next_evaluation(state, training) is not None:
        request = training.request
        return (
            f"the update {training.iterations + 1} of {request.iterations} of generation {request.generation} "
            f"with {request.algorithm} ({subjects.train_requested(state.run, request.generation)})"
        )
    for name, evaluation in state.evaluations.items():
        if evaluation.completed is not None:
            continue
        asked = [key for key in evaluation.trajectories() if key not in evaluation.logged]
        if asked:
            shard = next(i for i, s in sorted(evaluation.shards.items()) if evaluation.missing(s))
            first = subjects.episodes_requested(state.run, name, shard)
            return f"{len(asked)} of {evaluation.size} episodes of {name} ({first})"
        return f"the scores of {name} ({subjects.evaluation_completed(state.run, name)})"
    return "nothing that this version knows of"
