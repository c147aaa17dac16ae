"""The bridge trains what the loop trains, by TRL."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bascule.plugins.algorithm import Group, OwnTraining, Sample, TrainWork
from bascule.plugins.algorithms.grpo import Grpo
from bascule.schemas.errors import ConfigError, TrainError
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.trainers.jobs import open_job
from bascule.trainers.loop import TrainJob
from bascule.trainers.lora import check_adapter
from bascule.trainers.trl_grpo import TrlGrpo
from tests.oracles import within
from tests.tiny_model import make_tiny_model
from tests.trainers.bandit import PARAMS, grouped, plain_logprobs

#: The learning rate falls, and the gradients are clipped.
SHARED: dict[str, Any] = {**Grpo().defaults(), **PARAMS, "max_grad_norm": 0.05, "kl_estimator": "k3"}
SAMPLES = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def parent(base: Path) -> dict[str, bytes]:
    """An adapter whose two factors are both away from 0, so that all gradients are."""
    job = TrainJob(base, Grpo(), SHARED, seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in job.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return job.adapter_files()


def conversation(
    model: Any, drift: float, prompt: Sequence[int], turns: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Trajectory:
    """Turns of (what the environment says, what was sampled), the sampler's log-probabilities about ``drift`` away."""
    held = list(prompt)
    steps = []
    for said, sampled in turns:
        held += said
        row = [*held, *sampled]
        with torch.no_grad():
            exact = plain_logprobs(model, [(row, 1.0)])[0, len(held) - 1 :]
        away = drift + 0.05 * torch.sin(torch.tensor(sampled, dtype=torch.float32))
        output = Output(token_ids=pack_ids(sampled), logprobs=pack_floats((exact + away).tolist()), text="")
        steps.append(
            ModelCall(
                kind="completion",
                asked="",
                prompt_ids=pack_ids(held),
                outputs=(output,),
                sampling=Sampling(temperature=1.0),
            )
        )
        held = row
    return Trajectory(steps=tuple(steps))


def batch_of(base: Path, parent: dict[str, bytes], seed: int) -> tuple[dict[str, Trajectory], list[Group]]:
    """Two groups with answers of different lengths, one of them conversations with a tool.

    The sampler's distance goes with the reward, so that the advantages do not cancel in the loss.
    """
    model = TrainJob(base, Grpo(), SHARED, seed=2, parent_adapter=parent).model
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    batch = {}
    for i in range(SAMPLES):
        drift = 0.4 if i < SAMPLES // 2 else -0.4
        batch[f"p0-s{i}"] = conversation(model, drift, range(10, 16), [((), drawn(2 + i))])
        batch[f"p1-s{i}"] = conversation(model, drift, range(20, 29), [((), drawn(3)), (drawn(2 + i), drawn(1 + i))])
    return batch, grouped(batch, {t: float(int(t[-1]) ** 2) for t in batch})


def work(base: Path, batch: tuple[dict[str, Trajectory], list[Group]], **given: Any) -> TrainWork:
    chosen = {"params": SHARED, "iteration": 0, "adapter": None, "state": None, **given}
    return TrainWork(base=base, seed=2, groups=batch[1], trajectories=batch[0], **chosen)


def weights(files: dict[str, bytes]) -> torch.Tensor:
    tensors = check_adapter(files)[1]
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"loss_type": "grpo", "max_nodes": 40},
        {"loss_type": "dr_grpo", "max_completion_length": 8, "scale_rewards": "none"},
        {"beta": 0.5},
        {"loss_type": "grpo", "epsilon": 0.02, "epsilon_high": 0.03, "num_iterations": 2},
    ],
    ids=["dapo", "grpo in micro-batches", "dr_grpo", "with a KL penalty", "two passes"],
)
def test_one_update_is_that_of_the_loop(base: Path, parent: dict[str, bytes], variant: dict[str, Any]) -> None:
    params = {**SHARED, **variant}
    batch, groups = batch_of(base, parent, seed=0)
    job = TrainJob(base, Grpo(), params, seed=2, parent_adapter=parent)
    ours = job.update(groups, batch, 0)
    theirs = TrlGrpo().train(work(base, (batch, groups), params=params, adapter=parent))

    assert abs(ours.loss) > 0.05
    assert (ours.clip_fraction > 0) == (params["num_iterations"] > 1)
    figures, name = theirs.metrics, params["loss_type"] + (", KL" if params["beta"] else "")
    within(f"trl-grpo, {name}: loss", "the loop", abs(figures["loss"] / ours.loss - 1), 1e-6)
    within(f"trl-grpo, {name}: gradient norm", "the loop", abs(figures["grad_norm"] / ours.grad_norm - 1), 1e-5)
    assert figures["trained_tokens"] == ours.trained_tokens
    assert figures["learning_rate"] == pytest.approx(ours.learning_rate, rel=1e-12)
    start = weights(parent)
    step = weights(job.adapter_files()) - start
    # AdamW's first step is the gradient's sign, so where it is near 0 rounding decides; its size is the whole step's.
    difference = (weights(theirs.files) - start - step).norm() / step.norm()
    within(f"trl-grpo, {name}: AdamW's first step", "the loop", float(difference), 1e-3)


def test_a_job_goes_on_from_its_state_as_if_it_had_never_stopped(base: Path, parent: dict[str, bytes]) -> None:
    batches = [batch_of(base, parent, seed) for seed in range(2)]
    straight = open_job(TrlGrpo(), base, SHARED, 2, parent)
    done = [straight.update(groups, batch, i, quiet) for i, (batch, groups) in enumerate(batches)]
    resumed = open_job(TrlGrpo(), base, SHARED, 2, parent, done[0].state)
    again = resumed.update(batches[1][1], batches[1][0], 1, quiet)
    assert again == done[1]

    ours = TrainJob(base, Grpo(), SHARED, 2, parent)
    for i, (batch, groups) in enumerate(batches):
        metrics = ours.update(groups, batch, i)
    assert again.metrics["learning_rate"] == pytest.approx(metrics.learning_rate, rel=1e-12)
    within("trl-grpo: loss of the second update", "the loop", abs(again.metrics["loss"] / metrics.loss - 1), 1e-6)
    moved = weights(ours.adapter_files()) - weights(parent)
    difference = (weights(again.files) - weights(parent) - moved).norm() / moved.norm()
    within("trl-grpo: adapter after two updates", "the loop", float(difference), 1e-3)


def test_an_update_is_made_once(base: Path, parent: dict[str, bytes]) -> None:
    batch = batch_of(base, parent, seed=0)
    done = TrlGrpo().train(work(base, batch, adapter=parent))
    with pytest.raises(TrainError, match="the next one is 1"):
        TrlGrpo().train(work(base, batch, adapter=parent, state=done.state))


def test_without_credit_only_the_count_goes_on(base: Path, parent: dict[str, bytes]) -> None:
    batch, _ = batch_of(base, parent, seed=0)
    done = TrlGrpo().train(work(base, (batch, grouped(batch, dict.fromkeys(batch, 1.0))), adapter=parent))
    assert done.files == parent
    assert "loss" not in done.metrics
    after = TrlGrpo().train(work(base, batch_of(base, parent, seed=0), adapter=parent, state=done.state, iteration=1))
    assert after.metrics["learning_rate"] == SHARED["learning_rate"]


def test_tokens_that_the_model_does_not_have_are_refused(base: Path, parent: dict[str, bytes]) -> None:
    batch, groups = batch_of(base, parent, seed=0)
    (call, *_) = batch["p1-s2"].steps
    assert isinstance(call, ModelCall)
    other = {**batch, "p1-s2": Trajectory(steps=(msgspec.structs.replace(call, prompt_ids=pack_ids([7, 320])),))}
    with pytest.raises(TrainError, match=r"p1-s2 has the token id 320"):
        TrlGrpo().train(work(base, (other, groups), adapter=parent))


def test_a_single_row_is_trained(base: Path, parent: dict[str, bytes]) -> None:
    params = {**SHARED, "mask_truncated_completions": True}
    batch, groups = batch_of(base, parent, seed=0)
    kept = msgspec.structs.replace(groups[0], samples=tuple(_cut(s) for s in groups[0].samples[1:]))
    groups = [msgspec.structs.replace(kept, samples=(groups[0].samples[0], *kept.samples))]
    ours = TrainJob(base, Grpo(), params, 2, parent).update(groups, batch, 0)
    theirs = TrlGrpo().train(work(base, (batch, groups), params=params, adapter=parent)).metrics
    assert theirs["trained_tokens"] == ours.trained_tokens == groups[0].samples[0].tokens
    assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-6)
    assert theirs["kl"] == pytest.approx(ours.kl, rel=1e-4)


def test_tokens_of_another_policy_are_refused(base: Path, parent: dict[str, bytes]) -> None:
    with pytest.raises(TrainError, match=r"over the bound max_kl = 0\.01"):
        TrlGrpo().train(work(base, batch_of(base, parent, seed=0), params={**SHARED, "max_kl": 0.01}, adapter=parent))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_mini_batches": 2}, "num_mini_batches = 1 only"),
        ({"entropy_coef": 0.1}, "entropy_coef = 0.0 only"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.0 only"),
        ({"beta": 0.1, "kl_estimator": "k2"}, "kl_estimator = 'k3' only"),
        ({"clip_ratio_c": 3.0}, "clip_ratio_c = None only"),
    ],
)
def test_what_trl_does_otherwise_is_refused(
    base: Path, parent: dict[str, bytes], params: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        TrlGrpo().train(work(base, batch_of(base, parent, seed=0), params={**SHARED, **params}))


def test_trajectories_that_trl_cannot_hold_are_refused(base: Path, parent: dict[str, bytes]) -> None:
    batch, groups = batch_of(base, parent, seed=0)
    steps = [s for s in batch["p1-s1"].steps if isinstance(s, ModelCall)]
    forked = msgspec.structs.replace(steps[1], prompt_ids=pack_ids([7, 8, 9]))
    other = {**batch, "p1-s1": Trajectory(steps=(steps[0], forked))}
    with pytest.raises(TrainError, match="p1-s1 has several training sequences"):
        TrlGrpo().train(work(base, (other, groups), params={**SHARED, "loss_type": "grpo"}))
    warm = msgspec.structs.replace(steps[0], sampling=Sampling(temperature=0.7))
    other = {**batch, "p1-s1": Trajectory(steps=(warm,))}
    with pytest.raises(TrainError, match=re.escape("temperatures 0.7 to 1")):
        TrlGrpo().train(work(base, (other, groups)))


def test_without_trl_it_says_what_to_install(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"grpo, or install it: .*pip install -e .*\[trl\]"):
        TrlGrpo().train(work(base, batch_of(base, parent, seed=0), adapter=parent))


def test_registering_it_imports_neither_torch_nor_trl() -> None:
    program = (
        "import sys\nfrom bascule.plugins.registry import Registry\nimport bascule.trainers.trl_grpo as plugin\n"
        "registry = Registry()\nplugin.bascule_register(registry)\n"
        "print(registry.algorithms.get('trl-grpo').version, {'torch', 'trl', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "set()"]
    assert isinstance(TrlGrpo(), OwnTraining)


def quiet(_: dict[str, float]) -> None:
    """Progress that nobody looks at."""


def _cut(sample: Sample) -> Sample:
    turns = tuple(msgspec.structs.replace(t, truncated=True) for t in sample.turns)
    return msgspec.structs.replace(sample, turns=turns)
