"""What the loop shows an algorithm before it asks for credit; the critic, the KL controller, jobs of both kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.plugins.algorithm import Credit, Group, Stream, Trained, TrainWork
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import Trajectory
from bascule.trainers.jobs import Update, open_job
from bascule.trainers.loop import TrainJob, UpdateMetrics
from bascule.trainers.lora import adapter_hash
from bascule.trainers.tensorfile import read_tensors
from tests.oracles import within
from tests.trainers.bandit import PARAMS, Given, alternating_credit, grouped, make_job, sample_batch, train
from tests.trainers.conversations import conversations, plain, spoken
from tests.trainers.gradients import gradients

LAX: dict[str, Any] = {**PARAMS, "max_grad_norm": 1e9, "max_ratio": 1e9, "max_kl": 1e9}


class Watching(Given):
    """Keeps what it is shown."""

    streams: frozenset[Stream] = frozenset({"policy", "reference", "values"})

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        self.groups, self.params = list(groups), params
        return self.given


@pytest.fixture(scope="module")
def parent(base: Path) -> dict[str, bytes]:
    """An adapter that is far from the base."""
    job = make_job(base, {**LAX, "learning_rate": 2e-2}, seed=2)
    batch = sample_batch(job, seed=0)
    for i in range(3):
        train(job, batch, alternating_credit(batch), i)
    return job.adapter_files()


def watched(base: Path, parent: Mapping[str, bytes] | None, **params: Any) -> tuple[TrainJob, Watching]:
    algorithm = Watching()
    return TrainJob(base, algorithm, {**LAX, **params}, 2, parent), algorithm


def lengths(batch: Mapping[str, Trajectory]) -> dict[str, int]:
    return {t: sum(len(ids) for _, ids, _, _ in spoken(x)) for t, x in batch.items()}


def with_returns(batch: Mapping[str, Trajectory]) -> list[Credit]:
    """Advantages of both signs, and returns that differ by trajectory and by token."""
    return [
        Credit(
            trajectory=t,
            component="policy",
            advantage=(-1.0) ** i,
            returns=tuple(math.sin(3 * i) + 0.1 * place for place in range(n)),
        )
        for i, (t, n) in enumerate(sorted(lengths(batch).items()))
    ]


def update(job: TrainJob, batch: Mapping[str, Trajectory], credit: Sequence[Credit]) -> UpdateMetrics:
    assert isinstance(job.algorithm, Given)
    job.algorithm.given = list(credit)
    return job.update(grouped(batch, dict.fromkeys(batch, 1.0)), batch, job.iteration)


def critic_of(job: TrainJob) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, _ = read_tensors(job.checkpoint(), "test")
    return tensors["critic/value.weight"], tensors["critic/value.bias"]


def states(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """[T, H] last hidden states before each token of one output, from its own plain pass."""
    hidden = model(input_ids=torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states[-1][0]
    return hidden[len(prompt) - 1 : len(prompt) - 1 + len(ids)]


@pytest.mark.parametrize("max_nodes", [20, 4096])
@pytest.mark.parametrize("reference", ["base", "promoted"])
def test_streams_are_those_of_plain_passes_turn_by_turn_and_leave_the_policy_as_it_was(
    base: Path, parent: dict[str, bytes], reference: str, max_nodes: int
) -> None:
    job, algorithm = watched(base, parent, kl_reference=reference, max_nodes=max_nodes, learning_rate=1e-2)
    batch = conversations(job.model, seed=3)
    update(job, batch, with_returns(batch))
    algorithm.given = []
    before = job.adapter_files()
    assert before != parent
    job.update(grouped(batch, {t: None if t == "g1-s2" else 1.0 for t in batch}), batch, 1)
    assert job.adapter_files() == before

    with torch.no_grad():
        policy = plain(job.model, batch)
        other = make_job(base, LAX, 2, parent).model
        if reference == "promoted":
            ref = plain(other, batch)
        else:
            with other.disable_adapter():
                ref = plain(other, batch)
    assert max(float((policy[t][0] - ref[t][0]).abs().max()) for t in batch) > 0.1
    weight, bias = critic_of(job)
    assert float(weight.abs().max()) > 0
    samples = {s.trajectory: s for g in algorithm.groups for s in g.samples}
    assert set(samples) == set(batch)
    apart = {"policy": 0.0, "reference": 0.0, "values": 0.0}
    for name, sample in samples.items():
        start = 0
        said = spoken(batch[name])
        assert [list(turn.token_ids) for turn in sample.turns] == [ids for _, ids, _, _ in said]
        for turn, (prompt, ids, _, _) in zip(sample.turns, said, strict=True):
            if name == "g1-s2":
                assert turn.policy == turn.reference == turn.values == ()
                continue
            with torch.no_grad():
                values = states(job.model, prompt, ids) @ weight[0] + bias
            wanted = {
                "policy": policy[name][0][start : start + len(ids)],
                "reference": ref[name][0][start : start + len(ids)],
                "values": values,
            }
            for stream, oracle in wanted.items():
                got = torch.tensor(getattr(turn, stream))
                assert got.shape == oracle.shape
                if len(ids):
                    apart[stream] = max(apart[stream], float((got - oracle).abs().max()))
            start += len(ids)
    for stream, deviation in apart.items():
        within(f"{stream} of a turn's tokens", "plain pass of the turn alone", deviation, 1e-5)


def test_only_what_is_asked_for_is_shown(base: Path) -> None:
    for asked in ("policy", "reference", "values"):
        algorithm = Watching()
        algorithm.streams = frozenset({asked})
        job = TrainJob(base, algorithm, LAX, 2)
        update(job, sample_batch(job, seed=0), [])
        turns = [t for g in algorithm.groups for s in g.samples for t in s.turns]
        for turn in turns:
            assert {n for n in ("policy", "reference", "values") if getattr(turn, n)} == {asked}


def test_a_scored_trajectory_that_is_not_there_is_named(base: Path) -> None:
    job, _ = watched(base, None)
    batch = sample_batch(job, seed=0)
    groups = grouped(batch, dict.fromkeys(batch, 1.0))
    with pytest.raises(TrainError, match="p1-s3"):
        job.update(groups, {t: x for t, x in batch.items() if t != "p1-s3"}, 0)


def test_only_the_value_loss_moves_the_critic_and_it_moves_nothing_else(base: Path, parent: dict[str, bytes]) -> None:
    found = []
    for vf_coef in (0.0, 0.1, 5.0):
        job, _ = watched(base, parent, vf_coef=vf_coef)
        batch = conversations(job.model, seed=3)
        update(job, batch, with_returns(batch))
        found.append((job, gradients(job)))
    for _, gradient in found[1:]:
        assert all(torch.equal(g, found[0][1][n]) for n, g in gradient.items())
    assert float(critic_of(found[0][0])[0].abs().max()) == 0
    other = make_job(base, LAX, 2, parent).model
    wanted, count = torch.zeros(64), 0
    returns = {c.trajectory: iter(c.returns or ()) for c in with_returns(batch)}
    for name, x in batch.items():
        for prompt, ids, _, _ in spoken(x):
            with torch.no_grad():
                for hidden in states(other, prompt, ids):
                    wanted -= next(returns[name]) * hidden  # of (V - R)^2 / 2 at V = 0
                    count += 1
    critic: Any = found[1][0]._learner.critic
    got = critic.value.weight.grad[0]
    apart = float((got - 0.1 * wanted / count).abs().max() / got.abs().max())
    within("gradient of the critic", "plain passes and the squared error", apart, 1e-5)


def test_the_critic_is_clipped_to_its_estimates_before_the_update(base: Path, parent: dict[str, bytes]) -> None:
    bound = 0.02
    params = {"critic_warmup": 9, "num_iterations": 2, "critic_learning_rate": 0.01, "cliprange_value": bound}
    job, algorithm = watched(base, parent, **params)
    batch = conversations(job.model, seed=3)
    algorithm.given = with_returns(batch)
    update(job, batch, algorithm.given)
    critics: list[tuple[torch.Tensor, torch.Tensor]] = [critic_of(job)]
    groups = grouped(batch, dict.fromkeys(batch, 1.0))
    job.update(groups, batch, 1, lambda _: critics.append(critic_of(job)))
    returns = torch.tensor([r for c in algorithm.given for r in c.returns or ()])
    with torch.no_grad():
        hidden = torch.cat([states(job.model, p, ids) for t in sorted(batch) for p, ids, _, _ in spoken(batch[t])])
    then = hidden @ critics[0][0][0] + critics[0][1]
    weight, bias = (x.clone().requires_grad_() for x in critics[1])
    now = hidden @ weight[0] + bias
    clipped = torch.minimum(torch.maximum(now, then - bound), then + bound)
    assert 0.2 < float((now != clipped).float().mean()) < 0.95
    (0.1 * torch.maximum((now - returns) ** 2, (clipped - returns) ** 2).mean() / 2).backward()
    critic: Any = job._learner.critic
    apart = float((critic.value.weight.grad - weight.grad).abs().max() / weight.grad.abs().max())
    within("gradient of the clipped critic", "plain passes and the squared error", apart, 1e-5)


def test_the_critic_learns_to_explain_the_returns(base: Path) -> None:
    job, _ = watched(base, None, critic_warmup=99, critic_learning_rate=3e-2, vf_coef=1.0, num_iterations=5)
    before = job.adapter_files()
    batch = sample_batch(job, seed=0)
    explained = [update(job, batch, with_returns(batch)).explained_variance for _ in range(12)]
    assert explained[0] == 0
    assert explained[-1] > 0.5
    assert job.adapter_files() == before


def test_the_warm_up_trains_the_critic_alone_and_ends(base: Path) -> None:
    job, _ = watched(base, None, critic_warmup=1)
    before = job.adapter_files()
    batch = sample_batch(job, seed=0)
    assert update(job, batch, with_returns(batch)).grad_norm == 0
    assert job.adapter_files() == before
    assert float(critic_of(job)[0].abs().max()) > 0
    assert update(job, batch, with_returns(batch)).grad_norm > 0
    assert job.adapter_files() != before


def test_checkpoints_hold_the_critic_and_adapters_do_not(base: Path) -> None:
    params = {"num_iterations": 2, "critic_warmup": 1}
    job, _ = watched(base, None, **params)
    batch = sample_batch(job, seed=0)
    update(job, batch, with_returns(batch))
    blob = job.checkpoint()
    resumed, _ = watched(base, None, **params)
    resumed.restore(blob)
    assert resumed.checkpoint() == blob
    for each in (job, resumed):
        update(each, batch, with_returns(batch))
    assert resumed.checkpoint() == job.checkpoint() != blob
    assert not [k for k in read_tensors(job.adapter_files()["adapter_model.safetensors"], "test")[0] if "value" in k]
    with pytest.raises(TrainError, match="critic"):
        make_job(base, LAX, 2).restore(blob)


@pytest.mark.parametrize(("target", "error"), [(1e-6, 0.2), (1e6, -0.2), (None, 0.0), ("measured", 0.1)])
def test_the_coefficient_moves_towards_the_wanted_divergence_and_is_in_the_checkpoint(
    base: Path, parent: dict[str, bytes], target: float | str | None, error: float
) -> None:
    job, _ = watched(base, parent)
    batch = sample_batch(job, seed=4, samples=20)
    with torch.no_grad():
        policy = plain(job.model, batch)
        with job.model.disable_adapter():
            ref = plain(job.model, batch)
    divergence = sum(float((policy[t][0] - ref[t][0]).sum()) for t in batch) / len(batch)
    assert divergence > 0.1
    wanted = divergence / 1.1 if target == "measured" else target
    params = {"kl_coef": 0.05, "target_kl": wanted, "horizon": 600.0}
    job, algorithm = watched(base, parent, **params)
    assert update(job, batch, alternating_credit(batch)).kl_coef == 0.05
    assert algorithm.params["kl_coef"] == 0.05
    expected = 0.05 * (1 + error * len(batch) / 600)
    resumed, watching = watched(base, parent, **params)
    resumed.restore(job.checkpoint())
    for each, seen in ((job, algorithm), (resumed, watching)):
        assert update(each, batch, alternating_credit(batch)).kl_coef == pytest.approx(expected, rel=1e-5)
        assert seen.params["kl_coef"] == pytest.approx(expected, rel=1e-5)
    assert resumed.checkpoint() == job.checkpoint()


def test_an_update_without_credit_changes_the_count_and_nothing_else(base: Path, parent: dict[str, bytes]) -> None:
    job, _ = watched(base, parent, kl_coef=0.05, target_kl=1e-6, horizon=600.0)
    batch = sample_batch(job, seed=4)
    update(job, batch, with_returns(batch))
    before, counted = read_tensors(job.checkpoint(), "test")
    update(job, batch, [])
    after, counts = read_tensors(job.checkpoint(), "test")
    assert json.loads(counted.pop("counters")) == {**json.loads(counts.pop("counters")), "iteration": 1}
    assert (job.iteration, counted) == (2, counts)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize(
    ("loss", "words"),
    [(None, "given .* has none"), (torch.nan, "given loss is nan"), ("mean", "loss of given .* one for each")],
)
def test_a_loss_of_ones_own_that_is_missing_or_no_number_a_token_is_refused(base: Path, loss: Any, words: str) -> None:
    algorithm: Any = Given()
    if loss is not None:
        algorithm.token_loss = lambda inputs, _: inputs.logprobs.mean() if loss == "mean" else inputs.logprobs * loss
    job = TrainJob(base, algorithm, PARAMS, 1)
    batch = sample_batch(job, seed=0)
    algorithm.given = [Credit(trajectory=t, component="own", advantage=1.0) for t in batch]
    before = job.adapter_files()
    with pytest.raises(TrainError, match=words):
        job.update(grouped(batch, dict.fromkeys(batch, 1.0)), batch, 0)
    assert job.adapter_files() == before


class Alone(Given):
    """Trains by itself: adds its iteration to a counter, and passes an adapter on."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files
        self.seen: list[TrainWork] = []

    def train(self, work: TrainWork) -> Trained:
        self.seen.append(work)
        state = (work.state or b"\0\n9 ") + bytes([work.iteration])
        return Trained(files=self.files, state=state, metrics={"loss": 0.5, "seconds": 3.0})


def go(job: Any, batch: Mapping[str, Trajectory], iteration: int) -> Update:
    seen: list[dict[str, float]] = []
    done: Update = job.update(grouped(batch, dict.fromkeys(batch, 1.0)), batch, iteration, seen.append)
    assert seen
    assert "seconds" not in done.metrics
    assert done.sha256 == adapter_hash(done.files)
    return done


def test_an_algorithm_that_trains_by_itself_is_a_job_that_resumes(base: Path, parent: dict[str, bytes]) -> None:
    batch = sample_batch(make_job(base, PARAMS, 1), seed=0)
    algorithm = Alone(parent)
    job = open_job(algorithm, base, {"steps": 2}, 7, None)
    first = go(job, batch, 0)
    second = go(job, batch, 1)
    assert first.metrics == {"loss": 0.5}
    assert [(w.iteration, w.adapter, w.state) for w in algorithm.seen] == [
        (0, None, None),
        (1, parent, b"\0\n9 \0"),
    ]
    work = algorithm.seen[0]
    assert (work.base, work.params, work.seed, set(work.trajectories)) == (base, {"steps": 2}, 7, set(batch))
    resumed = open_job(algorithm, base, {"steps": 2}, 7, None, first.state)
    assert go(resumed, batch, 1) == second
    assert algorithm.seen[2].adapter == parent
    assert algorithm.seen[2].state == b"\0\n9 \0"
    assert go(open_job(algorithm, base, {}, 7, parent), batch, 0).files == parent
    assert algorithm.seen[3].adapter == parent
    for bad in (first.state[:-1], b"", b"adapter/x 1\na", "state ²\nx".encode(), b"\x80\x04N.", first.state + b"x"):
        with pytest.raises(TrainError, match="checkpoint"):
            open_job(algorithm, base, {}, 7, None, bad)


def test_files_that_are_no_adapter_are_not_passed_on(base: Path, parent: dict[str, bytes]) -> None:
    batch = sample_batch(make_job(base, PARAMS, 1), seed=0)
    job = open_job(Alone({**parent, "model.pkl": b"\x80\x04N."}), base, {}, 7)
    with pytest.raises(TrainError, match=r"model\.pkl"):
        go(job, batch, 0)


def test_a_job_of_the_loop_resumes_behind_the_same_door(base: Path, parent: dict[str, bytes]) -> None:
    batch = sample_batch(make_job(base, PARAMS, 1, parent), seed=0)
    algorithm = Given(alternating_credit(batch))
    job = open_job(algorithm, base, {**LAX, "num_iterations": 2}, 7, parent)
    first = go(job, batch, 0)
    second = go(job, batch, 1)
    assert first.sha256 != second.sha256
    resumed = open_job(algorithm, base, {**LAX, "num_iterations": 2}, 7, parent, first.state)
    assert go(resumed, batch, 1) == second
    with pytest.raises(TrainError):
        open_job(algorithm, base, LAX, 7, parent, first.state[:-3])
