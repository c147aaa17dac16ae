"""What the verifier adds to an evaluation's landscape: the training of its adapter, and what episodes took."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bascule.plugins.loader import plugins
from bascule.runtime.services import verifier
from bascule.runtime.state import Evaluation, Logged, RunState, Training
from bascule.runtime.world import World
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Envelope, Producer, Recorded
from bascule.schemas.landscape import Measured
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Sampling, Scored

RUN, NAME = "small", "g01-train"
BLOB = ev.BlobRef(sha256="0" * 64, size=1)


def state(adapter: str | None, metrics: dict[str, float], params: dict[str, Any]) -> RunState:
    """A run whose evaluation of ``adapter`` has its last score; generation 1 trained ``g01-i002``."""
    request = ev.EpisodesRequested(
        evaluation=NAME, purpose="landscape", generation=1, split="train", shard=0, shards=1, positions=(0, 1),
        examples=("a", "b"), samples=10, sampling=Sampling(), seed=1, harness="h", adapter=adapter,
    )  # fmt: skip
    keys = [(position, sample) for position in (0, 1) for sample in range(10)]
    found = RunState(run=RUN)
    found.evaluations[NAME] = Evaluation(
        request=request,
        shards={0: request},
        logged={(p, n): Logged("7", None, 10, n, float(10 * p + n)) for p, n in keys},
        verdicts={(p, n): Scored(reward=float(n == 0)) for p, n in keys},
    )
    asked = ev.TrainRequested(
        generation=1, algorithm="grpo", algorithm_version="2", params=params, iterations=3, groups=1, samples=10,
        temperature=1.0, parent=0, harness="h",
    )  # fmt: skip
    last = ev.AdapterCheckpointed(
        generation=1, iteration=2, attempt=1, adapter="g01-i002", files={}, sha256="0" * 64, state=BLOB,
        data_digest="", metrics=metrics, measured=Measured(),
    )  # fmt: skip
    found.step(1).training = Training(request=asked, request_id="", last=last)
    return found


def completed(found: RunState, version: int) -> ev.EvaluationCompleted:
    name = subjects.trajectory_id(NAME, 1, 9)
    data = ev.TrajectoryScored(
        trajectory=name, evaluation=NAME, position=1, sample=9, verdict=found.evaluations[NAME].verdicts[1, 9]
    )
    subject = subjects.trajectory_scored(RUN, name)
    envelope = Envelope(
        id=subjects.event_id(subject), type=data.TYPE, source="", subject=subject, time="", run=RUN, step=1,
        schemaversion=data.VERSION, producer=Producer(service="verifier", version="1", hash="0"),
        data=msgspec.Raw(b"{}"),
    )  # fmt: skip
    world = World(plugins(), parse_config({"task": {"name": "arith"}, "landscape": version}))
    event = Recorded(seq=9, subject=subject, payload=b"", envelope=envelope, data=data)
    (draft,) = verifier.decide(found, event, world)
    assert isinstance(draft.data, ev.EvaluationCompleted)
    return draft.data


@pytest.mark.parametrize(
    ("adapter", "metrics", "params", "ess", "kl"),
    [
        ("g01-i002", {"ess": 0.9, "kl_reference": 0.4}, {"kl_reference": "base"}, 0.9, 0.4),
        ("g01-i002", {"ess": 0.9, "kl_reference": 0.4}, {"kl_reference": "promoted"}, 0.9, None),
        ("g01-i002", {"ess": 0.9, "kl_reference": 0.0}, {"kl_reference": "base"}, 0.9, None),
        ("g01-i002", {"reward": 0.5}, {}, None, None),
        (None, {"ess": 0.9, "kl_reference": 0.4}, {"kl_reference": "base"}, None, None),
        ("g00-i007", {"ess": 0.9, "kl_reference": 0.4}, {"kl_reference": "base"}, None, None),
    ],
)
def test_a_landscape_tells_what_the_training_of_its_adapter_measured(
    adapter: str | None, metrics: dict[str, float], params: dict[str, Any], ess: float | None, kl: float | None
) -> None:
    land = completed(state(adapter, metrics, params), 2).landscape
    assert (land.ess, land.kl_to_base) == (ess, kl)


def test_over_the_regression_set_the_drop_from_the_parent_is_told() -> None:
    found = state(None, {}, {})
    found.step(1).candidate = ev.CandidateProposed(generation=1, harness="h", parent=0)
    evaluation = found.evaluations[NAME]
    evaluation.request = msgspec.structs.replace(evaluation.request, split="regression")
    assert completed(found, 2).landscape.regression_drop is None
    before = completed(found, 2)
    better = msgspec.structs.replace(before, landscape=msgspec.structs.replace(before.landscape, score=0.75))
    found.evaluations["g00-regression"] = Evaluation(request=evaluation.request, completed=better)
    assert completed(found, 2).landscape.regression_drop == pytest.approx(0.65)
    evaluation.request = msgspec.structs.replace(evaluation.request, split="dev")
    assert completed(found, 2).landscape.regression_drop is None


def test_the_seconds_of_a_rollout_are_measured_and_not_decided() -> None:
    found = completed(state(None, {}, {}), 2)
    assert found.measured.seconds == sum(range(20))
    assert found.measured.rollout is not None
    assert (found.measured.rollout.mean, found.measured.rollout.p95) == (9.5, 18.0)
    assert found.landscape.tokens is not None
    assert found.landscape.tokens.p95 == 19.0
    assert "rollout" not in msgspec.to_builtins(found.landscape)


def test_a_run_that_was_recorded_before_completes_its_evaluations_as_it_did() -> None:
    found = completed(state("g01-i002", {"ess": 0.9, "kl_reference": 0.4}, {"kl_reference": "base"}), 1)
    assert msgspec.to_builtins(found.measured) == {"seconds": 190.0}
    assert set(msgspec.to_builtins(found.landscape)) == {
        "groups", "samples", "unscored", "score", "score_interval", "mean", "variance", "skew", "success_rate",
        "pass_rates", "informative", "format_failures", "errors", "prompt_tokens", "output_tokens", "distinct_rewards",
    }  # fmt: skip
