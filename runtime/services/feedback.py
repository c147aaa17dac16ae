"""feedback: chooses the lever and the algorithm, writes the next harness, and ends the run."""

from __future__ import annotations

from bascule.plugins.policy import CallModel, CallResult, CallTool, NoEdit, PolicyInput
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.services import budgets, calls, proposals
from bascule.runtime.services.calls import author_session, choose, policy_session, write
from bascule.runtime.services.inputs import policy_input
from bascule.runtime.state import RunState
from bascule.runtime.world import World, plain, seed_of
from bascule.schemas import subjects
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError, HarnessError
from bascule.schemas.events import (
    AblationRequested,
    AuthorFailed,
    CandidatePromoted,
    CandidateRejected,
    EvaluationCompleted,
    HarnessProposed,
    LeverChosen,
    ModelCalled,
    RunCompleted,
    SealedReport,
    ToolCalled,
    TrainFailed,
    TrainRequested,
)
from bascule.schemas.harness import make_harness
from bascule.schemas.run import PluginChoice
from bascule.verifiers.gate import paired_test

NAME = calls.NAME


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """After a generation: the next lever. After the sealed evaluations: the end. On request: an ablation's episodes."""
    data, cause = event.data, event.envelope.id
    match data:
        case CandidatePromoted() | CandidateRejected() | TrainFailed() | AuthorFailed():
            return _next_generation(state, world, data.generation + 1, event)
        case ModelCalled() | ToolCalled():
            return _after_call(state, world, data, event)
        case LeverChosen(lever="stop") if state.best is not None and state.best not in (0, data.parent):
            # Promotions were taken back while the choice was open: another candidate is the best.
            return proposals.sealed(state, world, state.best, cause)
        case EvaluationCompleted(purpose="report"):
            return _complete(state, world, cause)
        case AblationRequested():
            return _ablate(state, world, data, cause)
        case _:
            return []


def _after_call(state: RunState, world: World, data: CallResult, event: Recorded) -> list[Draft]:
    """Step on the machine that asked, if its decision is still open."""
    generation = state.open_choice
    if generation is not None and data.session == policy_session(generation):
        return _next_generation(state, world, generation, event)
    generation = state.open_edit
    if generation is not None and data.session == author_session(generation):
        return _edit(state, world, generation, event.envelope.id)
    return []


def _next_generation(state: RunState, world: World, generation: int, event: Recorded) -> list[Draft]:
    cause = event.envelope.id
    given = policy_input(state, world, generation)
    stopped = budgets.stop(state, event.subject.split(".", 2)[2])
    decision = stopped if stopped is not None else choose(state, world, generation, given)
    if not isinstance(decision, LeverDecision):
        return []  # a call, which the service makes
    chosen = LeverChosen(
        generation=generation,
        lever=decision.lever,
        algorithm=decision.algorithm,
        params=plain(decision.params),
        parent=given.best,
        policy=world.policy.name if stopped is None else budgets.POLICY,
        policy_version=world.policy.version if stopped is None else budgets.VERSION,
        reasons=decision.reasons,
        options=decision.options,
        evidence=decision.evidence,
    )
    first = Draft(subject=subjects.lever_chosen(state.run, generation), step=generation, cause=cause, data=chosen)
    if decision.lever == "harness":
        return [first, *_edit(state, world, generation, cause)]
    if decision.lever == "weights":
        return [first, _train(state, world, generation, given, decision, cause)]
    targets = sorted({0, given.best})
    return [first, *(d for t in targets for d in proposals.sealed(state, world, t, cause))]


def _edit(state: RunState, world: World, generation: int, cause: str) -> list[Draft]:
    best = state.best
    assert best is not None
    parent = state.candidate(best)
    harness = state.harnesses[parent.harness]
    edit = write(state, world, generation)
    over = budgets.over(state, "harness")
    if isinstance(edit, CallModel | CallTool) and not over:
        return []  # a call, which the service makes
    subject = subjects.harness_outcome(state.run, generation)

    def failed(reason: str) -> list[Draft]:
        data = AuthorFailed(generation=generation, author=world.author.name, reason=reason)
        return [Draft(subject=subject, step=generation, cause=cause, data=data)]

    if isinstance(edit, CallModel | CallTool):
        return failed(f"{over}, before the author had an edit")
    if isinstance(edit, NoEdit):
        return failed(edit.reason)
    try:
        new = make_harness(world.redaction.value(edit.files))
    except HarnessError as e:
        return failed(f"The edit {edit.edit!r} is not a usable harness. {e}")
    if (refused := refusal(new.manifest, world.public)) is not None:
        return failed(f"The edit {edit.edit!r} is not allowed. {refused}")
    if world.withholding is not None and world.withholding.value(new.files) != new.files:
        return failed(f"The edit {edit.edit!r} quotes an item of the task, whose items are restricted.")
    proposed = HarnessProposed(
        generation=generation,
        digest=new.digest,
        files=new.files,
        author=world.author.name,
        edit=edit.edit,
        parent=harness.digest,
    )
    return [
        Draft(subject=subject, step=generation, cause=cause, data=proposed),
        *proposals.candidate(
            state,
            world,
            generation=generation,
            harness=new.digest,
            adapter=parent.adapter,
            parent=best,
            lever="harness",
            algorithm=None,
            cause=cause,
        ),
    ]


def _train(
    state: RunState, world: World, generation: int, given: PolicyInput, decision: LeverDecision, cause: str
) -> Draft:
    info = next((a for a in given.algorithms if a.name == decision.algorithm), None)
    if info is None:
        raise ConfigError(
            f"The policy {world.policy.name} chose the algorithm {decision.algorithm!r}, which is not installed.",
            next_step="Choose another policy, or install the algorithm.",
        )
    parent = state.candidate(given.best)
    params = {**info.params, **decision.params}
    on_policy = info.requires.on_policy
    start_from = params.get("start_from", "promoted")
    if start_from not in ("promoted", "base"):
        raise ConfigError(
            f"The algorithm {info.name} is to start from {start_from!r}.",
            next_step="Set its start_from to promoted or to base.",
        )
    return Draft(
        subject=subjects.train_requested(state.run, generation),
        step=generation,
        cause=cause,
        data=TrainRequested(
            generation=generation,
            algorithm=info.name,
            algorithm_version=info.version,
            params=plain(params),
            iterations=int(params["steps"]) if on_policy else 1,
            groups=int(params["groups"]),
            samples=int(params["num_generations"]),
            temperature=1.0,
            parent=given.best,
            harness=parent.harness,
            adapter=None if start_from == "base" else parent.adapter,
            logged=None if on_policy else f"g{given.best:02d}-train",
            seed=seed_of(world.config.seed, "train", generation),
        ),
    )


def _complete(state: RunState, world: World, cause: str) -> list[Draft]:
    best = state.best
    assert best is not None
    before, after = (state.evaluations.get(f"g{g:02d}-sealed") for g in (0, best))
    if before is None or after is None or before.completed is None or after.completed is None:
        return []
    stop = max(n for n, s in state.steps.items() if s.lever is not None)
    lever = state.steps[stop].lever
    assert lever is not None
    test = paired_test(
        [r[0] for r in after.rewards().values()],
        [r[0] for r in before.rewards().values()],
        seed=seed_of(world.config.seed, "sealed"),
    )
    sealed = SealedReport(
        before=before.completed.landscape.score,
        before_interval=before.completed.landscape.score_interval,
        after=after.completed.landscape.score,
        after_interval=after.completed.landscape.score_interval,
        wins=test.wins,
        losses=test.losses,
        p=test.p,
        n=after.completed.landscape.groups,
        test=test.test,
    )
    data = RunCompleted(best=best, generations=stop - 1, reason="; ".join(lever.reasons), sealed=sealed)
    return [Draft(subject=subjects.run_end(state.run), step=stop, cause=cause, data=data)]


def _ablate(state: RunState, world: World, data: AblationRequested, cause: str) -> list[Draft]:
    candidate = state.candidate(data.generation)
    constant = data.arm == "constant-engine"
    return proposals.episodes(
        state,
        world,
        evaluation=f"abl-{data.name}",
        purpose="ablation",
        generation=data.generation,
        split="sealed",
        positions=world.positions("sealed"),
        samples=1,
        temperature=0.0,
        harness=candidate.harness,
        adapter=None,
        cause=cause,
        engine=PluginChoice(name="constant", params={"text": data.answer}) if constant else None,
    )
