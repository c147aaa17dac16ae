"""The events of a run that never was: what the services would have recorded, made on the fly and without a model.

Each generation measures a candidate on ``dev`` (one sample each) and on groups of ``train``, and keeps only the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from bascule.runtime.log.permissions import CLI, SERVICES
from bascule.runtime.log.protocol import NewEvent
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.decision import Evidence, Option
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.harness import make_harness
from bascule.schemas.landscape import Interval, Measured, MeasuredEvaluation, RewardLandscape
from bascule.schemas.run import PluginChoice, PluginPin, RunConfig
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Scored, Trajectory, pack_floats, pack_ids

SAMPLES: Final = 8
SHARD: Final = 32
#: Events of a generation: 500 dev and 145 x 8 train episodes, logged and scored, and what is decided about them.
DEV, GROUPS = 500, 145
PER_GENERATION: Final = 2 * (DEV + GROUPS * SAMPLES) + 27

_PRODUCERS = {s: Producer(service=s, version="0.0.0", hash="0" * 40) for s in (*SERVICES, CLI)}
_WRITERS: dict[type[ev.Data], str] = {
    ev.RunStarted: CLI,
    ev.TrajectoryLogged: "rollout",
    ev.TrajectoryScored: "verifier",
    ev.EvaluationCompleted: "verifier",
    ev.CandidatePromoted: "verifier",
    ev.CandidateRejected: "verifier",
}
_TIME = "2026-01-01T00:00:00.000000Z"
_SURE = Interval(0.4, 0.6)
_LANDSCAPE = RewardLandscape(
    groups=GROUPS,
    samples=GROUPS * SAMPLES,
    unscored=0,
    score=0.5,
    score_interval=_SURE,
    mean=0.5,
    variance=0.25,
    skew=0.0,
    success_rate=0.5,
    pass_rates=(10, 20, 40, 40, 20, 15),
    informative=0.8,
    format_failures=0.01,
    errors=0.0,
    prompt_tokens=40.0,
    output_tokens=8.0,
    distinct_rewards=2,
)


def new_events(run: str, limit: int) -> Iterator[NewEvent]:
    """The first ``limit`` events of a run, encoded; about 1 KB for a logged episode and 0.7 KB for a score."""
    root = None
    for draft, _ in zip(drafts(run), range(limit), strict=False):
        service = _WRITERS.get(type(draft.data), "feedback" if draft.step else "meta")
        payload = encode(draft, run=run, producer=_PRODUCERS[service], time=_TIME, root=root)
        root = root or subjects.event_id(draft.subject)
        yield NewEvent(subject=draft.subject, payload=payload)


def drafts(run: str) -> Iterator[Draft]:
    """The run's events, generation after generation, without end."""
    subject = subjects.run_started(run)
    yield Draft(subject=subject, step=0, data=_started())
    generation, cause = 0, subjects.event_id(subject)
    while True:
        for draft in _generation(run, generation, cause):
            yield draft
        cause = subjects.event_id(draft.subject)
        generation += 1


def _started() -> ev.RunStarted:
    pin = PluginPin(kind="task", name="bench", version="0.0.0", distribution="bascule", hash="0" * 40)
    return ev.RunStarted(
        config=RunConfig(task=PluginChoice(name="bench"), max_generations=300),
        task_version="0.0.0",
        task_digest="0" * 40,
        train=1000,
        dev=DEV,
        sealed=DEV,
        model_digest="0" * 64,
        plugins=(pin,) * 8,
    )


def _generation(run: str, g: int, cause: str) -> Iterator[Draft]:
    harness = make_harness(
        {
            "harness.py": f"# {g}\n" + "x = 1  # a line like many others\n" * 60,
            "manifest.json": '{"name": "bench"}',
            "system_prompt.md": "Answer with the number alone.",
        }
    )
    if g > 0:
        yield Draft(subject=subjects.lever_chosen(run, g), step=g, cause=cause, data=_lever(g))
    proposed = ev.HarnessProposed(
        generation=g, digest=harness.digest, files=harness.files, author="operators", edit="an edit"
    )
    yield Draft(subject=subjects.harness_outcome(run, g), step=g, cause=cause, data=proposed)
    candidate = ev.CandidateProposed(generation=g, harness=harness.digest, parent=0 if g else None)
    yield Draft(subject=subjects.candidate_proposed(run, g), step=g, cause=cause, data=candidate)
    asked = [
        *_requests(g, f"g{g:02d}-dev", "dev", range(DEV), 1, harness.digest),
        *_requests(g, f"g{g:02d}-train", "train", range(0, 5 * GROUPS, 5), SAMPLES, harness.digest),
    ]
    for request in asked:
        name = subjects.episodes_requested(run, request.evaluation, request.shard)
        yield Draft(subject=name, step=g, cause=cause, data=request)
    for request in asked:
        for draft in _episodes(run, request):
            yield draft
        if request.shard == request.shards - 1:
            completed = ev.EvaluationCompleted(
                evaluation=request.evaluation,
                purpose=request.purpose,
                generation=g,
                split=request.split,
                landscape=_LANDSCAPE,
                measured=MeasuredEvaluation(seconds=12.5),
            )
            done = subjects.evaluation_completed(run, request.evaluation)
            yield Draft(subject=done, step=g, cause=subjects.event_id(draft.subject), data=completed)
    yield Draft(subject=subjects.candidate_gate(run, g), step=g, cause=subjects.event_id(done), data=_gate(g))


def _lever(g: int) -> ev.LeverChosen:
    return ev.LeverChosen(
        generation=g,
        lever="harness",
        algorithm=None,
        params={},
        parent=0,
        policy="rules",
        policy_version="0.0.0",
        reasons=("the harness lever has not been tried enough",),
        options=tuple(Option(lever="weights", algorithm=a, score=0.5, reasons=("r" * 60,)) for a in ("grpo", "sft")),
        evidence=tuple(Evidence(name=n, value=0.5, event=f"eval.g{g:02d}-train.completed") for n in ("score", "skew")),
    )


def _gate(g: int) -> ev.CandidatePromoted | ev.CandidateRejected:
    if g == 0:
        first = ev.GateFigures(test="first", score=0.5, score_interval=_SURE)
        return ev.CandidatePromoted(generation=0, over=None, figures=first, gate_version="1")
    figures = ev.GateFigures(test="mcnemar-exact", score=0.5, score_interval=_SURE, parent_score=0.5, p=0.5, alpha=0.05)
    return ev.CandidateRejected(generation=g, over=0, figures=figures, gate_version="1")


def _requests(
    g: int, evaluation: str, split: Literal["dev", "train"], positions: range, samples: int, harness: str
) -> list[ev.EpisodesRequested]:
    shards = [positions[i : i + SHARD] for i in range(0, len(positions), SHARD)]
    return [
        ev.EpisodesRequested(
            evaluation=evaluation,
            purpose="gate" if split == "dev" else "landscape",
            generation=g,
            split=split,
            shard=i,
            shards=len(shards),
            positions=tuple(shard),
            examples=tuple(f"{split}-{p:04d}" for p in shard),
            samples=samples,
            sampling=Sampling(temperature=0.0 if split == "dev" else 1.0, max_tokens=8),
            seed=g,
            harness=harness,
        )
        for i, shard in enumerate(shards)
    ]


def _episodes(run: str, request: ev.EpisodesRequested) -> Iterator[Draft]:
    asked = subjects.event_id(subjects.episodes_requested(run, request.evaluation, request.shard))
    for position, example in zip(request.positions, request.examples, strict=True):
        for sample in range(request.samples):
            name = subjects.trajectory_id(request.evaluation, position, sample)
            logged = subjects.trajectory_logged(run, name)
            answer = str(position + sample)
            data = ev.TrajectoryLogged(
                trajectory=name,
                evaluation=request.evaluation,
                example=example,
                position=position,
                sample=sample,
                answer=answer,
                error=None,
                prompt_tokens=40,
                output_tokens=8,
                measured=Measured(seconds=0.25),
                body=_body(position, sample, answer, request.sampling),
            )
            yield Draft(subject=logged, step=request.generation, cause=asked, data=data)
            score = ev.TrajectoryScored(
                trajectory=name,
                evaluation=request.evaluation,
                position=position,
                sample=sample,
                verdict=Scored(reward=float(sample % 2), passed=sample % 2 == 1),
            )
            yield Draft(
                subject=subjects.trajectory_scored(run, name),
                step=request.generation,
                cause=subjects.event_id(logged),
                data=score,
            )


def _body(position: int, sample: int, answer: str, sampling: Sampling) -> Trajectory:
    """One call of 40 prompt tokens and 8 sampled ones."""
    output = Output(
        token_ids=pack_ids(range(position, position + 8)),
        logprobs=pack_floats([-0.125 * (sample + 1)] * 8),
        text=answer,
    )
    call = ModelCall(
        kind="chat",
        asked=f"{position:040d}",
        prompt_ids=pack_ids(range(position, position + 40)),
        outputs=(output,),
        sampling=sampling,
        seed=1000 * position + sample,
    )
    return Trajectory(steps=(call,), answer=answer)
