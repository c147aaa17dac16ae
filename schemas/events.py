"""Every event type that a run records, with the version of its data.

Decisions follow from the log alone and can be made again; outcomes record an effect and cannot. ``KIND`` says which is
which: a run's decision hash is taken over its decisions.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from bascule.schemas.decision import Evidence, Lever, Option
from bascule.schemas.landscape import Interval, Measured, MeasuredEvaluation, RewardLandscape, WorkMeasured
from bascule.schemas.run import PluginChoice, PluginPin, RunConfig
from bascule.schemas.sandbox import SandboxReport
from bascule.schemas.trajectory import EpisodeError, Sampling, Trajectory, Verdict

Kind = Literal["command", "decision", "outcome"]
Split = Literal["train", "dev", "sealed", "regression"]
Purpose = Literal["landscape", "gate", "training", "report", "ablation"]


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what an event records."""

    TYPE: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    KIND: ClassVar[Kind] = "outcome"


#: What blobs are marked with that hold items which must not be published.
RESTRICTED = "; restricted"


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """A content-addressed blob: durable before the event that names it is appended."""

    sha256: str
    size: int
    media: str = "application/octet-stream"

    @property
    def restricted(self) -> bool:
        """Whether exports and pages leave it out unless asked."""
        return self.media.endswith(RESTRICTED)


class RunStarted(Data, frozen=True, kw_only=True):
    """A run was asked for.

    Attributes:
        task_digest: digest of the task's public face (specification, train items, questions).
        train, dev, sealed: number of examples of each split that the run uses.
        model_digest: digest of the base model.
        plugins: what the run is pinned to.
    """

    TYPE = "bascule.run.started"
    VERSION = 3
    KIND = "command"
    config: RunConfig
    task_version: str
    task_digest: str
    train: int
    dev: int
    sealed: int
    model_digest: str
    plugins: tuple[PluginPin, ...]


class HarnessProposed(Data, frozen=True, kw_only=True):
    """A harness was written: the first one, or an edit of a promoted one.

    Attributes:
        author: who wrote it (``reference`` for the task's own).
        edit: the operator or a one-line summary; ``parent`` is the digest it was made from.
    """

    TYPE = "bascule.harness.proposed"
    KIND = "decision"
    generation: int
    digest: str
    files: dict[str, str]
    author: str
    edit: str
    parent: str | None = None


class AuthorFailed(Data, frozen=True, kw_only=True):
    """An author had nothing to propose, or its proposal was not a usable harness."""

    TYPE = "bascule.harness.failed"
    KIND = "decision"
    generation: int
    author: str
    reason: str


class CandidateProposed(Data, frozen=True, kw_only=True):
    """A pair of harness and adapter to be measured; ``parent`` is the generation of the promoted one it came from."""

    TYPE = "bascule.candidate.proposed"
    KIND = "decision"
    generation: int
    harness: str
    adapter: str | None = None
    parent: int | None = None
    lever: Lever | None = None
    algorithm: str | None = None


class EpisodesRequested(Data, frozen=True, kw_only=True):
    """A shard of episodes: the unit of work of the rollout service.

    Attributes:
        evaluation: the whole that this shard is part of, e.g. ``g03-dev`` or ``g04-i07``.
        positions: where each example stands in its split.
        harness: digest; adapter: name, None for the base model.
        engine: an engine other than the run's own (ablations).
        perturbed: the examples are asked in another form.
    """

    TYPE = "bascule.episodes.requested"
    VERSION = 2
    KIND = "decision"
    evaluation: str
    purpose: Purpose
    generation: int
    split: Split
    shard: int
    shards: int
    positions: tuple[int, ...]
    examples: tuple[str, ...]
    samples: int
    sampling: Sampling
    seed: int
    harness: str
    adapter: str | None = None
    engine: PluginChoice | None = None
    perturbed: bool | msgspec.UnsetType = msgspec.UNSET


class TrajectoryLogged(Data, frozen=True, kw_only=True):
    """One episode ran. ``body`` is inline up to 64 KiB, otherwise in ``blob``."""

    TYPE = "bascule.trajectory.logged"
    VERSION = 2
    trajectory: str
    evaluation: str
    example: str
    position: int
    sample: int
    answer: str | None
    error: EpisodeError | None
    prompt_tokens: int
    output_tokens: int
    measured: WorkMeasured
    body: Trajectory | None = None
    blob: BlobRef | None = None


class TrajectoryScored(Data, frozen=True, kw_only=True):
    """The scoring process gave its verdict; ``measured`` is None if that was not recorded.

    Attributes:
        second: the second verifier's, where the run has one and asks it.
    """

    TYPE = "bascule.trajectory.scored"
    VERSION = 3
    trajectory: str
    evaluation: str
    position: int
    sample: int
    verdict: Verdict
    measured: WorkMeasured | None = None
    second: Verdict | None = None


class EvaluationCompleted(Data, frozen=True, kw_only=True):
    """All trajectories of an evaluation are scored."""

    TYPE = "bascule.evaluation.completed"
    VERSION = 3
    KIND = "decision"
    evaluation: str
    purpose: Purpose
    generation: int
    split: Split
    landscape: RewardLandscape
    measured: MeasuredEvaluation


class GuardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard of dev saw and gave.

    Attributes:
        difference: mean reward of the candidate minus the parent's over the pairs.
        threshold: what ``difference`` had to exceed.
        reported: the score that the run reports after this decision.
    """

    kind: Literal["none", "ladder", "thresholdout"]
    difference: float
    threshold: float
    reported: float


class CheaperFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A cheaper candidate's test of non-inferiority.

    Attributes:
        saved: fraction of the parent's tokens a rollout.
        p: for "worse by less than ``margin``".
    """

    saved: float
    margin: float
    p: float


class PairedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The candidate against its parent on other examples, or by another verifier.

    Attributes:
        difference: mean reward of the candidate minus the parent's over the pairs.
        p_better, p_worse: one-sided.
    """

    pairs: int
    difference: float
    wins: int
    losses: int
    p_better: float
    p_worse: float


class SecondFigures(PairedFigures, frozen=True, kw_only=True):
    """The candidate against its parent by the second verifier.

    Attributes:
        divergence: gain by the first verifier minus gain by the second, over the examples that have both.
        interval: of ``divergence``, 95%.
    """

    divergence: float
    interval: Interval


class GateFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate looked at.

    Attributes:
        test: ``first`` (nothing to compare with), ``mcnemar-exact`` or ``paired-sign-flip``.
        wins, losses: examples on which the candidate is better or worse than the parent.
        p: one-sided, for "the candidate is better".
        reason: why it was promoted or rejected, in words; left out by version 1 of the rules, as is what follows.
        guard: of dev against adapting to it.
        cheaper: left out unless a cheaper candidate was tested for being no worse.
        regression, perturbed, second: left out where they were not measured.
    """

    test: Literal["first", "mcnemar-exact", "paired-sign-flip"]
    score: float
    score_interval: Interval
    parent_score: float | None = None
    wins: int = 0
    losses: int = 0
    p: float | None = None
    alpha: float | None = None
    reason: str | msgspec.UnsetType = msgspec.UNSET
    guard: GuardFigures | msgspec.UnsetType = msgspec.UNSET
    cheaper: CheaperFigures | msgspec.UnsetType = msgspec.UNSET
    regression: PairedFigures | msgspec.UnsetType = msgspec.UNSET
    perturbed: PairedFigures | msgspec.UnsetType = msgspec.UNSET
    second: SecondFigures | msgspec.UnsetType = msgspec.UNSET


class CandidatePromoted(Data, frozen=True, kw_only=True):
    """The candidate is the new parent."""

    TYPE = "bascule.candidate.promoted"
    VERSION = 2
    KIND = "decision"
    generation: int
    over: int | None
    figures: GateFigures
    gate_version: str


class CandidateRejected(Data, frozen=True, kw_only=True):
    """The parent stays."""

    TYPE = "bascule.candidate.rejected"
    VERSION = 2
    KIND = "decision"
    generation: int
    over: int
    figures: GateFigures
    gate_version: str


class LeverChosen(Data, frozen=True, kw_only=True):
    """The feedback service chose what to pull next, and why."""

    TYPE = "bascule.lever.chosen"
    KIND = "decision"
    generation: int
    lever: Lever
    algorithm: str | None
    params: dict[str, Any]
    parent: int
    policy: str
    policy_version: str
    reasons: tuple[str, ...]
    options: tuple[Option, ...]
    evidence: tuple[Evidence, ...]


class ModelCalled(Data, frozen=True, kw_only=True):
    """A policy or an author asked a model; recorded so that a crash repeats no call and a replay makes none.

    Attributes:
        request: what was asked, inline up to 64 KiB, otherwise empty and in ``request_blob``.
        input_tokens: of the prompt, without those that the endpoint read from its cache or wrote to it; these are in
            ``cache_read_tokens`` and ``cache_write_tokens``, since they have prices of their own.
        stop_reason: why the answer ended, in the words of the Messages API; None if it was not recorded.
    """

    TYPE = "bascule.model.called"
    VERSION = 2
    session: str
    ordinal: int
    model: str
    request: dict[str, Any]
    answer: dict[str, Any]
    input_tokens: int = 0
    output_tokens: int = 0
    measured: Measured = Measured()
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    stop_reason: str | None = None
    request_blob: BlobRef | None = None


class TrialCost(msgspec.Struct, frozen=True, kw_only=True):
    """The episodes that a trial ran, and their tokens."""

    rollouts: int
    prompt_tokens: int
    output_tokens: int


class ToolCalled(Data, frozen=True, kw_only=True):
    """A policy or an author used a tool; ``trial`` is set where it ran episodes."""

    TYPE = "bascule.tool.called"
    VERSION = 2
    session: str
    ordinal: int
    name: str
    arguments: dict[str, Any]
    result: str | None = None
    error: str | None = None
    measured: WorkMeasured = WorkMeasured()
    trial: TrialCost | None = None


class TrainRequested(Data, frozen=True, kw_only=True):
    """A training job: ``iterations`` on-policy updates in one generation, or one update from ``logged`` episodes.

    Attributes:
        parent: generation of the promoted candidate whose harness the job samples with.
        adapter: name of the adapter to continue from; None starts at the base model.
        logged: an evaluation that is already in the log, trained from without new episodes.
    """

    TYPE = "bascule.train.requested"
    KIND = "decision"
    generation: int
    algorithm: str
    algorithm_version: str
    params: dict[str, Any]
    iterations: int
    groups: int
    samples: int
    temperature: float
    parent: int
    harness: str
    adapter: str | None = None
    logged: str | None = None
    seed: int = 0


class TrainStarted(Data, frozen=True, kw_only=True):
    """An attempt at the job took over; appends of earlier attempts are refused from here on.

    Attributes:
        threads: of the thread that computes; equal inputs give equal bytes at an equal count.
        versions: of what computes, by name, its ``device``, and the number of ``processes`` where there are several.
    """

    TYPE = "bascule.train.started"
    VERSION = 2
    generation: int
    attempt: int
    resumed_after: int
    threads: int
    versions: dict[str, str] = {}


class AdapterProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer's own forward pass says of a fixed text, for a comparison with what an engine serves.

    Attributes:
        ids: the text's tokens, packed int32.
        logprobs: at temperature 1, of each but the first after those before it, packed float32.
        base: the same without the adapter.
        dtype: of the trainer's base weights.
    """

    ids: bytes
    logprobs: bytes
    base: bytes
    dtype: str


class AdapterCheckpointed(Data, frozen=True, kw_only=True):
    """One update is done.

    Attributes:
        adapter: its name, ``g04-i007``.
        files: the adapter in PEFT's layout, by file name; ``sha256`` is over all of them.
        state: adapter, optimiser and counters, to continue from. Of a job only the newest checkpoint's blobs are kept.
        data_digest: of the trajectories that the update was trained from.
        metrics: loss, kl, clip_fraction, entropy, ess, grad_norm, trained_tokens, reward, ...
        base: digest of the base model; empty if it was not recorded.
        probe: what an engine that serves the adapter must say of a text; None if it was not recorded.
    """

    TYPE = "bascule.adapter.checkpointed"
    VERSION = 3
    generation: int
    iteration: int
    attempt: int
    adapter: str
    files: dict[str, BlobRef]
    sha256: str
    state: BlobRef
    data_digest: str
    metrics: dict[str, float]
    measured: Measured
    base: str = ""
    probe: AdapterProbe | None = None


class AdapterPublished(Data, frozen=True, kw_only=True, omit_defaults=True):
    """The job's last adapter, ready to become a candidate.

    Attributes:
        data_digest, metrics, base: of its checkpoint; empty in runs whose checkpoints have no ``base``.
    """

    TYPE = "bascule.adapter.published"
    VERSION = 2
    KIND = "decision"
    generation: int
    adapter: str
    files: dict[str, BlobRef]
    sha256: str
    parent_adapter: str | None
    iterations: int
    data_digest: str = ""
    metrics: dict[str, float] = {}
    base: str = ""


class TrainFailed(Data, frozen=True, kw_only=True):
    """The job stopped without an adapter: infeasible data, a guard rail, or an error.

    Attributes:
        measured: of the update that failed; None if that was not recorded.
    """

    TYPE = "bascule.train.failed"
    VERSION = 2
    generation: int
    attempt: int
    reason: str
    figures: dict[str, float] = {}
    measured: Measured | None = None


class ServedProbe(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter, as served, compares with what the trainer computed.

    Attributes:
        tokens: number of log-probabilities that were compared, on each replica.
        largest: difference of one of them.
        bound: the most that it may be, from rounding in ``dtype``.
        from_base: the largest difference of the adapter and the base model there; where it is within the bound, the
            comparison does not tell them apart.
        dtype: the coarser of the trainer's and the engine's.
        replicas: that were asked.
    """

    tokens: int
    largest: float
    bound: float
    from_base: float
    dtype: str
    replicas: int = 1


class AdapterServed(Data, frozen=True, kw_only=True):
    """An engine has loaded the adapter, and serves its weights; no episode ran with it before.

    Attributes:
        probe: how that was seen; None where the trainer recorded nothing to compare, or the engine cannot tell.
    """

    TYPE = "bascule.adapter.served"
    VERSION = 2
    adapter: str
    sha256: str
    engine: str
    probe: ServedProbe | None = None


class SandboxProbed(Data, frozen=True, kw_only=True):
    """A service found out, by trying, what confines the code that it runs for others.

    Attributes:
        worker: the process of the service that found it.
    """

    TYPE = "bascule.sandbox.probed"
    service: str
    worker: str
    report: SandboxReport


class AblationRequested(Data, frozen=True, kw_only=True):
    """Measure the final candidate without one of its parts.

    Attributes:
        arm: ``constant-engine`` (an engine that always answers ``answer``) or ``no-adapter``.
    """

    TYPE = "bascule.ablation.requested"
    KIND = "command"
    name: str
    arm: Literal["constant-engine", "no-adapter"]
    generation: int
    answer: str | None = None


class RunPaused(Data, frozen=True, kw_only=True):
    """The services let go of the run; what was under way and not yet recorded is done again after it is resumed."""

    TYPE = "bascule.run.paused"
    KIND = "command"
    reason: str


class RunResumed(Data, frozen=True, kw_only=True):
    """A paused run goes on."""

    TYPE = "bascule.run.resumed"
    KIND = "command"


class RunCancelled(Data, frozen=True, kw_only=True):
    """Somebody ended the run."""

    TYPE = "bascule.run.cancelled"
    KIND = "command"
    reason: str


class SealedReport(msgspec.Struct, frozen=True, kw_only=True):
    """The sealed split, looked at once after the stop: the first harness and the best candidate.

    Attributes:
        before, after: scores of generation 0 and of the best candidate, over the whole split.
        p: one-sided paired test (exact McNemar for pass/fail).
    """

    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    wins: int
    losses: int
    p: float
    n: int
    test: str


class RunRolledBack(Data, frozen=True, kw_only=True):
    """Somebody took promotions back: once the generation under way is over, ``generation`` is the parent again."""

    TYPE = "bascule.run.rolled_back"
    KIND = "command"
    generation: int
    reason: str


class RunCompleted(Data, frozen=True, kw_only=True):
    """The loop stopped and the sealed split was scored."""

    TYPE = "bascule.run.completed"
    KIND = "decision"
    best: int
    generations: int
    reason: str
    sealed: SealedReport


class RunFailed(Data, frozen=True, kw_only=True):
    """The run cannot go on: what happened and what to do."""

    TYPE = "bascule.run.failed"
    service: str
    reason: str


class RunForked(Data, frozen=True, kw_only=True):
    """A what-if: up to here this run repeats another one; from here on ``config`` is in force.

    Attributes:
        run, count, head: the run that was forked, how many of its events are repeated, and its chain's head there.
        step: the generation from which on decisions are made anew.
        config, plugins: in force from here on.
        changes: what was set, by dotted key.
    """

    TYPE = "bascule.run.forked"
    VERSION = 3
    KIND = "command"
    run: str
    count: int
    head: str
    step: int
    config: RunConfig
    plugins: tuple[PluginPin, ...]
    changes: dict[str, Any]


class RuntimeChanged(Data, frozen=True, kw_only=True):
    """Somebody let the run go on under other code than it was pinned to; ``plugins`` are the pins from here on."""

    TYPE = "bascule.run.runtime_changed"
    KIND = "command"
    plugins: tuple[PluginPin, ...]
    changes: tuple[str, ...]


class LogCheckpointed(Data, frozen=True, kw_only=True):
    """The notary's note of how far the run's hash chain goes.

    Attributes:
        count: events of the run, from its start, that ``head`` covers.
        head: the chain's value after them, hexadecimal.
    """

    TYPE = "bascule.log.checkpointed"
    count: int
    head: str


class BlobErased(Data, frozen=True, kw_only=True):
    """A blob was deleted for good on somebody's request; the events that name it stay as they are."""

    TYPE = "bascule.blob.erased"
    KIND = "command"
    sha256: str
    reason: str


TYPES: dict[tuple[str, int], type[Data]] = {
    (t.TYPE, t.VERSION): t
    for t in (
        RunStarted,
        HarnessProposed,
        AuthorFailed,
        CandidateProposed,
        EpisodesRequested,
        TrajectoryLogged,
        TrajectoryScored,
        EvaluationCompleted,
        CandidatePromoted,
        CandidateRejected,
        LeverChosen,
        ModelCalled,
        ToolCalled,
        TrainRequested,
        TrainStarted,
        AdapterCheckpointed,
        AdapterPublished,
        TrainFailed,
        AdapterServed,
        SandboxProbed,
        AblationRequested,
        RunPaused,
        RunResumed,
        RunCancelled,
        RunRolledBack,
        RunCompleted,
        RunFailed,
        RunForked,
        RuntimeChanged,
        LogCheckpointed,
        BlobErased,
    )
}
KNOWN_TYPES = {name for name, _ in TYPES}
