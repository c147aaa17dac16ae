"""The state of a run: a fold of its events. One struct per aggregate, one ``apply``.

The fold reads no clock and calls nothing. An event that changes nothing is ignored, so duplicates are harmless, and so
is one that belongs to nothing. What is left to do is computed from the state, never remembered elsewhere. What no
decision can need any more is forgotten: the state is bounded by the generations and the episodes under way, not by
the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from bascule.plugins.policy import TRIAL, CallResult, Generation
from bascule.runtime.spending import (
    FEEDBACK,
    ROLLOUT,
    TRAINER,
    VERIFIER,
    Spending,
    Spent,
    add_call,
    add_episode,
    add_score,
    add_update,
    gpus_of,
)
from bascule.schemas import events as ev
from bascule.schemas.codec import canonical
from bascule.schemas.envelope import Recorded
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.landscape import Measured
from bascule.schemas.run import RunConfig
from bascule.schemas.trajectory import Scored, Verdict


class Logged(msgspec.Struct, frozen=True):
    """What the fold keeps of a trajectory; tokens stay in the log."""

    answer: str | None
    error: str | None
    prompt_tokens: int
    output_tokens: int
    seconds: float


Key = tuple[int, int]


class Evaluation(msgspec.Struct, kw_only=True):
    """All shards of one evaluation, what was logged and what was scored, by (position, sample).

    Once nothing can need them, the shards, trajectories and verdicts of a completed evaluation are forgotten.
    """

    request: ev.EpisodesRequested
    shards: dict[int, ev.EpisodesRequested] = {}
    logged: dict[Key, Logged] = {}
    verdicts: dict[Key, Verdict] = {}
    second: dict[Key, Verdict] = {}
    completed: ev.EvaluationCompleted | None = None
    completed_id: str = ""

    def trajectories(self) -> Iterator[Key]:
        """Every trajectory that was asked for, in order."""
        for shard in sorted(self.shards):
            request = self.shards[shard]
            for position in request.positions:
                for sample in range(request.samples):
                    yield position, sample

    @property
    def examples(self) -> dict[int, str]:
        """Example id by position."""
        return {p: e for s in self.shards.values() for p, e in zip(s.positions, s.examples, strict=True)}

    @property
    def size(self) -> int:
        return sum(len(s.positions) * s.samples for s in self.shards.values())

    def forget(self) -> None:
        """Keep the request and the landscape only."""
        self.shards, self.logged, self.verdicts, self.second = {}, {}, {}, {}

    def missing(self, shard: ev.EpisodesRequested) -> list[Key]:
        """What of a shard is not logged yet."""
        if self.completed is not None:
            return []
        keys = ((p, n) for p in shard.positions for n in range(shard.samples))
        return [key for key in keys if key not in self.logged]

    @property
    def finished(self) -> bool:
        """Whether every trajectory has a verdict."""
        return len(self.shards) == self.request.shards and len(self.verdicts) == self.size

    def rewards(self, *, second: bool = False) -> dict[int, list[float | None]]:
        """Rewards by position in sample order, or the second verifier's; None is unscored."""
        out: dict[int, list[float | None]] = {}
        found = self.second if second else self.verdicts
        for key in sorted(self.trajectories()):
            verdict = found.get(key)
            out.setdefault(key[0], []).append(verdict.reward if isinstance(verdict, Scored) else None)
        return out


class Training(msgspec.Struct, kw_only=True):
    """A training job.

    Attributes:
        head: sequence of the job's newest event, which fences its appends.
        iterations: updates done; ``last`` is the newest checkpoint.
        gpus: that its newest attempt computes on; None if that is not recorded.
    """

    request: ev.TrainRequested
    request_id: str
    gpus: int | None = None
    attempts: int = 0
    head: int = 0
    iterations: int = 0
    last: ev.AdapterCheckpointed | None = None
    published: ev.AdapterPublished | None = None
    failed: ev.TrainFailed | None = None

    @property
    def open(self) -> bool:
        return self.published is None and self.failed is None


class Adapter(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter's files, the hash over them, and what the trainer says of a text under it, if that was recorded."""

    files: dict[str, ev.BlobRef]
    sha256: str
    probe: ev.AdapterProbe | None = None


class Step(msgspec.Struct, kw_only=True):
    """Everything of one generation."""

    number: int
    lever: ev.LeverChosen | None = None
    harness: ev.HarnessProposed | None = None
    author_failed: ev.AuthorFailed | None = None
    training: Training | None = None
    candidate: ev.CandidateProposed | None = None
    gate: ev.CandidatePromoted | ev.CandidateRejected | None = None


class RunState(msgspec.Struct, kw_only=True):
    """One run, folded up to and including sequence ``seq``.

    Attributes:
        started: the run's start with the configuration and the pins that are in force.
        calls: results of the calls of policies and authors whose decision is still open, by session.
        forks: how often the run, or what it repeats, was forked.
        runtimes: how often other code was accepted.
        spending: what was spent, by generation, by what it was for, and by service.
        best: generation of the promoted candidate that is the parent of what comes next.
        rollbacks: how often promotions were taken back; ``rollback`` is where the next one that is due goes to.
    """

    run: str
    seq: int = 0
    started: ev.RunStarted | None = None
    root: str | None = None
    steps: dict[int, Step] = {}
    harnesses: dict[str, Harness] = {}
    evaluations: dict[str, Evaluation] = {}
    adapters: dict[str, Adapter] = {}
    served: set[str] = set()
    calls: dict[str, list[CallResult]] = {}
    ablations: dict[str, ev.AblationRequested] = {}
    spending: Spending = {}
    forks: int = 0
    runtimes: int = 0
    best: int | None = None
    rollbacks: int = 0
    rollback: int | None = None
    pauses: int = 0
    paused: str | None = None
    end: ev.RunCompleted | ev.RunFailed | ev.RunCancelled | None = None
    events: int = 0

    @classmethod
    def of(cls, run: str, events: Iterable[Recorded]) -> RunState:
        """Fold events from the start."""
        state = cls(run=run)
        for event in events:
            state.apply(event)
        return state

    # --- reading ---

    @property
    def config(self) -> RunConfig:
        assert self.started is not None
        return self.started.config

    @property
    def status(self) -> str:
        """``completed``, ``failed`` or ``cancelled`` after its end; before, ``paused`` or ``open``."""
        if self.end is not None:
            return self.end.TYPE.rpartition(".")[2]
        return "paused" if self.paused is not None else "open"

    def step(self, generation: int) -> Step:
        return self.steps.setdefault(generation, Step(number=generation))

    def training(self, generation: int) -> Training | None:
        """The training job of a generation, if it has one."""
        return self.steps[generation].training if generation in self.steps else None

    def candidate(self, generation: int) -> ev.CandidateProposed:
        candidate = self.steps[generation].candidate
        assert candidate is not None
        return candidate

    @property
    def open_choice(self) -> int | None:
        """The generation whose lever is to be chosen now, if any."""
        last = max(self.steps, default=None)
        if last is None or self.end is not None or self._generation(self.steps[last]) is None:
            return None
        return last + 1

    @property
    def open_edit(self) -> int | None:
        """The generation whose harness is to be written now, if any."""
        last = max(self.steps, default=None)
        step = self.steps[last] if last is not None else None
        if step is None or step.lever is None or step.lever.lever != "harness":
            return None
        return None if step.harness is not None or step.author_failed is not None else last

    @property
    def open_ablations(self) -> list[str]:
        return [n for n in self.ablations if not (e := self.evaluations.get(f"abl-{n}")) or e.completed is None]

    @property
    def active(self) -> bool:
        """Whether services have anything to do or to wait for."""
        if self.started is None or self.paused is not None:
            return False
        return self.end is None or (isinstance(self.end, ev.RunCompleted) and bool(self.open_ablations))

    def history(self) -> tuple[Generation, ...]:
        """The finished generations, as policies and authors may see them."""
        return tuple(g for n in sorted(self.steps) if (g := self._generation(self.steps[n])) is not None)

    def _generation(self, step: Step) -> Generation | None:
        failed = step.author_failed or (step.training.failed if step.training else None)
        if step.gate is None and failed is None:
            return None
        outcome: Literal["promoted", "rejected", "failed"] = "failed"
        if step.gate is not None:
            outcome = "promoted" if isinstance(step.gate, ev.CandidatePromoted) else "rejected"
        train = self.evaluations.get(f"g{step.number:02d}-train")
        dev = self.evaluations.get(f"g{step.number:02d}-dev")
        lever = step.lever.lever if step.lever else None
        return Generation(
            generation=step.number,
            parent=step.candidate.parent if step.candidate else None,
            lever=lever if lever != "stop" else None,
            algorithm=step.lever.algorithm if step.lever else None,
            edit=step.harness.edit if step.harness else None,
            outcome=outcome,
            reason=failed.reason if failed else "",
            gate=step.gate.figures if step.gate else None,
            gate_event=f"candidate.g{step.number:02d}.gate" if step.gate else None,
            train=train.completed.landscape if train and train.completed else None,
            train_event=f"eval.g{step.number:02d}-train.completed" if train and train.completed else None,
            dev=dev.completed.landscape if dev and dev.completed else None,
            dev_event=f"eval.g{step.number:02d}-dev.completed" if dev and dev.completed else None,
        )

    def digest(self) -> bytes:
        """Canonical bytes of the state; equal folds have equal bytes."""
        return canonical(
            {
                "run": self.run,
                "seq": self.seq,
                "started": self.started,
                "steps": {str(k): v for k, v in self.steps.items()},
                "harnesses": sorted(self.harnesses),
                "evaluations": {
                    name: {
                        "shards": {str(k): v for k, v in e.shards.items()},
                        "logged": [[*k, e.logged[k]] for k in sorted(e.logged)],
                        "verdicts": [[*k, e.verdicts[k]] for k in sorted(e.verdicts)],
                        "second": [[*k, e.second[k]] for k in sorted(e.second)],
                        "completed": e.completed,
                    }
                    for name, e in self.evaluations.items()
                },
                "adapters": self.adapters,
                "served": sorted(self.served),
                "calls": self.calls,
                "forks": self.forks,
                "runtimes": self.runtimes,
                "spending": [[*key, spent] for key, spent in self.spending.items()],
                **(
                    {"best": self.best, "rollbacks": self.rollbacks, "rollback": self.rollback}
                    if self.rollbacks
                    else {}
                ),
                "pauses": self.pauses,
                "ablations": self.ablations,
                "paused": self.paused,
                "end": self.end,
                "events": self.events,
            }
        )

    # --- folding ---

    def apply(self, event: Recorded) -> None:
        """Fold one event; events at or below ``seq`` are ignored."""
        if event.seq <= self.seq:
            return
        self.seq = event.seq
        self.events += 1
        data = event.data
        match data:
            # First, since almost all events are of these types.
            case ev.TrajectoryLogged() | ev.TrajectoryScored() | ev.EpisodesRequested() | ev.EvaluationCompleted():
                self._apply_evaluation(event, data)
            case ev.RunStarted():
                self.started, self.root = data, event.envelope.id
            case ev.HarnessProposed():
                self.harnesses[data.digest] = make_harness(data.files)
                self.step(data.generation).harness = data
            case ev.AuthorFailed():
                self.step(data.generation).author_failed = data
                self._roll_back()
            case ev.CandidateProposed():
                self.step(data.generation).candidate = data
            case ev.CandidatePromoted() | ev.CandidateRejected():
                self._apply_gate(data)
            case ev.LeverChosen():
                self.step(data.generation).lever = data
                own = f"g{data.generation:02d}-"
                self.calls = {session: calls for session, calls in self.calls.items() if session.startswith(own)}
                if data.lever == "stop":
                    self._roll_back()
            case ev.ModelCalled() | ev.ToolCalled():
                self.calls.setdefault(data.session, []).append(data)
                add_call(self._spent(event.envelope.step, FEEDBACK), data, TRIAL)
            case ev.TrainRequested():
                self.step(data.generation).training = Training(
                    request=data, request_id=event.envelope.id, head=event.seq
                )
            case ev.TrainStarted() | ev.AdapterCheckpointed() | ev.AdapterPublished() | ev.TrainFailed():
                self._apply_training(event, data)
            case ev.AdapterServed():
                self.served.add(data.adapter)
            case ev.AblationRequested():
                self.ablations[data.name] = data
            case ev.RunPaused():
                self.pauses, self.paused = self.pauses + 1, data.reason
            case ev.RunResumed():
                self.paused = None
            case ev.RunRolledBack():
                self.rollbacks, self.rollback = self.rollbacks + 1, data.generation
            case ev.RunForked() if self.started is not None:
                self.forks += 1
                self.started = msgspec.structs.replace(self.started, config=data.config, plugins=data.plugins)
            case ev.RuntimeChanged() if self.started is not None:
                self.runtimes += 1
                self.started = msgspec.structs.replace(self.started, plugins=data.plugins)
            case ev.RunCompleted() | ev.RunFailed() | ev.RunCancelled():
                self.end, self.paused = data, None
            case _:
                pass

    def _apply_evaluation(
        self,
        event: Recorded,
        data: ev.EpisodesRequested | ev.TrajectoryLogged | ev.TrajectoryScored | ev.EvaluationCompleted,
    ) -> None:
        if isinstance(data, ev.EpisodesRequested):
            asked = self.evaluations.setdefault(data.evaluation, Evaluation(request=data))
            if asked.completed is None:
                asked.shards[data.shard] = data
            return
        evaluation = self.evaluations.get(data.evaluation)
        if evaluation is None or evaluation.completed is not None:
            return
        if isinstance(data, ev.EvaluationCompleted):
            evaluation.completed, evaluation.completed_id = data, event.envelope.id
        elif isinstance(data, ev.TrajectoryScored):
            evaluation.verdicts[data.position, data.sample] = data.verdict
            if data.second is not None:
                evaluation.second[data.position, data.sample] = data.second
            add_score(self._spent_on(evaluation.request, VERIFIER), data)
        else:
            add_episode(self._spent_on(evaluation.request, ROLLOUT), data)
            evaluation.logged[data.position, data.sample] = Logged(
                data.answer,
                data.error.kind if data.error else None,
                data.prompt_tokens,
                data.output_tokens,
                data.measured.seconds,
            )

    def _spent_on(self, request: ev.EpisodesRequested, service: str) -> Spent:
        """The account of an evaluation."""
        match request.purpose:
            case "report":
                return self._spent(max(self.steps, default=0), service)
            case "ablation":
                return self.spending.setdefault((request.generation, "ablation", service), Spent())
            case _:
                return self._spent(request.generation, service)

    def _spent_on_update(self, training: Training, measured: Measured | None) -> None:
        account = self._spent(training.request.generation, TRAINER)
        add_update(account, measured, training.gpus)

    def _spent(self, generation: int, service: str) -> Spent:
        """The account of a generation's work for its lever, or for none while that is not chosen."""
        step = self.steps.get(generation)
        part = step.lever.lever if step is not None and step.lever is not None else None
        return self.spending.setdefault((generation, part, service), Spent())

    def _apply_gate(self, data: ev.CandidatePromoted | ev.CandidateRejected) -> None:
        self.step(data.generation).gate = data
        if isinstance(data, ev.CandidatePromoted):
            # What it replaces is kept: a rollback may make it the parent again.
            self.best = data.generation
            self._forget_all(f"g{data.generation:02d}-parent")
        else:
            self._forget_all(f"g{data.generation:02d}-")
        self._roll_back()

    def _roll_back(self) -> None:
        """At the end of a generation, or of the run, so that nothing under way loses its parent."""
        if self.rollback is not None:
            self.best, self.rollback = self.rollback, None

    def _forget_all(self, prefix: str) -> None:
        self._forget(*(name for name in self.evaluations if name.startswith(prefix)))

    def _forget(self, *evaluations: str) -> None:
        for name in evaluations:
            if name in self.evaluations:
                self.evaluations[name].forget()

    def _apply_training(
        self,
        event: Recorded,
        data: ev.TrainStarted | ev.AdapterCheckpointed | ev.AdapterPublished | ev.TrainFailed,
    ) -> None:
        training = self.training(data.generation)
        if training is None or not training.open:
            return
        training.head = event.seq
        if isinstance(data, ev.TrainStarted):
            training.attempts, training.gpus = data.attempt, gpus_of(data.versions)
        elif isinstance(data, ev.AdapterCheckpointed):
            self._spent_on_update(training, data.measured)
            # The next adapter exists because the episodes of the one before are done.
            if training.last is not None:
                del self.adapters[training.last.adapter]
            self._forget(data.adapter)
            training.iterations, training.last = data.iteration + 1, data
            self.adapters[data.adapter] = Adapter(data.files, data.sha256, data.probe)
        elif isinstance(data, ev.AdapterPublished):
            training.published = data
        else:
            self._spent_on_update(training, data.measured)
            training.failed = data
            self._roll_back()
