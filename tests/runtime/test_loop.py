"""The loop over the in-memory log: it ends, it survives being stopped anywhere, and it can be made again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec

from bascule.plugins.loader import plugins
from bascule.runtime.audit import replay as audit
from bascule.runtime.audit.ablation import ablation_report
from bascule.runtime.audit.report import report
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.runtime.runner import View, serve
from bascule.runtime.services import verifier
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.runtime.world import world_of
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.codec import decision_hash
from bascule.schemas.envelope import Draft, Recorded

Make = Callable[[MemoryLog], View]


async def run_to_end(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read("bascule.small.>")]


async def test_a_run_goes_from_its_start_to_the_sealed_report(make_view: Make, started_log: MemoryLog) -> None:
    events = await run_to_end(make_view, started_log)
    result = report(events)
    assert result.status == "completed"
    assert [g.lever for g in result.generations] == [None, "harness", "harness"]
    assert [g.promoted for g in result.generations] == [True, False, False]
    assert result.sealed is not None
    assert (result.sealed.before, result.sealed.n, result.sealed.p) == (result.sealed.after, 20, 1.0)
    assert len([e for e in events if isinstance(e.data, ev.LeverChosen)]) == 3


async def test_each_trajectory_is_logged_and_scored_once(make_view: Make, started_log: MemoryLog) -> None:
    events = await run_to_end(make_view, started_log)
    logged = [e.data.trajectory for e in events if isinstance(e.data, ev.TrajectoryLogged)]
    scored = [e.data.trajectory for e in events if isinstance(e.data, ev.TrajectoryScored)]
    assert len(logged) == 3 * (20 + 4 * 2) + 20
    assert sorted(logged) == sorted(scored) == sorted(set(logged))


async def test_replay_makes_every_decision_again(make_view: Make, started_log: MemoryLog) -> None:
    events = await run_to_end(make_view, started_log)
    result = audit.replay("small", events, plugins())
    assert result.decisions > 20
    assert result.differences == ()


async def test_replay_names_the_decision_that_a_changed_reward_leads_to(
    make_view: Make, started_log: MemoryLog
) -> None:
    events = await run_to_end(make_view, started_log)
    index, event = next(
        (i, e) for i, e in enumerate(events) if isinstance(e.data, ev.TrajectoryScored) and "g00-dev" in e.subject
    )
    assert isinstance(event.data, ev.TrajectoryScored)
    assert isinstance(event.data.verdict, ev.Verdict)
    flipped = msgspec.structs.replace(event.data.verdict, reward=1.0 - event.data.verdict.reward)
    events[index] = msgspec.structs.replace(event, data=msgspec.structs.replace(event.data, verdict=flipped))
    found = audit.replay("small", events, plugins()).differences
    assert found[0].subject == "bascule.small.eval.g00-dev.completed"
    assert found[0].path.startswith("$.landscape.")


async def test_stopping_the_services_anywhere_changes_no_decision(make_view: Make, started_log: MemoryLog) -> None:
    """Stopped at 12 random moments and started again on the same log, against one that nothing stopped."""
    whole = await run_to_end(make_view, started_log)
    log = MemoryLog()
    start = whole[0]
    await log.append([ev_as_new(start)])
    rng = random.Random(7)
    for target in sorted(rng.sample(range(2, len(whole) - 1), 12)):
        view = make_view(log)
        reached = asyncio.Event()
        view.listeners.append(lambda e, t=target, r=reached: r.set() if e.seq >= t else None)
        task = asyncio.create_task(serve(view, list(SERVICES.values())))
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    events = await run_to_end(make_view, log)
    assert decision_hash(events) == decision_hash(whole)
    assert sorted(subjects_of(events)) == sorted(subjects_of(whole))


def subjects_of(events: list[Recorded]) -> list[str]:
    """Of all events but the notary's, which are as many as there were processes."""
    return [e.subject for e in events if not isinstance(e.data, ev.LogCheckpointed)]


def ev_as_new(event: Recorded) -> NewEvent:
    return NewEvent(subject=event.subject, payload=event.payload)


async def test_the_fold_of_the_log_equals_the_live_state(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    await serve(view, list(SERVICES.values()))
    folded = RunState(run="small")
    async for event in started_log.read("bascule.small.>"):
        folded.apply(event)
        folded.apply(event)  # a duplicate changes nothing
    assert folded.digest() == view.state.digest()


async def test_no_dev_or_sealed_question_is_in_a_harness(make_view: Make, started_log: MemoryLog) -> None:
    """What a lever writes holds train items only."""
    events = await run_to_end(make_view, started_log)
    public = plugins().registry.tasks.get("arith")({}).public()
    hidden = {e.input["question"] for e in (*public.dev, *public.sealed)}
    written = [e.data for e in events if isinstance(e.data, ev.HarnessProposed)]
    assert len(written) == 3
    for harness in written:
        text = "\n".join(harness.files.values())
        assert not [q for q in hidden if f'"{q}"' in text]


async def test_the_gate_judges_whichever_evaluation_completes_last(make_view: Make, started_log: MemoryLog) -> None:
    """Both evaluations' last scores may be in the log before either completion is."""
    events = await run_to_end(make_view, started_log)
    completed = [e for e in events if isinstance(e.data, ev.EvaluationCompleted) and e.data.generation == 1]
    completed = [e for e in completed if e.data.purpose in ("gate", "landscape")]
    for order in (completed, completed[::-1]):
        state = RunState(run="small")
        world = None
        drafts = []
        before = [e for e in events if e.seq < min(c.seq for c in completed)]
        scores = [e for e in events if isinstance(e.data, ev.TrajectoryScored) and e.seq > before[-1].seq]
        scores = [e for e in scores if e.data.evaluation.startswith("g01-")]
        logs = [e for e in events if isinstance(e.data, ev.TrajectoryLogged) and e.seq > before[-1].seq]
        logs = [e for e in logs if e.data.evaluation.startswith("g01-")]
        for seq, event in enumerate([*before, *logs, *scores, *order], 1):
            moved = msgspec.structs.replace(event, seq=seq)
            state.apply(moved)
            world = world or world_of(plugins(), before[0].data)
            drafts = verifier.decide(state, moved, world)
        assert [d.data.TYPE for d in drafts] == ["bascule.candidate.rejected"]


async def test_a_cancelled_run_gets_no_more_events_and_replays_equal(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    view.listeners.append(lambda e: None)
    cancel = Draft(subject=subjects.run_end("small"), step=0, data=ev.RunCancelled(reason="enough"))
    await view.append("cli", [cancel])
    await serve(make_view(started_log), list(SERVICES.values()))
    events = [e async for e in started_log.read("bascule.small.>")]
    assert [type(e.data) for e in events] == [ev.RunStarted, ev.RunCancelled, ev.LogCheckpointed]
    assert audit.replay("small", events, plugins()).differences == ()


async def test_ablations_leave_the_report_and_the_decision_hash_as_they_were(
    make_view: Make, started_log: MemoryLog
) -> None:
    before = report(await run_to_end(make_view, started_log))
    for name, answer in (("constant", "9"),):
        data = ev.AblationRequested(name=name, arm="constant-engine", generation=0, answer=answer)
        draft = Draft(subject=subjects.ablation_requested("small", name), step=0, data=data)
        await make_view(started_log).append("cli", [draft])
    events = await run_to_end(make_view, started_log)
    after = report(events)
    assert (after.decision_hash, after.tokens, after.generations) == (
        before.decision_hash, before.tokens, before.generations,
    )  # fmt: skip
    rows = {r.arm: r for r in ablation_report(events, 0.05)}
    nines = sum(e.data.answer == "9" for e in events if isinstance(e.data, ev.TrajectoryLogged))
    assert nines == 20
    assert rows["constant-engine"].baseline == 0.05
    assert rows["whole"].score == before.sealed.after  # type: ignore[union-attr]


async def test_a_paused_run_is_let_go_and_ends_after_it_is_resumed(make_view: Make, started_log: MemoryLog) -> None:
    view = make_view(started_log)
    await view.append("cli", [Draft(subject=subjects.run_paused("small", 1), step=0, data=ev.RunPaused(reason="r"))])
    await serve(view, list(SERVICES.values()))
    assert view.state.paused == "r"
    assert view.state.end is None
    await view.append("cli", [Draft(subject=subjects.run_resumed("small", 1), step=0, data=ev.RunResumed())])
    events = await run_to_end(make_view, started_log)
    kinds = [type(e.data) for e in events]
    assert ev.TrajectoryLogged not in kinds[: kinds.index(ev.RunResumed)]
    assert ev.RunCompleted in kinds
