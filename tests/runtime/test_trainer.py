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
from bascule.runtime.training.backend import OtherInstallation, TorchBackend
from bascule.runtime.world import World
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Draft
from bascule.schemas.errors import ConfigError, Corrupt, LogUnavailable, OutOfStep
from bascule.schemas.landscape import Measured
from bascule.schemas.run import PluginChoice, RunConfig
from bascule.schemas.trajectory import Note, Scored, Trajectory, Unscored, pack_floats
from bascule.trainers.base_model import model_digest
from tests.runtime.training import NAME, ONE, RUN, WIN, Backend, asked, call, group, outcome, output, recorded
from tests.tiny_model import make_tiny_model

VERSION = plugins().registry.algorithms.get("best_of_n").version


@pytest.fixture
def view(make_view: Callable[[MemoryLog], View], started_log: MemoryLog) -> View:
    return make_view(started_log)


async def test_a_job_that_does_not_open_fails_once_instead_of_starting_for_ever(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(opens="The parent adapter has another rank."))
    assert isinstance(failed, ev.TrainFailed)
    assert "another rank" in failed.reason
    assert await recorded(view, ev.TrainStarted) == 1


@pytest.mark.parametrize(
    "error", [KeyError("g00-train-0000-n0"), ConfigError("no such target"), MemoryError("no room"), OSError("gone")]
)
@pytest.mark.parametrize("where", ["opens", "updates"])
async def test_whatever_goes_wrong_in_a_job_fails_it_by_name_and_not_the_service(
    view: View, error: Exception, where: str
) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(**{where: error}))  # type: ignore[arg-type]
    assert isinstance(failed, ev.TrainFailed)
    assert f"best_of_n {VERSION} failed with {type(error).__name__}: {error}." in failed.reason
    assert await recorded(view, ev.TrainStarted) == 1


async def test_an_algorithm_that_cannot_read_its_parameters_fails_its_job(view: View) -> None:
    await asked(view, [(ONE, WIN)], params={"keep": "many"})
    failed = await outcome(view, Backend())
    assert isinstance(failed, ev.TrainFailed)
    assert f"best_of_n {VERSION} failed with ConfigError" in failed.reason


@pytest.mark.parametrize("error", [Corrupt("altered"), LogUnavailable("away"), OutOfStep("another ended")])
async def test_what_no_job_is_to_blame_for_stops_the_service(view: View, error: Exception) -> None:
    await asked(view, [(ONE, WIN)])
    with pytest.raises(type(error)):
        await outcome(view, Backend(updates=error))
    assert await recorded(view, ev.TrainFailed) == 0


async def test_another_base_model_stops_the_service_before_an_attempt_is_recorded(view: View) -> None:
    await asked(view, [(ONE, WIN)])
    with pytest.raises(ConfigError, match="not the one that the run started with"):
        await outcome(view, Backend(lacks="The model is not the one that the run started with."))
    assert await recorded(view, ev.TrainStarted) == await recorded(view, ev.TrainFailed) == 0


def test_the_base_model_is_held_against_the_one_that_is_recorded(view: View, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    started = ev.RunStarted(
        config=RunConfig(task=PluginChoice(name="arith"), model=str(folder)), task_version="1", task_digest="",
        train=1, dev=1, sealed=1, model_digest=model_digest(folder), plugins=(),
    )  # fmt: skip
    backend = TorchBackend()
    backend.check(started)
    for wrong in (
        msgspec.structs.replace(started, model_digest="0" * 64),
        msgspec.structs.replace(started, config=msgspec.structs.replace(started.config, model=str(tmp_path / "gone"))),
    ):
        with pytest.raises(OtherInstallation):
            backend.check(wrong)


CUT = Trajectory(steps=(call(output(9, finish_reason="length")),))


@pytest.mark.parametrize(
    ("algorithm", "samples"),
    [
        ("dpo", [(CUT, WIN), (CUT, Scored(reward=0.0, passed=False))]),
        ("best_of_n", [(Trajectory(answer="x"), WIN), (ONE, Scored(reward=0.0, passed=False))]),
    ],
)
async def test_a_job_whose_first_samples_get_no_credit_fails_before_a_model_is_opened(
    view: View, algorithm: str, samples: list[tuple[Trajectory, Scored]]
) -> None:
    await asked(view, samples, algorithm=algorithm)
    backend = Backend()
    failed = await outcome(view, backend)
    assert isinstance(failed, ev.TrainFailed)
    assert f"The algorithm {algorithm} cannot train from these data. No sample got credit: of 2 scored" in failed.reason
    assert f"{2 * (algorithm == 'dpo')} were cut at a token limit; of 1 groups 0 have no two" in failed.reason
    assert backend.opened == 0


@pytest.mark.parametrize("figure", ["optimizer_steps", "trained_tokens"])
async def test_an_update_without_a_step_fails_a_job_that_it_is_the_first_of(view: View, figure: str) -> None:
    await asked(view, [(ONE, WIN)])
    failed = await outcome(view, Backend(metrics={"optimizer_steps": 1.0, "trained_tokens": 2.0, figure: 0.0}))
    assert isinstance(failed, ev.TrainFailed)
    assert "No sample got credit" in failed.reason


async def test_a_job_of_several_iterations_on_the_same_logged_samples_is_refused(view: View) -> None:
    await asked(view, [(ONE, WIN)], iterations=2)
    failed = await outcome(view, Backend())
    assert isinstance(failed, ev.TrainFailed)
    assert "2 iterations are asked for on the logged samples of g00-train" in failed.reason


async def test_a_parent_adapter_that_is_gone_fails_the_job_by_name(view: View) -> None:
    ref = await from_parent(view)
    await view.blobs.discard(ref)
    backend = Backend()
    failed = await outcome(view, backend)
    assert isinstance(failed, ev.TrainFailed)
    assert "cannot begin from what is kept" in failed.reason
    assert ref.sha256 in failed.reason
    assert (backend.opened, failed.attempt) == (0, 1)


async def test_an_altered_parent_adapter_stops_the_service_before_an_attempt_is_recorded(
    view: View, tmp_path: Path
) -> None:
    ref = await from_parent(view)
    (path,) = (tmp_path / "blobs").rglob(ref.sha256)
    path.chmod(0o600)
    path.write_bytes(b"?" * len(path.read_bytes()))
    with pytest.raises(Corrupt):
        await outcome(view, Backend())
    assert await recorded(view, ev.TrainStarted) == 0


@pytest.mark.parametrize("gone", [True, False])
async def test_a_resumed_job_continues_from_its_checkpoint_or_fails_by_name_if_that_is_gone(
    view: View, make_view: Callable[[MemoryLog], View], started_log: MemoryLog, gone: bool
) -> None:
    await group(view, "g01-i000", [(ONE, WIN)])
    await asked(view, [(ONE, WIN)], iterations=2, logged=None)
    checkpoint = await outcome(view, Backend(), "checkpointed-i000")
    assert isinstance(checkpoint, ev.AdapterCheckpointed)
    await group(view, "g01-i001", [(ONE, WIN)])
    if gone:
        await view.blobs.discard(checkpoint.state)
    found = await outcome(make_view(started_log), Backend(), "outcome" if gone else "checkpointed-i001")
    assert isinstance(found, ev.TrainFailed if gone else ev.AdapterCheckpointed)
    assert found.attempt == 2


async def from_parent(view: View) -> ev.BlobRef:
    """Record a request to continue from a published adapter, whose blob it is."""
    ref = await view.blobs.put(b"weights")
    request = ev.TrainRequested(
        generation=0, algorithm="best_of_n", algorithm_version="1", params={}, iterations=1, groups=1, samples=1,
        temperature=1.0, parent=0, harness="h", logged=NAME,
    )  # fmt: skip
    files: dict[str, Any] = {"adapter": "g00-i000", "files": {"adapter.bin": ref}, "sha256": "a" * 64}
    checkpoint = ev.AdapterCheckpointed(
        generation=0, iteration=0, attempt=1, state=ref, data_digest="", metrics={}, measured=Measured(), **files
    )
    published = ev.AdapterPublished(generation=0, parent_adapter=None, iterations=1, **files)
    drafts: list[tuple[str, str, ev.Data]] = [
        ("feedback", subjects.train_requested(RUN, 0), request),
        ("trainer", subjects.adapter_checkpointed(RUN, 0, 0), checkpoint),
        ("trainer", subjects.train_outcome(RUN, 0), published),
    ]
    for service, subject, data in drafts:
        await view.append(service, [Draft(subject=subject, step=0, data=data)])
    await asked(view, [(ONE, WIN)], adapter="g00-i000")
    return ref


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
