"""Runs with a budget: they stop cleanly at it, a replay finds the same, and what cannot be held is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.policy import (
    TRIAL,
    AuthorInput,
    CallModel,
    CallResult,
    CallTool,
    HarnessEdit,
    Performed,
    PolicyInput,
)  # fmt: skip
from bascule.runtime.audit.cost import cost_report
from bascule.runtime.audit.explain import Explainer
from bascule.runtime.audit.replay import replay
from bascule.runtime.audit.report import report
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services import budgets, trainer
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.runtime.world import merged
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.budget import Bounds, BudgetConfig
from bascule.schemas.codec import decision_hash
from bascule.schemas.decision import LeverDecision, Option
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import Harness
from bascule.schemas.run import parse_config
from tests.runtime.conftest import RUN, SMALL
from tests.runtime.test_spending import chosen, folded, job, requested

Make = Callable[[MemoryLog], View]
#: Episodes of a generation of the small run: dev, and train.
EACH = 20 + 4 * 2


class Plain:
    """An author of one edit after the other, which tries none of them."""

    name, version = "operators", "1"

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> HarnessEdit:
        prompt = f"Answer. This is edit {given.generation}."
        return HarnessEdit(files={**given.harness.files, "system_prompt.md": prompt}, edit=f"e{given.generation}")

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        return None


@pytest.fixture(autouse=True)
def author(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins().registry.authors.items, "operators", lambda _: Plain())


async def started(make_view: Make, *settings: str) -> MemoryLog:
    log = MemoryLog()
    first = preflight(configure(SMALL, settings, plugins()), plugins())
    await make_view(log).append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=first)])
    return log


async def finish(make_view: Make, log: MemoryLog) -> list[Recorded]:
    await serve(make_view(log), list(SERVICES.values()))
    return [e async for e in log.read(f"bascule.{RUN}.>")]


def stop_of(events: list[Recorded]) -> ev.LeverChosen:
    return [e.data for e in events if isinstance(e.data, ev.LeverChosen)][-1]


@pytest.mark.parametrize(
    ("setting", "generations", "reason"),
    [
        ("budget.rollouts=50", 2, "budget: 56 of 50 rollouts spent"),
        ("budget.rollouts=0", 1, "budget: 28 of 0 rollouts spent"),
        ("budget.generations=1", 2, "budget: 1 of 1 generations spent"),
        ("budget.levers.harness.rollouts=28", 2, "budget of harness: 28 of 28 rollouts spent"),
        ("budget.rollouts=1000", 3, "all 2 generations are used"),
    ],
)
async def test_a_run_stops_at_its_budget_scores_the_sealed_split_and_replays_equal(
    make_view: Make, setting: str, generations: int, reason: str
) -> None:
    events = await finish(make_view, await started(make_view, setting))
    stop = stop_of(events)
    assert (stop.lever, stop.generation, stop.reasons) == ("stop", generations, (reason,))
    result = report(events)
    assert result.status == "completed"
    assert result.reason == reason
    assert result.sealed is not None
    assert replay(RUN, events, plugins()).differences == ()
    (row,) = result.budget
    assert row.left == max(row.bound - row.spent, 0)
    if reason.startswith("budget:"):
        (evidence,) = stop.evidence
        assert (stop.policy, evidence.value, evidence.event) == (
            "budget", row.spent, f"candidate.g{generations - 1:02d}.gate",
        )  # fmt: skip


async def test_seconds_and_dollars_bound_a_run_as_well_and_every_episode_has_its_share(make_view: Make) -> None:
    prices = ("machine.cpu_hour=3600", "machine.gpu_hour=0")
    log = await started(make_view, "budget.seconds=1e-9", "budget.dollars=1e-9", *prices)
    events = await finish(make_view, log)
    assert stop_of(events).reasons[0].startswith("budget: ")
    assert "seconds" in stop_of(events).reasons[0]
    assert "dollars spent" in stop_of(events).reasons[0]
    assert replay(RUN, events, plugins()).differences == ()
    found = cost_report(RunState.of(RUN, events))
    assert found.lacks == found.unpriced == ()
    assert found.total.dollars == pytest.approx(found.total.seconds)
    assert {r.part for r in found.rows} == {None, "stop"}
    assert sum(r.rollouts for r in found.rows) == found.total.rollouts == EACH + 20
    assert (found.loop.rollouts, found.feedback.calls) == (EACH, 0)
    assert all(e.data.measured.share is not None for e in events if isinstance(e.data, ev.TrajectoryLogged))
    # Many episodes were under way at once, and their worker's time counts once.
    episodes = [e.data.measured for e in events if isinstance(e.data, ev.TrajectoryLogged)]
    assert sum(m.share or 0.0 for m in episodes) < sum(m.seconds for m in episodes)


async def test_a_run_under_a_budget_that_is_stopped_anywhere_decides_the_same(make_view: Make) -> None:
    setting = "budget.rollouts=50"
    whole = await finish(make_view, await started(make_view, setting))
    log = await started(make_view, setting)
    for target in range(10, len(whole) - 5, len(whole) // 8):
        view = make_view(log)
        reached = asyncio.Event()
        view.listeners.append(lambda e, t=target, r=reached: r.set() if e.seq >= t else None)
        task = asyncio.create_task(serve(view, list(SERVICES.values())))
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    events = await finish(make_view, log)
    assert decision_hash(events) == decision_hash(whole)
    assert stop_of(events).reasons == ("budget: 56 of 50 rollouts spent",)


async def test_the_explanation_of_a_stop_says_what_was_spent_then(make_view: Make) -> None:
    events = await finish(make_view, await started(make_view, "budget.rollouts=50"))
    explainer = Explainer(RUN, "1")
    for event in events:
        explainer.add(event)
    (row,) = explainer.result().budget
    assert (row.name, row.spent, row.left) == ("rollouts", 28, 22)


class Stubborn:
    """A policy that always edits, and says so of both levers, whatever it is offered."""

    name, version = "stubborn", "1"

    def __init__(self) -> None:
        self.seen: list[PolicyInput] = []

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> LeverDecision:
        self.seen.append(given)
        options = (Option(lever="harness", score=1.0), Option(lever="weights", algorithm="grpo", score=0.5))
        return LeverDecision(lever="harness", reasons=("as always",), options=options)


async def test_a_lever_whose_budget_is_spent_is_not_offered_and_cannot_be_chosen(
    make_view: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Stubborn()
    monkeypatch.setitem(plugins().registry.policies.items, "rules", lambda _: policy)
    settings = ('levers=["harness","weights"]', "budget.levers.harness.rollouts=20", "budget.rollouts=500")
    events = await finish(make_view, await started(make_view, *settings))
    assert [(g.generation, g.levers) for g in {x.generation: x for x in policy.seen}.values()] == [
        (1, ("harness", "weights")), (2, ("weights",)),
    ]  # fmt: skip
    assert policy.seen[0].budget_left == BudgetConfig(rollouts=500 - EACH, levers={"harness": Bounds(rollouts=20)})
    assert policy.seen[-1].budget_left.levers["harness"].rollouts == 0
    stop = stop_of(events)
    spent = "budget of harness: 28 of 20 rollouts spent"
    assert (stop.lever, stop.policy) == ("stop", "stubborn")
    assert stop.reasons == (f"{spent}, and harness is what the policy chose", "as always")
    assert stop.options == (
        Option(lever="harness", feasible=False, reasons=(spent,)),
        Option(lever="weights", algorithm="grpo", score=0.5),
    )
    assert replay(RUN, events, plugins()).differences == ()


class Trying(Plain):
    """An author that would try harnesses for ever."""

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> Any:
        return CallTool(name=TRIAL, arguments={"files": {}, "positions": [0, 1, 2], "samples": 1})


@pytest.mark.parametrize("setting", ["budget.rollouts=34", "budget.levers.harness.rollouts=6"])
async def test_the_trials_of_an_author_count_and_end_with_the_budget(
    make_view: Make, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setitem(plugins().registry.authors.items, "operators", lambda _: Trying())
    events = await finish(make_view, await started(make_view, setting))
    tried = [e.data.trial for e in events if isinstance(e.data, ev.ToolCalled)]
    assert [t.rollouts for t in tried if t is not None] == [3, 3]
    (failed,) = [e.data for e in events if isinstance(e.data, ev.AuthorFailed)]
    assert failed.reason.endswith("rollouts spent, before the author had an edit")
    assert stop_of(events).generation == 2
    assert report(events).status == "completed"
    assert replay(RUN, events, plugins()).differences == ()


def checkpoints(updates: int, **budget: Any) -> tuple[RunState, Recorded]:
    """A job of three updates of 4 GPU seconds, of which some are done, under a budget; and its newest event."""
    config = parse_config(merged({"task": {"name": "arith"}}, {"budget": budget}))
    state = folded(
        requested("g00-dev", 0), chosen(1, "weights"), *job(1, 4.0, {"device": "H200"}, updates), config=config
    )
    from tests.runtime.test_spending import recorded

    subject, step, data = job(1, 4.0, {"device": "H200"}, updates)[-1]
    return state, recorded(state.seq + 1, subject, step, data)


@pytest.mark.parametrize(
    ("budget", "updates"),
    [
        ({}, 3),
        ({"gpu_seconds": 9.0}, 3),
        ({"gpu_seconds": 8.0}, 2),
        ({"gpu_seconds": 0.0}, 1),
        ({"levers": {"weights": {"seconds": 5.0}}}, 2),
        ({"levers": {"harness": {"seconds": 0.0}}}, 3),
        ({"generations": 1}, 3),
    ],
)
def test_a_training_job_begins_no_update_over_its_budget_and_publishes_what_it_has(
    make_view: Make, budget: dict[str, Any], updates: int
) -> None:
    world = _world()
    for done in range(1, updates):
        state, event = checkpoints(done, **budget)
        asked = trainer.decide(state, event, world)
        assert {d.data.TYPE for d in asked} == {"bascule.episodes.requested"}
    state, event = checkpoints(updates, **budget)
    published = trainer.decide(state, event, world)[0].data
    assert isinstance(published, ev.AdapterPublished)
    assert (published.iterations, published.adapter) == (updates, f"g01-i{updates - 1:03d}")


def _world() -> Any:
    from bascule.runtime.world import World

    return World(plugins(), parse_config(SMALL))


def test_an_unknown_name_in_a_budget_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no 'budget\.tokes'\. It has levers|no 'budget\.tokes'") as refused:
        configure(SMALL, ["budget.tokes=5"], plugins())
    assert "tokens" in str(refused.value.next_step)
    with pytest.raises(ConfigError, match=r"no 'budget\.levers\.harness\.tokes'"):
        configure(SMALL, ["budget.levers.harness.tokes=5"], plugins())
    with pytest.raises(ConfigError, match=r"no 'prices\.m\.inptu'"):
        configure(SMALL, ['prices={"m": {"input": 1, "output": 2, "inptu": 3}}'], plugins())
    for wrong in ("budget.tokens=-1", "budget.tokens=many", "budget.levers.harnes.tokens=1", "machine.gpu_hour=-1"):
        with pytest.raises(ConfigError, match="is not valid"):
            configure(SMALL, [wrong], plugins())


def test_dollars_without_prices_are_refused_before_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"machine\.gpu_hour has no price"):
        preflight(configure(SMALL, ["budget.dollars=1"], plugins()), plugins())
    with pytest.raises(ConfigError, match=r"machine\.cpu_hour has no price"):
        preflight(configure(SMALL, ["budget.levers.harness.dollars=1", "machine.gpu_hour=0"], plugins()), plugins())
    machine = ["budget.dollars=1", "machine.gpu_hour=2.5", "machine.cpu_hour=0"]
    assert preflight(configure(SMALL, machine, plugins()), plugins()).config.budget.dollars == 1.0
    remote = ["engine.name=openai", "engine.params.model=behind", 'levers=["harness"]']
    with pytest.raises(ConfigError, match="the model 'behind' has no price"):
        preflight(configure(SMALL, [*machine, *remote], plugins()), plugins())
    caller = Caller()
    monkeypatch.setitem(plugins().registry.policies.items, "rules", lambda _: caller)
    with pytest.raises(ConfigError, match="the model 'claude' has no price"):
        preflight(configure(SMALL, machine, plugins()), plugins())
    priced = [*machine, 'prices={"claude": {"input": 5, "output": 25}}']
    assert preflight(configure(SMALL, priced, plugins()), plugins())


class Caller:
    """A policy that says which model it calls, and calls another one as well."""

    name, version = "caller", "1"
    models = ("claude",)

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> CallModel:
        return CallModel(model=("claude", "other")[len(results) % 2], request={})

    async def perform(self, call: Any) -> Performed:
        return Performed(answer={}, input_tokens=1_000_000, output_tokens=0)


@pytest.mark.parametrize(("dollars", "calls"), [(5, 1), (8, 1)])
async def test_a_policy_that_spends_the_dollars_itself_is_asked_no_more(
    make_view: Make, monkeypatch: pytest.MonkeyPatch, dollars: int, calls: int
) -> None:
    monkeypatch.setitem(plugins().registry.policies.items, "rules", lambda _: Caller())
    machine = ("machine.gpu_hour=0", "machine.cpu_hour=0", 'prices={"claude": {"input": 5, "output": 25}}')
    log = await started(make_view, f"budget.dollars={dollars}", *machine)
    events = await finish(make_view, log)
    if dollars > 5:  # what is asked next has no price, and nobody could hold the run to its budget
        assert "the model 'other' has no price" in (RunState.of(RUN, events).paused or "")
    else:
        assert stop_of(events).reasons == ("budget: 5.0000 of 5.0000 dollars spent",)
        assert replay(RUN, events, plugins()).differences == ()
        assert cost_report(RunState.of(RUN, events)).feedback.dollars == 5.0
    assert len([e for e in events if isinstance(e.data, ev.ModelCalled)]) == calls


def test_a_run_without_a_budget_is_bounded_by_nothing() -> None:
    state = folded(requested("g00-dev", 0), chosen(1, "harness"), config=parse_config(SMALL))
    assert budgets.stop(state, "") is None
    assert budgets.spent_levers(state) == {}
    assert budgets.left(state) == BudgetConfig()
    assert not budgets.over(state, "weights")
