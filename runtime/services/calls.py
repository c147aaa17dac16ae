"""The calls that policies and authors ask for: what is asked next, and making it.

A machine that asks is stepped anew from the results of all its calls, which the log holds. So what is asked follows
from the state, a crash repeats no call that was recorded, and a replay makes none. Where a model cannot be asked, or
gives nothing that can be used, the run is paused with what a person can do about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from bascule.plugins.policy import (
    READ,
    TRIAL,
    Call,
    CallModel,
    CallResult,
    CallTool,
    ChecksReady,
    HarnessEdit,
    NoEdit,
    Performed,
    Performer,
    PolicyInput,
)
from bascule.runtime.services import budgets
from bascule.runtime.services.inputs import author_input, policy_input
from bascule.runtime.services.reading import read_trajectory
from bascule.runtime.services.recording import media, recorded_request
from bascule.runtime.services.waiting import told_of_waiting
from bascule.runtime.services.workbench import Workbench
from bascule.runtime.state import RunState
from bascule.runtime.world import World
from bascule.schemas import subjects
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import ConfigError, ModelError
from bascule.schemas.events import ModelCalled, RunPaused, ToolCalled
from bascule.schemas.landscape import Measured, WorkMeasured

if TYPE_CHECKING:
    from bascule.runtime.runner import View

NAME: Final = "feedback"


def policy_session(generation: int) -> str:
    return f"g{generation:02d}-policy"


def author_session(generation: int) -> str:
    return f"g{generation:02d}-author"


def _generation(session: str) -> int:
    return int(session[1:].partition("-")[0])


def choose(state: RunState, world: World, generation: int, given: PolicyInput) -> Call | LeverDecision:
    """The policy's next step, after all calls that it has made; a decision keeps within the budgets of levers."""
    answer = world.policy.step(given, tuple(state.calls.get(policy_session(generation), ())))
    return budgets.within(answer, state) if isinstance(answer, LeverDecision) else answer


def write(state: RunState, world: World, generation: int) -> Call | HarnessEdit | NoEdit:
    """The author's next step, after all calls that it has made."""
    results = tuple(state.calls.get(author_session(generation), ()))
    return world.author.step(author_input(state, world, generation), results)


def pending(state: RunState, world: World) -> tuple[str, int, Call] | None:
    """The call that is asked for and not recorded yet: its session, its place in it, and what it is."""
    asked: Call | LeverDecision | HarnessEdit | NoEdit
    if (generation := state.open_choice) is not None:
        if budgets.stop(state, "") is not None:
            return None
        session = policy_session(generation)
        asked = choose(state, world, generation, policy_input(state, world, generation))
    elif (generation := state.open_edit) is not None:
        if budgets.over(state, "harness"):
            return None
        session = author_session(generation)
        asked = write(state, world, generation)
    else:
        return None
    return (session, len(state.calls.get(session, ())), asked) if isinstance(asked, CallModel | CallTool) else None


class Feedback:
    """The feedback service's effects: the calls that a policy or an author asks for, one after the other."""

    async def run(self, view: View) -> None:
        async with contextlib.AsyncExitStack() as stack:
            workbench = Workbench(view, NAME)
            stack.push_async_callback(workbench.close)
            stack.enter_context(told_of_waiting(view.logger))
            await view.ready()
            if view.state.end is None and (missing := _missing(view.world)) is not None:
                await _pause(view, missing)
            async for state in view.changes():
                while state.active and (asked := pending(state, view.world)) is not None:
                    session, ordinal, call = asked
                    # A process that was paused wakes up with an old state, while another one has had the answer.
                    there = await view.log.get(subjects.call_outcome(view.run, session, ordinal))
                    if there is not None:
                        await view.until(lambda s: s.seq >= there.seq)  # noqa: B023
                        continue
                    view.logger.info("call.started", session=session, ordinal=ordinal)
                    await self._perform(view, workbench, session, ordinal, call)

    async def _perform(self, view: View, workbench: Workbench, session: str, ordinal: int, call: Call) -> None:
        if isinstance(call, CallModel):
            try:
                budgets.check_prices(view.world.config, [call.model])
            except ConfigError as error:
                await _pause(view, str(error))
                return
        started = view.clock()
        try:
            if isinstance(call, CallTool) and call.name == TRIAL and session.endswith("-author"):
                performed = await workbench.perform(call.arguments, f"{session}-{ordinal:03d}")
            elif isinstance(call, CallTool) and call.name == READ:
                performed = await read_trajectory(view, call.arguments)
            else:
                performed = await _asked_of(view.world, session, call)
        except ModelError as error:
            await _pause(view, str(error))
            return
        measured = Measured(seconds=view.clock() - started)
        data: CallResult
        if isinstance(call, CallModel):
            request, blob = recorded_request(call, view.redaction, view.world.withholding)
            data = ModelCalled(
                session=session,
                ordinal=ordinal,
                model=call.model,
                request=request,
                answer=performed.answer,
                input_tokens=performed.input_tokens,
                output_tokens=performed.output_tokens,
                measured=measured,
                cache_read_tokens=performed.cache_read_tokens,
                cache_write_tokens=performed.cache_write_tokens,
                stop_reason=performed.stop_reason,
                request_blob=None if blob is None else await view.blobs.put(blob, media(view.world.public.restricted)),
            )
        else:
            data = ToolCalled(
                session=session,
                ordinal=ordinal,
                name=call.name,
                arguments=call.arguments,
                result=performed.answer.get("result"),
                error=performed.answer.get("error"),
                measured=WorkMeasured(seconds=measured.seconds, device=performed.device),
                trial=performed.trial,
            )
        draft = Draft(
            subject=subjects.call_outcome(view.run, session, ordinal),
            step=_generation(session),
            data=data,
            cause=_asked_by(view.state, session, ordinal),
        )
        if performed.pause is not None:
            await _pause(view, performed.pause, draft)
            return
        (recorded,) = await view.append(NAME, [draft])
        await view.until(lambda s: s.seq >= recorded.seq)


async def _pause(view: View, reason: str, *before: Draft) -> None:
    """Pause the run, in one batch with what is recorded before."""
    for command in ("bascule resume", "bascule log"):
        reason = reason.replace(f"{command} RUN", f"{command} {view.run}")
    data = RunPaused(reason=view.redaction.text(reason))
    draft = Draft(subject=subjects.run_paused(view.run, view.state.pauses + 1), step=0, data=data)
    view.logger.warning("run.paused", reason=reason)
    *_, recorded = await view.append(NAME, [*before, draft])
    await view.until(lambda s: s.seq >= recorded.seq)


def _missing(world: World) -> str | None:
    """What the policy's or the author's calls need and this machine lacks; None if there is nothing."""
    machines: Sequence[object] = (world.policy, *([world.author] if "harness" in world.config.levers else []))
    for machine in machines:
        if isinstance(machine, ChecksReady):
            try:
                machine.ready()
            except ModelError as error:
                return str(error)
    return None


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


async def _asked_of(world: World, session: str, call: Call) -> Performed:
    """What the machine itself makes of its call."""
    machine = world.policy if session.endswith("-policy") else world.author
    if not isinstance(machine, Performer):
        raise ConfigError(
            f"{machine.name} asks for a call and cannot make one.", next_step="Choose another policy or author."
        )
    return await machine.perform(call)
