"""The losses: their maths, and what they must not depend on."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from bascule.schemas.errors import TrainError
from bascule.trainers.loss import (
    LossInputs,
    PolicyParams,
    add_sums,
    effective_sample_size,
    imitation_loss,
    policy_loss,
)

PARAMS = PolicyParams(epsilon=0.2, epsilon_high=0.28, importance_cap=2.0, beta=0.1)


def random_inputs(m: int, seed: int = 0) -> LossInputs:
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(m, generator=g, dtype=torch.float64)

    logprobs = -noise(1.0).abs()
    return LossInputs(
        logprobs=logprobs,
        old=logprobs + noise(0.3),
        behaviour=logprobs + noise(0.6),
        advantage=noise(1.0),
        mask=torch.rand(m, generator=g) < 0.8,
        reference=logprobs + noise(0.5),
    )


def at(inputs: LossInputs, index: object) -> LossInputs:
    return LossInputs(**{f.name: getattr(inputs, f.name)[index] for f in fields(inputs)})


def test_on_policy_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage() -> None:
    inputs = random_inputs(50)
    inputs = replace(inputs, old=inputs.logprobs, behaviour=inputs.logprobs, reference=None)
    tokens = float(inputs.mask.sum())
    out = policy_loss(inputs, PARAMS, tokens)
    assert out.loss.item() == pytest.approx(-(inputs.advantage * inputs.mask).sum().item() / tokens)
    assert (out.sums.clipped, out.sums.kl_behaviour, effective_sample_size(out.sums)) == (0, 0, 1)


def test_policy_loss_matches_the_definition_token_by_token() -> None:
    inputs = random_inputs(200)
    expected = 0.0
    for pi, old, mu, a, m, ref in zip(*(getattr(inputs, f.name).tolist() for f in fields(inputs)), strict=True):
        if m:
            r, w = 2.718281828459045 ** (pi - old), min(2.718281828459045 ** (old - mu), 2.0)
            expected += -w * min(r * a, min(max(r, 0.8), 1.28) * a) + 0.1 * (pi - ref) ** 2 / 2
    out = policy_loss(inputs, PARAMS, 120.0)
    assert out.loss.item() == pytest.approx(expected / 120)
    assert 0 < out.sums.clipped < out.sums.tokens
    assert 0 < effective_sample_size(out.sums) < 1


@pytest.mark.parametrize("component", ["policy", "imitation"])
def test_splitting_and_reordering_do_not_change_loss_or_gradient(component: str) -> None:
    inputs = random_inputs(97)
    inputs = replace(inputs, advantage=inputs.advantage.abs())

    def run(order: torch.Tensor, size: int) -> tuple[float, torch.Tensor, object]:
        leaf = inputs.logprobs.clone().requires_grad_()
        parts = [at(replace(inputs, logprobs=leaf), order[i : i + size]) for i in range(0, len(order), size)]
        outs = [policy_loss(p, PARAMS, 80.0) if component == "policy" else imitation_loss(p, 80.0) for p in parts]
        loss = torch.stack([o.loss for o in outs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return loss.item(), leaf.grad, add_sums(o.sums for o in outs)

    whole = run(torch.arange(97), 97)
    split = run(torch.randperm(97, generator=torch.Generator().manual_seed(1)), 7)
    assert split[0] == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(split[1], whole[1], rtol=0, atol=1e-12)
    assert vars(split[2]) == pytest.approx(vars(whole[2]))


def test_tokens_outside_the_mask_change_nothing_even_as_nan() -> None:
    inputs = random_inputs(40)
    spoiled = LossInputs(
        **{
            f.name: getattr(inputs, f.name)
            if f.name == "mask"
            else torch.where(inputs.mask, getattr(inputs, f.name), torch.nan)
            for f in fields(inputs)
        }
    )
    for x in (inputs, spoiled):
        x.logprobs.requires_grad_()
    for clean, odd in (
        (policy_loss(inputs, PARAMS, 30.0), policy_loss(spoiled, PARAMS, 30.0)),
        (imitation_loss(inputs, 30.0), imitation_loss(spoiled, 30.0)),
    ):
        assert odd.loss.item() == clean.loss.item()
        assert odd.sums == clean.sums
        (gradient,) = torch.autograd.grad(odd.loss, spoiled.logprobs)
        assert torch.equal(gradient, torch.autograd.grad(clean.loss, inputs.logprobs)[0])
        assert not gradient[~inputs.mask].any()


@pytest.mark.parametrize("count", [0, 5])
def test_rows_without_trained_tokens_contribute_a_differentiable_zero(count: int) -> None:
    inputs = replace(random_inputs(count), mask=torch.zeros(count, dtype=torch.bool))
    inputs.logprobs.requires_grad_()
    loss = policy_loss(inputs, PARAMS, 0.0).loss + imitation_loss(inputs, 0.0).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert inputs.logprobs.grad is not None
    assert not inputs.logprobs.grad.any()


def test_a_denominator_under_one_is_taken_as_one() -> None:
    inputs = random_inputs(10)
    assert policy_loss(inputs, PARAMS, 0.0).loss.item() == policy_loss(inputs, PARAMS, 1.0).loss.item()
    assert imitation_loss(inputs, 0.25).loss.item() == imitation_loss(inputs, 1.0).loss.item()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_loss_that_is_not_finite_is_refused_with_its_value(value: float) -> None:
    inputs = random_inputs(4)
    bad = replace(inputs, mask=torch.ones(4, dtype=torch.bool), logprobs=torch.full((4,), value, dtype=torch.float64))
    with pytest.raises(TrainError, match="loss is"):
        policy_loss(bad, PARAMS, 4.0)
    with pytest.raises(TrainError, match="loss is"):
        imitation_loss(replace(bad, advantage=torch.ones(4)), 4.0)


def test_gradients_of_a_toy_policy_equal_finite_differences() -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 5, generator=g, dtype=torch.float64, requires_grad=True)
    chosen = torch.randint(5, (6,), generator=g)
    inputs = random_inputs(6, seed=4)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, -1)[torch.arange(6), chosen]
        both = replace(inputs, logprobs=logprobs)
        return policy_loss(both, PARAMS, 5.0).loss + imitation_loss(replace(both, mask=~inputs.mask), 2.0).loss

    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7)


def test_the_kl_penalty_has_the_gradient_of_the_divergence() -> None:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), -1)
    pi = torch.log_softmax(logits, -1)
    exact = (pi.exp() * (pi - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    # The expectation over tokens drawn from the policy, taken exactly: each token's loss weighted by its probability.
    got = torch.zeros_like(wanted)
    for token in range(7):
        one = slice(token, token + 1)
        inputs = LossInputs(
            logprobs=pi[one],
            old=pi[one].detach(),
            behaviour=pi[one].detach(),
            advantage=torch.zeros(1, dtype=torch.float64),
            mask=torch.ones(1, dtype=torch.bool),
            reference=reference[one],
        )
        loss = policy_loss(inputs, PolicyParams(beta=1.0), 1.0).loss
        got += pi[token].exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(got, wanted)
