"""The trainer's effects without a model: what it refuses, what it says then, and what it hands to the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.policy import PolicyInput
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View
from bascule.runtime.services import feedback, trainer
from bascule.runtime.state import RunState
from bascule.runtime.world import World
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import ConfigError, Corrupt
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.trajectory import Note, Scored, Trajectory, Unscored, pack_floats
from tests.runtime.training import ONE, RUN, WIN, Backend, asked, call, group, outcome, output, recorded


@pytest.fixture
def view(make_view: Callable[[MemoryLog], View], started_log: MemoryLog) -> View:
    return make_view(started_log)


async def test_a_job_that_does_not_open_fails_once_instead_of_starting_for_ever(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(opens="The parent adapter has another rank."))
    assert isinstance(failed, ev.TrainFailed)
    assert "another rank" in failed.reason
    assert await recorded(view, ev.TrainStarted) == 1


async def test_infeasible_data_are_refused_before_a_model_is_opened(view: View) -> None:
    await asked(view, [(ONE, Scored(reward=0.0, passed=False)), (ONE, Unscored(reason="it broke"))])
    backend = Backend()
    failed = await outcome(view, backend)
    assert isinstance(failed, ev.TrainFailed)
    assert "best_of_n cannot train" in failed.reason
    assert "winners: none of 1 samples passed" in failed.reason
    assert failed.figures == {"groups": 1, "samples": 2, "scored": 1}
    assert backend.opened == 0


async def test_a_failed_update_records_its_figures_that_are_numbers(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(updates="The sampler is far away."))
    assert isinstance(failed, ev.TrainFailed)
    assert failed.figures == {"kl": 0.75}


async def test_an_adapter_is_published_with_its_data_its_metrics_and_its_base(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    checkpoint = await outcome(view, Backend(), "checkpointed-i000")
    assert isinstance(checkpoint, ev.AdapterCheckpointed)
    assert checkpoint.metrics == {"reward": 1.0, "loss": 0.5}
    state = RunState(run=RUN)
    async for event in view.log.read(f"bascule.{RUN}.>"):
        state.apply(event)
    event = await view.log.get(subjects.adapter_checkpointed(RUN, 1, 0))
    assert event is not None
    for base in ("", "b" * 64):
        held = msgspec.structs.replace(event, data=msgspec.structs.replace(checkpoint, base=base))
        published = trainer.decide(state, held, view.world)[0].data
        assert isinstance(published, ev.AdapterPublished)
        filled = {"data_digest": checkpoint.data_digest, "metrics": checkpoint.metrics, "base": base}
        wanted = filled if base else {"data_digest": "", "metrics": {}, "base": ""}
        assert {name: getattr(published, name) for name in wanted} == wanted


async def test_an_update_tells_how_it_goes_on_and_nothing_that_is_no_number(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    await outcome(view, Backend(), "checkpointed-i000")
    (line,) = [line async for line in view.log.telemetry.read(RUN)]
    assert (line.subject, line.attempt, line.iteration) == ("bascule-telemetry.small.train.g01.step", 1, 0)
    assert line.figures == {"loss": 0.5}


async def test_a_missing_trajectory_fails_the_job_by_name(view: View) -> None:
    refs = await asked(view, [(ONE, WIN), (Trajectory(answer="x"), WIN)], blobs=True)
    await view.blobs.discard(refs[1])
    backend = Backend()
    failed = await outcome(view, backend)
    assert isinstance(failed, ev.TrainFailed)
    assert "The trajectory g00-train-0000-n1 is gone" in failed.reason
    assert backend.opened == 0


async def test_an_altered_trajectory_stops_the_service_by_name_and_records_nothing(view: View, tmp_path: Path) -> None:
    refs = await asked(view, [(ONE, WIN), (Trajectory(answer="x"), WIN)], blobs=True)
    (path,) = (tmp_path / "blobs").rglob(refs[0].sha256)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Corrupt, match="The trajectory g00-train-0000-n0 is altered"):
        await outcome(view, Backend())
    assert await recorded(view, ev.TrainFailed) == 0


async def test_the_algorithm_sees_every_sampled_output_as_a_turn(view: View) -> None:
    nan = pack_floats([float("nan")])
    steps = (
        call(output(1, 2), output(3, finish_reason="length")),
        Note(text="between"),
        call(output(4, logprobs=nan)),
        call(output(5, logprobs=b"")),
    )
    verdict = Scored(reward=1.0, passed=True, steps=(0.25, 0.5, 0.0))
    await asked(view, [(Trajectory(steps=steps), verdict), (ONE, Unscored(reason="it broke"))])
    backend = Backend()
    await outcome(view, backend, "checkpointed-i000")
    (group,) = backend.groups
    first, second = group.samples
    assert (group.example, first.trajectory, first.reward, first.tokens) == ("a", "g00-train-0000-n0", 1.0, 5)
    assert [t.token_ids for t in first.turns] == [(1, 2), (3,), (4,), (5,)]
    assert [t.behaviour for t in first.turns] == [(-0.5, -0.5), (-0.5,), (), ()]
    assert [t.truncated for t in first.turns] == [False, True, False, False]
    assert [t.reward for t in first.turns] == [None, 0.25, 0.5, 0.0]
    assert (second.reward, second.passed, second.tokens) == (None, None, 2)
    assert [t.reward for t in second.turns] == [None]


async def test_step_rewards_that_are_not_one_a_call_fail_the_job(view: View) -> None:
    await asked(view, [(ONE, Scored(reward=1.0, passed=True, steps=(0.5, 0.5)))])
    failed = await outcome(view, Backend())
    assert isinstance(failed, ev.TrainFailed)
    assert "g00-train-0000-n0 has 2 step rewards" in failed.reason


@pytest.mark.parametrize("dull", [0, 1])
async def test_only_the_first_batch_of_a_job_has_to_be_feasible(view: View, dull: int) -> None:
    """A later one may say nothing: the job goes on with the next."""
    lose = Scored(reward=0.0, passed=False)
    for iteration in (0, 1):
        await group(view, f"g01-i{iteration:03d}", [(ONE, WIN), (ONE, WIN if iteration == dull else lose)])
    await asked(view, [(ONE, WIN)], algorithm="grpo", iterations=2, logged=None)
    found = await outcome(view, Backend(), "outcome" if dull == 0 else "checkpointed-i001")
    assert isinstance(found, ev.TrainFailed) == (dull == 0)


@pytest.mark.parametrize(("start_from", "adapter"), [("promoted", "g01-i002"), ("base", None), (None, "g01-i002")])
def test_a_job_starts_from_the_promoted_adapter_or_from_the_base(start_from: str | None, adapter: str | None) -> None:
    draft = requested({} if start_from is None else {"start_from": start_from})
    assert isinstance(draft.data, ev.TrainRequested)
    assert draft.data.adapter == adapter


def test_a_job_starts_from_nothing_else() -> None:
    with pytest.raises(ConfigError, match="'elsewhere'"):
        requested({"start_from": "elsewhere"})


def requested(params: dict[str, Any]) -> Draft:
    """The training job that follows from a choice of weights."""
    world = World(plugins(), RunConfig(task=PluginChoice(name="arith")))
    state = RunState(run=RUN)
    state.step(1).candidate = ev.CandidateProposed(generation=1, harness="h", adapter="g01-i002")
    given = PolicyInput(
        generation=2, max_generations=3, levers=("weights",), history=(), best=1, algorithms=world.algorithms
    )
    decision = LeverDecision(lever="weights", algorithm="grpo", params=params)
    return feedback._train(state, world, 2, given, decision, "cause")
