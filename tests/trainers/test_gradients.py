"""The loop's gradients are those of plain padded forward passes and plain losses, on whatever batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bascule.plugins.algorithm import Credit
from bascule.schemas.trajectory import (
    Trajectory,
)
from bascule.trainers import learner
from bascule.trainers.base_model import load_model
from bascule.trainers.forward import _Head
from bascule.trainers.loop import TrainJob, UpdateMetrics
from bascule.trainers.lora import set_adapter_tensors
from bascule.trainers.params import TrainParams
from tests.oracles import within
from tests.trainers.bandit import Given, alternating_credit, grouped, make_job, sample_batch, train
from tests.trainers.conversations import conversations, plain, spoken
from tests.trainers.gradients import EXACT, Gradients, adapter, apart, decoder, gradients


class Own(Given):
    """Decided credit, and a loss of its own that reads all there is."""

    def token_loss(self, inputs: Any, params: dict[str, Any]) -> Any:
        ratio = torch.exp(inputs.logprobs - inputs.old)
        return params["heat"] * inputs.logprobs**2 - inputs.advantage * ratio * torch.exp(inputs.old - inputs.behaviour)


def all_components(batch: Mapping[str, Trajectory]) -> list[Credit]:
    """In each group one of every component, the second and the third each in two."""
    credit = []
    for g in sorted({name.partition("-")[0] for name in batch}):
        tokens = sum(len(ids) for _, ids, _, _ in spoken(batch[f"{g}-s0"]))
        by_token = tuple(0.5 * (-1.0) ** t * (1 + t) for t in range(tokens))
        credit += [
            Credit(trajectory=f"{g}-s0", component="policy", advantage=by_token),
            Credit(trajectory=f"{g}-s1", component="policy", advantage=-1.5),
            Credit(trajectory=f"{g}-s2", component="reinforce", advantage=0.7),
            Credit(trajectory=f"{g}-s3", component="imitation", advantage=0.5),
            Credit(trajectory=f"{g}-s3", component="own", advantage=1.2),
            Credit(trajectory=f"{g}-s1", component="pair", advantage=1.0, rejected=f"{g}-s2"),
            Credit(trajectory=f"{g}-s1", component="pair", advantage=0.5, rejected=f"{g}-s0"),
        ]
    return credit


Plain = dict[str, tuple[Tensor, Tensor]]


def plain_loss(
    now: Plain, old: Plain, ref: Plain, batch: Mapping[str, Trajectory], credit: Sequence[Credit], p: TrainParams
) -> Tensor:
    """The loss of one optimiser step, a trajectory after the other."""

    def tokens(component: str) -> int:
        return sum(len(now[c.trajectory][0]) for c in credit if c.component == component)

    def number(component: str) -> int:
        return sum(c.component == component for c in credit)

    imitated = sum(float(c.advantage) * len(now[c.trajectory][0]) for c in credit if c.component == "imitation")
    total = torch.zeros(())
    for c in credit:
        pi, entropy = now[c.trajectory]
        before = old[c.trajectory][0]
        mu = torch.tensor([x for _, _, _, logprobs in spoken(batch[c.trajectory]) for x in logprobs])
        a = torch.tensor(c.advantage)
        if c.component == "imitation":
            total = total - (a * pi).sum() / imitated
            continue
        if c.component == "pair":
            assert c.rejected is not None
            gain = [(now[t][0] - ref[t][0]).sum() for t in (c.trajectory, c.rejected)]
            total = total - a * torch.nn.functional.logsigmoid(p.beta * (gain[0] - gain[1])) / number("pair")
            continue
        if c.component == "policy":
            ratio = torch.exp(pi - before)
            if p.importance_sampling_level == "sequence":
                ratio = torch.exp((pi.detach() - before).mean()) * torch.exp(pi - pi.detach())
            clipped = ratio.clamp(1 - p.epsilon, 1 + p.epsilon_high)
            per_token = torch.exp(before - mu).clamp(max=p.importance_cap) * torch.maximum(-a * ratio, -a * clipped)
        elif c.component == "reinforce":
            per_token = -torch.exp(pi.detach() - mu).clamp(max=p.importance_cap) * a * pi
        else:
            per_token = 0.1 * pi**2 - a * torch.exp(pi - before) * torch.exp(before - mu)
        if c.component != "own":
            d = ref[c.trajectory][0] - pi
            k3 = (torch.exp(d) - d - 1) * torch.exp(pi - before)
            per_token = per_token + p.beta * (d**2 / 2 if p.kl_estimator == "k2" else k3) - p.entropy_coef * entropy
        divisor = {
            "dapo": tokens(c.component),
            "grpo": len(pi) * number(c.component),
            "dr_grpo": p.max_completion_length * number(c.component),
        }[p.loss_type]
        total = total + per_token.sum() / divisor
    return total


def steps_of(
    job: TrainJob, batch: Mapping[str, Trajectory], credit: Sequence[Credit]
) -> tuple[list[tuple[dict[str, Tensor], Gradients, float]], UpdateMetrics]:
    """The adapter before each optimiser step, that step's gradient and loss; and the update's figures."""
    found: list[tuple[dict[str, Tensor], Gradients, float]] = []
    adapters = [adapter(job)]

    def watch(figures: dict[str, float]) -> None:
        found.append((adapters[-1], gradients(job), figures["loss"]))
        adapters.append(adapter(job))

    assert isinstance(job.algorithm, Given)
    job.algorithm.given = list(credit)
    metrics = job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, job.iteration, watch)
    return found, metrics


CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "entropy": {"entropy_coef": 0.05},
    "k2": {"beta": 0.2},
    "k3": {"beta": 0.2, "kl_estimator": "k3", "loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 7},
}


@pytest.mark.parametrize("max_nodes", [1, 60, 4096])
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_step_has_the_gradient_of_plain_passes_and_plain_losses(
    base: Path, parent: dict[str, bytes], case: str, max_nodes: int
) -> None:
    params = {**EXACT, "beta": 0.1, **CASES[case], "num_iterations": 2, "num_mini_batches": 2, "max_nodes": max_nodes}
    job = TrainJob(base, Own(), {**params, "heat": 0.1}, 2, parent)
    other = make_job(base, params, seed=2, parent_adapter=parent)
    batch = conversations(other.model, seed=3)
    credit = all_components(batch)
    found, metrics = steps_of(job, batch, credit)
    assert len(found) == 4
    assert metrics.trained_tokens == sum(
        sum(len(ids) for _, ids, _, _ in spoken(batch[t]))
        for c in credit
        for t in ([c.trajectory, c.rejected] if c.rejected else [c.trajectory])
    )
    with torch.no_grad():
        old = plain(other.model, batch)
        with other.model.disable_adapter():
            ref = plain(other.model, batch)
    losses = []
    for i, (tensors, gradient, loss) in enumerate(found):
        set_adapter_tensors(other.model, tensors)
        part = [c for c in credit if c.trajectory.startswith(f"g{i % 2}")]
        here = {t: x for t, x in batch.items() if t.startswith(f"g{i % 2}")}
        for p in other.model.parameters():
            p.grad = None
        wanted = plain_loss(plain(other.model, here), old, ref, batch, part, job.params)
        wanted.backward()  # type: ignore[no-untyped-call]
        losses.append(float(wanted.detach()))
        within(f"gradient of a step ({case})", "plain padded forward", apart(gradient, gradients(other)), 1e-5)
        within(f"loss of a step ({case})", "plain padded forward", abs(loss - losses[-1]) / abs(losses[-1]), 1e-5)
    assert len(set(losses)) == 4
    assert metrics.clip_fraction > 0


def test_only_states_before_sampled_tokens_are_read(base: Path, parent: dict[str, bytes]) -> None:
    """States at the prompt, at what tools and environment said and at ends of turns are replaced by NaN."""
    params = {**EXACT, "beta": 0.1, "entropy_coef": 0.05, "num_iterations": 2}
    clean, poisoned = (TrainJob(base, Own(), {**params, "heat": 0.1}, 2, parent) for _ in range(2))
    batch = conversations(clean.model, seed=3)
    credit = all_components(batch)
    before_sampled = {
        tuple(prompt + ids[:t]) for x in batch.values() for prompt, ids, _, _ in spoken(x) for t in range(len(ids))
    }
    wanted, _ = steps_of(clean, batch, credit)
    hidden = 0

    def poison(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal hidden
        ancestors = kwargs["attention_mask"][0, 0] == 0
        keep = torch.tensor([tuple(kwargs["input_ids"][0, row].tolist()) in before_sampled for row in ancestors])
        hidden += int((~keep).sum())
        output.last_hidden_state = torch.where(keep[None, :, None], output.last_hidden_state, torch.nan)
        return output

    decoder(poisoned).register_forward_hook(poison, with_kwargs=True)
    got, _ = steps_of(poisoned, batch, credit)
    assert hidden > 0
    for (_, a, one), (_, b, other) in zip(wanted, got, strict=True):
        assert one == other
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert poisoned.checkpoint() == clean.checkpoint()


def test_large_trees_that_compute_activations_again_have_the_same_gradient(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dropout in (0.0, 0.3):
        params = {**EXACT, "lora_dropout": dropout, "max_nodes": 4096, "max_ratio": 1e9, "max_kl": 1e9}
        kept, again = (make_job(base, params, seed=2, parent_adapter=parent) for _ in range(2))
        batch = sample_batch(kept, seed=7)
        credit = [c for c in alternating_credit(batch) if not dropout or c.component == "imitation"]
        monkeypatch.setattr(learner, "KEEP_BYTES", 2**60)
        train(kept, batch, credit, 0)
        monkeypatch.setattr(learner, "KEEP_BYTES", 0)
        passes = []
        layer: Any = again.model.get_base_model().get_decoder().layers[0]  # type: ignore[operator]
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))  # noqa: B023
        train(again, batch, credit, 0)
        assert passes.count(True) == 2
        what = f"gradient with activations computed again (dropout {dropout:g})"
        within(what, "activations kept", apart(gradients(again), gradients(kept)), 1e-6)


def test_bfloat16_weights_train_near_the_gradient_of_float32(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {**EXACT, "max_ratio": 1e9, "max_kl": 9.0, "entropy_coef": 0.01}
    whole = make_job(base, params, 2, parent)
    monkeypatch.setattr(learner, "load_model", lambda folder: load_model(folder).to(torch.bfloat16))
    half = make_job(base, params, 2, parent)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    batch = sample_batch(whole, seed=7)
    credit = alternating_credit(batch)
    for job in (whole, half):
        train(job, batch, credit, 0)
    one, other = (torch.cat([g.flatten() for g in gradients(job).values()]) for job in (whole, half))
    deviation = float((one - other).norm() / one.norm())
    assert deviation > 0
    within("gradient in bfloat16 (norm of the difference)", "float32", deviation, 0.1)


def test_what_all_embeddings_have_in_common_does_not_blur_the_gradient() -> None:
    """exp(log_softmax) has sums 1e-6 off, which the common part of the embeddings multiplies; softmax has not."""
    generator = torch.Generator().manual_seed(5)
    vocabulary, width, rows = 5000, 64, 40
    weight = torch.randn(vocabulary, width, generator=generator) * 0.05 + 2 * torch.randn(width, generator=generator)
    hidden = torch.randn(rows, width, generator=generator)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    heat, source = torch.ones(rows), torch.arange(rows)

    def by_autograd(dtype: torch.dtype) -> Tensor:
        x = hidden.to(dtype).requires_grad_()
        logits = x @ weight.to(dtype).T
        torch.log_softmax(logits, -1)[source, target].sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad.double()

    x = hidden.clone().requires_grad_()
    head: Any = _Head.apply
    head(x, weight, None, source, target, heat, False)[0].sum().backward()
    exact, rounded = by_autograd(torch.float64), by_autograd(torch.float32)
    assert x.grad is not None
    ours, theirs = (float((g.double() - exact).norm() / exact.norm()) for g in (x.grad, rounded))
    assert ours < theirs / 2
    within("gradient of the head in float32", "float64", ours, 1e-5)
