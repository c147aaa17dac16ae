"""What was spent, by events made by hand: each figure once, under its generation, its lever and its service."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import msgspec
import pytest

from bascule.runtime.audit.cost import budget_rows, cost_report
from bascule.runtime.metering import Meter
from bascule.runtime.services import budgets
from bascule.runtime.spending import Spent, dollars, gpus_of, unpriced
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.budget import Bounds, BudgetConfig, MachinePrice, Price
from bascule.schemas.codec import decode, encode
from bascule.schemas.envelope import Draft, Producer, Recorded
from bascule.schemas.landscape import Measured, WorkMeasured
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.trajectory import Sampling, Scored

RUN = "small"
CONFIG = RunConfig(
    task=PluginChoice(name="arith"),
    model="own",
    budget=BudgetConfig(tokens=100, dollars=1.0, levers={"weights": Bounds(gpu_seconds=10.0)}),
    prices={"claude": Price(input=4.0, output=20.0, cache_read=0.4), "own": Price(input=1.0, output=2.0)},
    machine=MachinePrice(gpu_hour=3.6, cpu_hour=0.36),
)
BLOB = ev.BlobRef(sha256="0" * 64, size=1)


def folded(*given: tuple[str, int, ev.Data], config: RunConfig = CONFIG) -> RunState:
    """The state after a start and these events: subject, generation, data."""
    started = ev.RunStarted(
        config=config, task_version="1", task_digest="", train=8, dev=8, sealed=8, model_digest="", plugins=()
    )
    events = [(subjects.run_started(RUN), 0, started), *given]
    return RunState.of(RUN, [recorded(seq, *event) for seq, event in enumerate(events, 1)])


def recorded(seq: int, subject: str, step: int, data: ev.Data) -> Recorded:
    producer = Producer(service="meta", version="1", hash="0")
    draft = Draft(subject=subject, step=step, data=data)
    payload = encode(draft, run=RUN, producer=producer, time="2026-01-01T00:00:00Z", root=None)
    return decode(seq, subject, payload)


def chosen(generation: int, lever: str) -> tuple[str, int, ev.Data]:
    data = ev.LeverChosen(
        generation=generation, lever=lever, algorithm=None, params={}, parent=0, policy="rules", policy_version="1",
        reasons=(), options=(), evidence=(),
    )  # type: ignore[arg-type]  # fmt: skip
    return subjects.lever_chosen(RUN, generation), generation, data


def requested(name: str, generation: int, purpose: str = "gate") -> tuple[str, int, ev.Data]:
    data = ev.EpisodesRequested(
        evaluation=name, purpose=purpose, generation=generation, split="dev", shard=0, shards=1, positions=(0, 1),
        examples=("a", "b"), samples=1, sampling=Sampling(), seed=1, harness="h",
    )  # type: ignore[arg-type]  # fmt: skip
    return subjects.episodes_requested(RUN, name, 0), generation, data


def logged(name: str, position: int, measured: WorkMeasured) -> tuple[str, int, ev.Data]:
    trajectory = subjects.trajectory_id(name, position, 0)
    data = ev.TrajectoryLogged(
        trajectory=trajectory, evaluation=name, example="a", position=position, sample=0, answer="7", error=None,
        prompt_tokens=10, output_tokens=3, measured=measured,
    )  # fmt: skip
    return subjects.trajectory_logged(RUN, trajectory), 0, data


def scored(name: str, position: int, share: float) -> tuple[str, int, ev.Data]:
    trajectory = subjects.trajectory_id(name, position, 0)
    data = ev.TrajectoryScored(
        trajectory=trajectory, evaluation=name, position=position, sample=0, verdict=Scored(reward=1.0),
        measured=WorkMeasured(seconds=9.0, share=share),
    )  # fmt: skip
    return subjects.trajectory_scored(RUN, trajectory), 0, data


def job(generation: int, seconds: float, versions: dict[str, str], updates: int = 1) -> list[tuple[str, int, ev.Data]]:
    asked = ev.TrainRequested(
        generation=generation, algorithm="grpo", algorithm_version="1", params={}, iterations=3, groups=1, samples=1,
        temperature=1.0, parent=0, harness="h",
    )  # fmt: skip
    begun = ev.TrainStarted(generation=generation, attempt=1, resumed_after=0, threads=1, versions=versions)
    checkpoints = [
        ev.AdapterCheckpointed(
            generation=generation, iteration=i, attempt=1, adapter=f"g{generation:02d}-i{i:03d}", files={"a": BLOB},
            sha256="", state=BLOB, data_digest="", metrics={}, measured=Measured(seconds=seconds),
        )
        for i in range(updates)
    ]  # fmt: skip
    return [
        (subjects.train_requested(RUN, generation), generation, asked),
        (subjects.train_started(RUN, generation, 1), generation, begun),
        *((subjects.adapter_checkpointed(RUN, generation, c.iteration), generation, c) for c in checkpoints),
    ]


def called(ordinal: int, session: str = "g01-author") -> tuple[str, int, ev.Data]:
    data = ev.ModelCalled(
        session=session, ordinal=ordinal, model="claude", request={}, answer={}, input_tokens=100, output_tokens=50,
        cache_read_tokens=1000, cache_write_tokens=200, measured=Measured(seconds=2.0),
    )  # fmt: skip
    return subjects.call_outcome(RUN, session, ordinal), int(session[1:3]), data


GPU = WorkMeasured(seconds=4.0, share=0.5, device="cuda")
CPU = WorkMeasured(seconds=4.0, share=0.25, device="cpu")


def test_work_is_put_down_to_its_generation_its_lever_and_its_service() -> None:
    tried = ev.ToolCalled(
        session="g01-author", ordinal=1, name="trial", arguments={}, result="{}",
        measured=WorkMeasured(seconds=3.0, device="cuda"),
        trial=ev.TrialCost(rollouts=5, prompt_tokens=50, output_tokens=20),
    )  # fmt: skip
    state = folded(
        requested("g00-dev", 0),
        logged("g00-dev", 0, CPU),
        scored("g00-dev", 0, 0.125),
        called(0, "g01-policy"),
        chosen(1, "harness"),
        called(0),
        (subjects.call_outcome(RUN, "g01-author", 1), 1, tried),
        chosen(2, "weights"),
        *job(2, 1.5, {"device": "NVIDIA H200", "processes": "4"}, updates=2),
        requested("g02-dev", 2),
        logged("g02-dev", 0, GPU),
        logged("g02-dev", 1, GPU),
        chosen(3, "stop"),
        requested("g02-sealed", 2, "report"),
        logged("g02-sealed", 0, CPU),
        requested("abl-constant", 2, "ablation"),
        logged("abl-constant", 0, CPU),
    )
    s = state.spending
    assert list(s) == [
        (0, None, "rollout"), (0, None, "verifier"), (1, None, "feedback"), (1, "harness", "feedback"),
        (2, "weights", "trainer"), (2, "weights", "rollout"), (3, "stop", "rollout"), (2, "ablation", "rollout"),
    ]  # fmt: skip
    assert s[0, None, "rollout"] == Spent(rollouts=1, prompt_tokens=10, output_tokens=3, seconds=0.25, cpu_seconds=0.25)
    assert s[0, None, "verifier"] == Spent(seconds=0.125, cpu_seconds=0.125)
    author = s[1, "harness", "feedback"]
    assert (author.calls, author.rollouts, author.tokens, author.seconds, author.gpu_seconds) == (
        1,
        5,
        70 + 1350,
        5.0,
        3.0,
    )
    assert s[2, "weights", "trainer"] == Spent(seconds=3.0, gpu_seconds=12.0)
    assert s[2, "weights", "rollout"].gpu_seconds == 1.0
    assert budgets.spent(state) == {
        "generations": 2, "rollouts": 8, "tokens": 13 + 70 + 26 + 2 * 1350, "seconds": 0.375 + 2.0 + 5.0 + 3.0 + 1.0,
        "gpu_seconds": 16.0, "dollars": pytest.approx(budgets.spent(state)["dollars"]),
    }  # fmt: skip
    assert budgets.spent(state, "weights")["gpu_seconds"] == 13.0
    assert budgets.spent(state, "harness")["rollouts"] == 5


def test_a_dollar_is_what_tokens_and_machines_cost_by_the_given_prices() -> None:
    state = folded(chosen(1, "harness"), called(0))
    (spent,) = state.spending.values()
    # 100 + 200 written at 4, 1,000 read at 0.4 and 50 at 20 dollars a million; 2 s at 0.36 dollars an hour.
    assert dollars(spent, CONFIG) == pytest.approx((300 * 4 + 1000 * 0.4 + 50 * 20) / 1e6 + 2 * 0.36 / 3600)
    state = folded(requested("g00-dev", 0), logged("g00-dev", 0, GPU))
    (spent,) = state.spending.values()
    assert dollars(spent, CONFIG) == pytest.approx((10 * 1 + 3 * 2) / 1e6 + 0.5 * 3.6 / 3600)


@pytest.mark.parametrize(
    ("engine", "params", "target"),
    [
        ("anthropic", {}, "own"),
        ("anthropic", {"model": "x"}, "x"),
        ("openai", {}, "own"),
        ("openai", {"model": "x"}, "x"),
    ],
)
def test_the_tokens_of_a_model_behind_an_endpoint_cost_its_price(
    engine: str, params: dict[str, str], target: str
) -> None:
    config = RunConfig(
        task=PluginChoice(name="arith"),
        model="own",
        engine=PluginChoice(name=engine, params=params),
        prices={target: Price(input=5.0, output=25.0)},
        machine=MachinePrice(gpu_hour=0.0, cpu_hour=0.0),
    )
    state = folded(requested("g00-dev", 0), logged("g00-dev", 0, WorkMeasured(seconds=1.0)), config=config)
    (spent,) = state.spending.values()
    assert dollars(spent, config) == pytest.approx((10 * 5 + 3 * 25) / 1e6)
    assert unpriced(spent, config) == ()
    assert unpriced(spent, msgspec.structs.replace(config, prices={})) == (target,)


def test_spending_knows_models_without_the_packages_that_ask_or_compute_them() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'anthropic', 'openai', 'httpx'}"
    code = f"import sys, bascule.runtime.spending; print(*({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "\n")


def test_what_has_no_price_is_named_and_not_taken_for_free() -> None:
    config = RunConfig(task=PluginChoice(name="arith"), machine=MachinePrice(gpu_hour=1.0))
    state = folded(chosen(1, "harness"), called(0), config=config)
    (spent,) = state.spending.values()
    assert unpriced(spent, config) == ("claude", "cpu_hour")
    found = cost_report(state)
    assert found.unpriced == ("claude", "cpu_hour")
    assert (found.total.dollars, found.feedback.calls, found.feedback.cache_read_tokens) == (None, 1, 1000)


def test_what_earlier_code_did_not_record_is_said() -> None:
    failed = ev.TrainFailed(generation=1, attempt=1, reason="r")
    state = folded(
        requested("g00-dev", 0),
        logged("g00-dev", 0, WorkMeasured(seconds=4.0)),
        chosen(1, "weights"),
        *job(1, 1.5, {}),
        (subjects.train_outcome(RUN, 1), 1, failed),
    )
    found = cost_report(state)
    rollout, trainer = found.rows
    assert (rollout.seconds, rollout.gpu_seconds, rollout.rollouts) == (None, None, 1)
    assert (trainer.seconds, trainer.gpu_seconds, trainer.partial) == (1.5, None, True)
    assert len(found.lacks) == 2
    assert "2 episodes, scores and failed updates" in found.lacks[0]
    assert "took 4.0 s" in found.lacks[0]


def test_an_episode_that_nobody_asked_for_costs_nothing() -> None:
    assert folded(logged("g09-dev", 0, CPU)).spending == {}


@pytest.mark.parametrize(
    ("versions", "gpus"),
    [({}, None), ({"device": "cpu AVX512"}, 0), ({"device": "H200"}, 1), ({"device": "H200", "processes": "8"}, 8)],
)
def test_the_gpus_of_a_trainer_are_its_processes_where_its_device_is_one(
    versions: dict[str, str], gpus: int | None
) -> None:
    assert gpus_of(versions) == gpus


def test_budgets_and_what_is_left_of_them() -> None:
    state = folded(
        requested("g00-dev", 0), logged("g00-dev", 0, CPU), chosen(1, "weights"), *job(1, 12.0, {"device": "H200"})
    )
    rows = {(r.lever, r.name): (r.spent, r.bound, r.left) for r in budget_rows(state)}
    assert rows[None, "tokens"] == (13, 100, 87)
    assert rows["weights", "gpu_seconds"] == (12.0, 10.0, 0)
    left = budgets.left(state)
    assert (left.tokens, left.rollouts, left.levers["weights"].gpu_seconds) == (87, None, 0)
    assert budgets.spent_levers(state) == {"weights": "budget of weights: 12.0 of 10.0 GPU seconds spent"}


def test_shares_of_a_workers_time_add_up_to_the_time_in_which_it_worked() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    with meter.share() as first:
        now = 4.0
        with meter.share() as second:
            now = 6.0
    now = 100.0  # nothing was under way
    with suppress(ValueError), meter.share() as third:
        now = 101.0
        raise ValueError
    assert (first.seconds, second.seconds, third.seconds) == (5.0, 1.0, 1.0)
