"""The training loop: exact, deterministic, guarded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bascule.plugins.algorithm import Component, Credit, Group, Stream
from bascule.schemas.errors import ConfigError, TrainError
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids, unpack_floats
from bascule.trainers.batch import units_of
from bascule.trainers.loop import TrainJob
from bascule.trainers.lora import adapter_hash
from bascule.trainers.params import scheduled_rate, train_params
from tests.oracles import within
from tests.trainers.bandit import (
    PARAMS,
    Given,
    alternating_credit,
    grouped,
    make_job,
    plain_logprobs,
    sample_batch,
    train,
)
from tests.trainers.conversations import plain, sampled_at, spoken
from tests.trainers.gradients import EXACT, gradients


def shifted(trajectory: Trajectory, by: float) -> Trajectory:
    """The trajectory, had the sampler's log-probabilities been others."""
    (call,) = trajectory.steps
    assert isinstance(call, ModelCall)
    logprobs = pack_floats(x + by for x in unpack_floats(call.outputs[0].logprobs))
    output = msgspec.structs.replace(call.outputs[0], logprobs=logprobs)
    return msgspec.structs.replace(trajectory, steps=(msgspec.structs.replace(call, outputs=(output,)),))


@pytest.mark.parametrize("max_nodes", [1, 24, 4096])
def test_gradients_equal_those_of_a_plain_padded_forward(base: Path, parent: dict[str, bytes], max_nodes: int) -> None:
    job = make_job(base, {**EXACT, "max_nodes": max_nodes, "beta": 0.05}, seed=2, parent_adapter=parent)
    batch = {t: shifted(x, 0.3) for t, x in sample_batch(job, seed=7).items()}
    credit = alternating_credit(batch)
    rows = [(share, row) for (share,) in units_of(credit, batch) for row in share.rows]

    plain = make_job(base, EXACT, seed=2, parent_adapter=parent)
    logprobs = plain_logprobs(plain.model, [(r.tokens, r.temperature) for _, r in rows])
    with torch.no_grad(), plain.model.disable_adapter():
        reference = plain_logprobs(plain.model, [(r.tokens, r.temperature) for _, r in rows])
    policy, imitation, policy_tokens, weights = torch.zeros(()), torch.zeros(()), 0, 0.0
    for i, (share, row) in enumerate(rows):
        at = [p - 1 for p in row.trained]
        pi = logprobs[i, at]
        if share.component == "imitation":
            imitation = imitation - share.advantage[0] * pi.sum()
            weights += share.advantage[0] * len(at)
        else:
            weight = torch.exp(pi.detach() - torch.tensor(row.behaviour)).clamp(max=2)
            ratio = torch.exp(pi - pi.detach())
            policy = policy + (-weight * share.advantage[0] * ratio + 0.05 * (reference[i, at] - pi) ** 2 / 2).sum()
            policy_tokens += len(at)
    loss = policy / policy_tokens + imitation / weights
    loss.backward()  # type: ignore[no-untyped-call]

    metrics = train(job, batch, credit, 0)
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-5)
    assert metrics.trained_tokens == sum(len(r.trained) for _, r in rows)
    wanted, got = gradients(plain), gradients(job)
    assert set(got) == set(wanted)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-5)


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_nothing_is_clipped(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    credit = [c for c in alternating_credit(batch) if c.component == "policy"]
    metrics = train(job, batch, credit, 0)
    assert metrics.loss == pytest.approx(-sum(c.advantage for c in credit) / len(credit), abs=1e-4)
    assert metrics.kl == pytest.approx(0, abs=1e-6)
    assert metrics.ess == pytest.approx(1, abs=1e-4)
    assert metrics.clip_fraction == 0
    assert 0 < metrics.entropy < 6
    assert metrics.grad_norm > 0


def test_the_order_of_inputs_does_not_change_a_byte(base: Path) -> None:
    jobs = [make_job(base, PARAMS, seed=1) for _ in range(2)]
    batch = sample_batch(jobs[0], seed=0)
    train(jobs[0], batch, alternating_credit(batch), 0)
    train(jobs[1], dict(reversed(batch.items())), alternating_credit(batch)[::-1], 0)
    assert jobs[0].checkpoint() == jobs[1].checkpoint()


def test_two_processes_give_the_same_bytes(base: Path) -> None:
    program = (
        "import sys, pathlib, torch\n"
        "from bascule.trainers.lora import adapter_hash\n"
        "from tests.trainers.bandit import PARAMS, alternating_credit, make_job, sample_batch, train\n"
        "torch.set_num_threads(1)\n"
        "job = make_job(pathlib.Path(sys.argv[1]), {**PARAMS, 'num_iterations': 2}, seed=1)\n"
        "for i in range(2):\n"
        "    batch = sample_batch(job, seed=i)\n"
        "    train(job, batch, alternating_credit(batch), i)\n"
        "print(adapter_hash(job.adapter_files()))\n"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(base)],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    hashes = [run.communicate()[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(hashes[0]) == 64
    assert hashes[0] == hashes[1]


def test_several_steps_on_a_batch_clip_what_has_moved_away(base: Path) -> None:
    job = make_job(base, {**PARAMS, "learning_rate": 1e-2, "num_iterations": 4, "max_kl": 99}, seed=1)
    batch = sample_batch(job, seed=0)
    metrics = train(job, batch, alternating_credit(batch), 0)
    assert metrics.optimizer_steps == 4
    assert metrics.clip_fraction > 0
    assert metrics.kl == pytest.approx(0, abs=1e-6)  # of the sampler from the policy before the update


def test_the_kl_penalty_keeps_the_policy_near_the_base(base: Path) -> None:
    def drift(beta: float) -> float:
        # One batch again and again, so the guards against stale samples are put out of the way.
        job = make_job(base, {**PARAMS, "learning_rate": 1e-2, "beta": beta, "max_kl": 99, "max_ratio": 1e9}, seed=1)
        batch = sample_batch(job, seed=0)
        credit = [c for c in alternating_credit(batch) if c.component == "policy"]
        for i in range(5):
            train(job, batch, credit, i)
        before, after = (gap(job, batch, credit, off) for off in (True, False))
        return float((after - before).square().mean())

    def gap(job: TrainJob, batch: Mapping[str, Trajectory], credit: list[Credit], off: bool) -> torch.Tensor:
        rows = [(r.tokens, r.temperature) for u in units_of(credit, batch) for s in u for r in s.rows]
        with torch.no_grad():
            if not off:
                return plain_logprobs(job.model, rows)
            with job.model.disable_adapter():
                return plain_logprobs(job.model, rows)

    assert drift(5.0) < drift(0.0) / 2


def test_a_batch_without_credit_changes_no_weight_but_counts(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    before = job.adapter_files()
    metrics = train(job, sample_batch(job, seed=0), [], 0)
    assert (metrics.loss, metrics.trained_tokens, metrics.optimizer_steps) == (0, 0, 0)
    assert train(job, {}, [], 1).trained_tokens == 0
    assert job.iteration == 2
    assert job.adapter_files() == before


def test_an_iteration_is_never_done_twice_or_skipped(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    train(job, {}, [], 0)
    for wrong in (0, 2):
        with pytest.raises(TrainError, match="the next one is 1"):
            train(job, {}, [], wrong)


@pytest.mark.parametrize(("by", "bound"), [(-12.0, "max_ratio"), (12.0, "max_ratio"), (-2.0, "max_kl")])
def test_samples_of_another_policy_are_refused_with_the_figures(base: Path, by: float, bound: str) -> None:
    job = make_job(base, PARAMS, seed=1)
    before = job.adapter_files()
    batch = {t: shifted(x, by) for t, x in sample_batch(job, seed=0).items()}
    with pytest.raises(TrainError, match=bound):
        train(job, batch, alternating_credit(batch), 0)
    assert job.adapter_files() == before


def test_with_a_loss_of_ones_own_it_is_known_how_far_the_sampler_was(base: Path) -> None:
    found = {}
    for component in ("own", "reinforce"):
        algorithm: Any = Given()
        algorithm.token_loss = lambda inputs, _: -inputs.advantage * inputs.logprobs
        job = TrainJob(base, algorithm, PARAMS, 1)
        batch = {t: shifted(x, 0.5 * (i % 2)) for i, (t, x) in enumerate(sample_batch(job, seed=0).items())}
        algorithm.given = [Credit(trajectory=t, component=component, advantage=1.0) for t in batch]
        found[component] = job.update(grouped(batch, dict.fromkeys(batch, 1.0)), batch, 0)
    assert 0.01 < found["own"].kl == pytest.approx(found["reinforce"].kl)
    assert 1 > found["own"].ess == pytest.approx(found["reinforce"].ess)


@pytest.mark.parametrize("what", ["unscored", "empty", "nothing"])
def test_what_cannot_be_trained_on_changes_nothing_but_the_count(base: Path, what: str) -> None:
    algorithm = Given()
    algorithm.streams = frozenset({"policy", "reference", "values"})
    job = TrainJob(base, algorithm, {**PARAMS, "num_mini_batches": 3, "target_kl": 0.1, "kl_coef": 0.1}, 1)
    before = job.adapter_files()
    output = Output(token_ids=b"", logprobs=b"", text="")
    call = ModelCall(kind="chat", asked="", prompt_ids=pack_ids([5]), outputs=(output,), sampling=Sampling())
    empty = {"e0-s0": Trajectory(), "e0-s1": Trajectory(steps=(call,))}
    batch = {"unscored": sample_batch(job, seed=0, samples=2), "empty": empty, "nothing": {}}[what]
    if what == "empty":
        algorithm.given = [Credit(trajectory=t, component="policy", advantage=1.0) for t in empty]
    metrics = job.update(grouped(batch, dict.fromkeys(batch, None if what == "unscored" else 1.0)), batch, 0)
    assert (metrics.loss, metrics.trained_tokens, metrics.nodes, metrics.optimizer_steps) == (0, 0, 0, 0)
    assert job.iteration == 1
    assert job.adapter_files() == before


def test_credit_for_what_has_no_score_is_refused(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    job.algorithm.given = alternating_credit(batch)  # type: ignore[attr-defined]
    with pytest.raises(TrainError, match="p1-s0, which has no score"):
        job.update(grouped(batch, {t: None if t == "p1-s0" else 1.0 for t in batch}), batch, 0)
    there = grouped({t: x for t, x in batch.items() if not t.startswith("p2")}, dict.fromkeys(batch, 1.0))
    with pytest.raises(TrainError, match="p2-s0, which has no score"):
        job.update(there, batch, 0)


def test_credit_that_is_no_number_is_refused_before_anything_moves(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    before = job.checkpoint()
    for bad in (float("nan"), (1.0, float("inf"), 0.0)):
        credit = [*alternating_credit(batch)[1:], Credit(trajectory="p0-s0", component="policy", advantage=bad)]
        with pytest.raises(TrainError, match="p0-s0 has the policy credit"):
            train(job, batch, credit, 0)
    assert job.checkpoint() == before


def test_the_guard_against_another_policy_looks_at_every_mini_batch(base: Path) -> None:
    job = make_job(base, {**PARAMS, "num_mini_batches": 3}, seed=1)
    batch = sample_batch(job, seed=0)
    last = {
        t: sampled_at(x, [p - 2.0 for *_, logprobs in spoken(x) for p in logprobs]) if t.startswith("p2") else x
        for t, x in batch.items()
    }
    with pytest.raises(TrainError, match="max_kl"):
        train(job, last, alternating_credit(batch), 0)


def test_weights_that_are_not_numbers_stop_the_update(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    with torch.no_grad():
        next(p for p in job.model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(TrainError, match="loss is nan"):
        train(job, batch, alternating_credit(batch), 0)


@pytest.mark.parametrize("where", ["prompt", "output"])
@pytest.mark.parametrize("foreign", [320, -1])
@pytest.mark.parametrize("streams", [frozenset(), frozenset({"policy"})])
def test_tokens_that_the_model_does_not_have_are_refused_with_the_trajectory(
    base: Path, where: str, foreign: int, streams: frozenset[Stream]
) -> None:
    job = make_job(base, PARAMS, seed=1)
    job.algorithm.streams = streams
    batch = sample_batch(job, seed=0)
    (call,) = batch["p1-s2"].steps
    assert isinstance(call, ModelCall)
    if where == "prompt":
        call = msgspec.structs.replace(call, prompt_ids=pack_ids([5, foreign]))
    else:
        output = msgspec.structs.replace(call.outputs[0], token_ids=pack_ids([5, foreign, 6]))
        call = msgspec.structs.replace(call, outputs=(output,))
    with pytest.raises(TrainError, match=rf"p1-s2 has the token id {foreign}, .* 320 tokens.*tokenizer"):
        train(job, {**batch, "p1-s2": Trajectory(steps=(call,))}, alternating_credit(batch), 0)


def test_an_algorithm_that_fails_is_named_with_its_failure(base: Path) -> None:
    class Broken(Given):
        failure: Exception = KeyError("heat")

        def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
            raise self.failure

    job = TrainJob(base, Broken(), PARAMS, 1)
    with pytest.raises(TrainError, match=r"given 1 failed to give credit: KeyError\('heat'\)"):
        job.update([], {}, 0)
    Broken.failure = ConfigError("w_max is -1.")
    with pytest.raises(ConfigError, match=r"w_max is -1"):
        job.update([], {}, 0)


COMPONENTS: list[Component] = ["policy", "reinforce", "imitation", "pair"]


def of_component(batch: Mapping[str, Trajectory], component: Component) -> list[Credit]:
    names = sorted(batch)
    if component == "pair":
        pairs = zip(names[::2], names[1::2], strict=True)
        return [Credit(trajectory=a, component="pair", advantage=1.0, rejected=b) for a, b in pairs]
    return [Credit(trajectory=t, component=component, advantage=1.0) for t in names]


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_update_that_runs_away_is_stopped_at_the_step_that_finds_it(base: Path, component: Component) -> None:
    seen: list[dict[str, float]] = []
    for num_mini_batches, first in ((1, 1), (3, 1 if component in ("policy", "reinforce") else 3)):
        params = {"num_iterations": 3, "num_mini_batches": num_mini_batches, "beta": 0.1, "learning_rate": 0.3}
        algorithm = Given()
        job = TrainJob(base, algorithm, {**PARAMS, **params}, seed=1)
        batch = sample_batch(job, seed=0)
        algorithm.given = of_component(batch, component)
        seen.clear()
        said = rf"Optimiser step {first} .* bound of 0\.5 that follows from max_kl = 0\.5"
        with pytest.raises(TrainError, match=said) as caught:
            job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, 0, seen.append)
        assert [round(figures["kl_update"], 5) for figures in seen] == [0] * first
        assert caught.value.figures["kl_update"] > 0.5


@pytest.mark.parametrize("component", COMPONENTS)
def test_how_far_an_update_has_moved_is_measured_from_where_it_began(
    base: Path, parent: dict[str, bytes], component: Component
) -> None:
    params = {**PARAMS, "num_iterations": 3, "beta": 0.1, "learning_rate": 3e-3, "max_nodes": 40}
    algorithm = Given()
    job = TrainJob(base, algorithm, params, 1, parent)
    batch = sample_batch(job, seed=0)
    algorithm.given = of_component(batch, component)
    policies, figures = [now_of(job, batch)], []

    def watch(step: dict[str, float]) -> None:
        figures.append(step)
        policies.append(now_of(job, batch))

    metrics = job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, 0, watch)
    top = None if component in ("policy", "reinforce") else 0.0
    apart = [(now - policies[0]).clamp(-99, top) for now in policies]
    wanted = [float((torch.expm1(d) - d).mean()) for d in apart]
    assert wanted[2] > 1e-4
    for step, k3 in zip(figures, wanted[:3], strict=True):
        within(f"kl_update ({component})", "plain padded forward", abs(step["kl_update"] - k3), 1e-6)
        assert step["tokens_per_second"] > 0
    assert metrics.kl_update == figures[-1]["kl_update"]
    assert "tokens_per_second" not in metrics.figures()


SEVERAL = [(3, 1), (4, 1, 5), (9, 2), (6, 5, 3, 5)]


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_last_step_of_an_update_is_looked_at_too(base: Path, component: Component) -> None:
    for rate, stopped in ((3e-3, False), (1000.0, True)):
        algorithm = Given()
        job = TrainJob(base, algorithm, {**PARAMS, "learning_rate": rate, "beta": 0.1, "max_kl": 0.3}, seed=1)
        batch = sample_batch(job, seed=0, samples=4, prompts=SEVERAL)
        algorithm.given = of_component(batch, component)
        smallest = {t: x for t, x in batch.items() if t.startswith("p0-")}
        before = now_of(job, smallest)
        groups = grouped(batch, dict.fromkeys(batch, 0.0))
        if stopped:
            said = r"Optimiser step 1 of the update .* bound of 1\.2 that follows from max_kl = 0\.3"
            with pytest.raises(TrainError, match=said):
                job.update(groups, batch, 0)
            continue
        metrics = job.update(groups, batch, 0)
        wanted = float((before - now_of(job, smallest)).abs().mean())
        assert wanted > 1e-4
        within(f"moved_after ({component})", "plain padded forward", abs(metrics.moved_after - wanted), 1e-6)


def test_a_group_that_has_moved_far_ends_no_update_whose_tokens_have_not(base: Path) -> None:
    def moved(max_kl: float) -> tuple[float, float]:
        algorithm = Given()
        job = TrainJob(base, algorithm, {**PARAMS, "learning_rate": 3e-3, "max_kl": max_kl}, seed=1)
        batch = sample_batch(job, seed=0, samples=4, prompts=SEVERAL)
        algorithm.given = [Credit(trajectory=t, component="policy", advantage=float(t < "p1")) for t in sorted(batch)]
        before = now_of(job, batch)
        metrics = job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, 0)
        return metrics.moved_after, float((before - now_of(job, batch)).abs().mean())

    group, whole = moved(9.0)
    assert group > 1.5 * whole > 1e-3
    assert moved(1.2 * whole / 4) == (group, whole)
    with pytest.raises(TrainError, match="finds the policy"):
        moved(0.8 * whole / 4)


def test_a_group_that_is_much_of_an_update_is_not_computed_once_more(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0, prompts=SEVERAL[:3])
    assert train(job, batch, alternating_credit(batch), 0).moved_after == 0


def now_of(job: TrainJob, batch: Mapping[str, Trajectory]) -> torch.Tensor:
    """Log-probabilities of all sampled tokens, from plain passes."""
    with torch.no_grad():
        return torch.cat([logprobs for logprobs, _ in plain(job.model, batch).values()])


def test_a_parent_adapter_is_continued_with_its_own_rank(base: Path, parent: dict[str, bytes]) -> None:
    job = make_job(base, {**PARAMS, "lora_r": 16}, seed=9, parent_adapter=parent)
    assert job.adapter_files() == parent
    assert adapter_hash(job.adapter_files()) == adapter_hash(parent)


def test_schedules_warm_up_and_fall_to_zero_after_the_last_step() -> None:
    def rates(**params: Any) -> list[float]:
        p = train_params({"learning_rate": 1.0, "steps": 2, "num_iterations": 2, **params})
        return [round(scheduled_rate(p, step), 6) for step in range(5)]

    assert rates() == [1, 1, 1, 1, 1]
    assert rates(warmup_steps=2) == [0.5, 1, 1, 1, 1]
    assert rates(lr_scheduler_type="linear") == [1, 0.75, 0.5, 0.25, 0]
    assert rates(lr_scheduler_type="cosine") == [1, 0.853553, 0.5, 0.146447, 0]


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0}, {"epsilon": "wide"}, {"lora_r": 1.5}, {"lr_scheduler_type": "x"}]
)
def test_hyperparameters_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        train_params(bad)
    assert train_params({"groups": 32}).steps == 1


def test_the_algorithm_s_figures_stand_among_those_of_the_update(base: Path, parent: dict[str, bytes]) -> None:
    class Figured(Given):
        def figures(
            self, groups: Sequence[Group], credit: Sequence[Credit], params: dict[str, Any]
        ) -> dict[str, float]:
            return {"groups": len(groups), "kl_coef": -1.0}

    job = TrainJob(base, Figured(), PARAMS, 1, parent)
    batch = sample_batch(job, seed=0)
    steps: list[dict[str, float]] = []
    job.algorithm.given = of_component(batch, "policy")  # type: ignore[attr-defined]
    groups = grouped(batch, dict.fromkeys(batch, 0.0))
    figures = job.update(groups, batch, 0, steps.append).figures()
    assert figures["groups"] == steps[0]["groups"] == len(groups)
    assert figures["kl_coef"] >= 0  # the loop's own
