"""feedback: chooses the lever and the algorithm, writes the next harness, and ends the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bascule.plugins.policy import (
    AuthorInput,
    Call,
    CallModel,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    Performer,
    PolicyInput,
    TrainEvidence,
)
from bascule.runtime.services import proposals
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
from bascule.schemas.landscape import Measured
from bascule.schemas.run import PluginChoice
from bascule.schemas.trajectory import Scored
from bascule.verifiers.gate import paired_test

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME = "feedback"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """After a generation: the next lever. After the sealed evaluations: the end. On request: an ablation's episodes."""
    data, cause = event.data, event.envelope.id
    match data:
        case CandidatePromoted() | CandidateRejected() | TrainFailed() | AuthorFailed():
            return _next_generation(state, world, data.generation + 1, cause)
        case ModelCalled() | ToolCalled():
            return _after_call(state, world, data, cause)
        case EvaluationCompleted(purpose="report"):
            return _complete(state, world, cause)
        case AblationRequested():
            return _ablate(state, world, data, cause)
        case _:
            return []


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
        edits_left=world.author.edits_left(harness, _tried(state, best)),
    )


def _tried(state: RunState, parent: int) -> tuple[str, ...]:
    """Edits of the parent's harness that were tried and did not replace it."""
    digest = state.candidate(parent).harness
    return tuple(
        s.harness.edit
        for _, s in sorted(state.steps.items())
        if s.harness and s.harness.parent == digest and not isinstance(s.gate, CandidatePromoted)
    )


def policy_session(generation: int) -> str:
    return f"g{generation:02d}-policy"


def author_session(generation: int) -> str:
    return f"g{generation:02d}-author"


def _generation(session: str) -> int:
    return int(session[1:].partition("-")[0])


def _choose(state: RunState, world: World, generation: int, given: PolicyInput) -> Call | LeverDecision:
    """The policy's next step, after all calls that it has made."""
    return world.policy.step(given, tuple(state.calls.get(policy_session(generation), ())))


def _write(state: RunState, world: World, generation: int) -> Call | HarnessEdit | NoEdit:
    """The author's next step, after all calls that it has made."""
    results = tuple(state.calls.get(author_session(generation), ()))
    return world.author.step(author_input(state, world, generation), results)


def _after_call(state: RunState, world: World, data: CallResult, cause: str) -> list[Draft]:
    """Step on the machine that asked, if its decision is still open."""
    generation = state.open_choice
    if generation is not None and data.session == policy_session(generation):
        return _next_generation(state, world, generation, cause)
    generation = state.open_edit
    if generation is not None and data.session == author_session(generation):
        return _edit(state, world, generation, cause)
    return []


def _next_generation(state: RunState, world: World, generation: int, cause: str) -> list[Draft]:
    given = policy_input(state, world, generation)
    decision = _choose(state, world, generation, given)
    if not isinstance(decision, LeverDecision):
        return []  # a call, which the service makes
    chosen = LeverChosen(
        generation=generation,
        lever=decision.lever,
        algorithm=decision.algorithm,
        params=plain(decision.params),
        parent=given.best,
        policy=world.policy.name,
        policy_version=world.policy.version,
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
    edit = _write(state, world, generation)
    if isinstance(edit, CallModel | CallTool):
        return []
    subject = subjects.harness_outcome(state.run, generation)

    def failed(reason: str) -> list[Draft]:
        data = AuthorFailed(generation=generation, author=world.author.name, reason=reason)
        return [Draft(subject=subject, step=generation, cause=cause, data=data)]

    if isinstance(edit, NoEdit):
        return failed(edit.reason)
    try:
        new = make_harness(world.redaction.value(edit.files))
    except HarnessError as e:
        return failed(f"The edit {edit.edit!r} is not a usable harness. {e}")
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
        tried=_tried(state, best),
        train=public.train,
        answers=public.answers,
        evidence=tuple(evidence),
    )


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


class Feedback:
    """The feedback service's effects: the calls that a policy or an author asks for, one after the other."""

    async def run(self, view: View) -> None:
        async for state in view.changes():
            while (asked := pending(state, view.world)) is not None:
                session, ordinal, call = asked
                # A process that was paused wakes up with an old state, while another one has had the answer.
                there = await view.log.get(subjects.call_outcome(view.run, session, ordinal))
                if there is not None:
                    await view.until(lambda s: s.seq >= there.seq)  # noqa: B023
                    continue
                view.logger.info("call.started", session=session, ordinal=ordinal)
                await self._perform(view, session, ordinal, call)

    async def _perform(self, view: View, session: str, ordinal: int, call: Call) -> None:
        machine = view.world.policy if session.endswith("-policy") else view.world.author
        if not isinstance(machine, Performer):
            raise ConfigError(
                f"{machine.name} asks for a call and cannot make one.", next_step="Choose another policy or author."
            )
        started = view.clock()
        performed = await machine.perform(call)
        measured = Measured(seconds=view.clock() - started)
        data: CallResult
        if isinstance(call, CallModel):
            data = ModelCalled(
                session=session,
                ordinal=ordinal,
                model=call.model,
                request=call.request,
                answer=performed.answer,
                input_tokens=performed.input_tokens,
                output_tokens=performed.output_tokens,
                measured=measured,
            )
        else:
            data = ToolCalled(
                session=session,
                ordinal=ordinal,
                name=call.name,
                arguments=call.arguments,
                result=performed.answer.get("result"),
                error=performed.answer.get("error"),
                measured=measured,
            )
        draft = Draft(
            subject=subjects.call_outcome(view.run, session, ordinal),
            step=_generation(session),
            data=data,
            cause=_asked_by(view.state, session, ordinal),
        )
        (recorded,) = await view.append(NAME, [draft])
        await view.until(lambda s: s.seq >= recorded.seq)


def _asked_by(state: RunState, session: str, ordinal: int) -> str:
    """Id of the event upon which the machine asked."""
    run, generation = state.run, _generation(session)
    if ordinal:
        return subjects.event_id(subjects.call_outcome(run, session, ordinal - 1))
    if session == author_session(generation):
        return subjects.event_id(subjects.lever_chosen(run, generation))
    before = state.steps[generation - 1]
    if before.author_failed is not None:
        return subjects.event_id(subjects.harness_outcome(run, before.number))
    if before.gate is None:
        return subjects.event_id(subjects.train_outcome(run, before.number))
    return subjects.event_id(subjects.candidate_gate(run, before.number))


def pending(state: RunState, world: World) -> tuple[str, int, Call] | None:
    """The call that is asked for and not recorded yet: its session, its place in it, and what it is."""
    asked: Call | LeverDecision | HarnessEdit | NoEdit
    if (generation := state.open_choice) is not None:
        session = policy_session(generation)
        asked = _choose(state, world, generation, policy_input(state, world, generation))
    elif (generation := state.open_edit) is not None:
        session = author_session(generation)
        asked = _write(state, world, generation)
    else:
        return None
    return (session, len(state.calls.get(session, ())), asked) if isinstance(asked, CallModel | CallTool) else None
