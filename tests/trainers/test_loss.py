"""The losses: their maths against plain Python and finite differences, and what they must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bascule.schemas.errors import TrainError
from bascule.trainers.loss import (
    LossInputs,
    LossOutputs,
    LossSums,
    add_sums,
    effective_sample_size,
    imitation_loss,
    pair_loss,
    policy_loss,
    reinforce_loss,
    value_loss,
)
from bascule.trainers.params import TrainParams
from tests.oracles import within

PARAMS = TrainParams(beta=0.1, entropy_coef=0.02)
VARIANTS = {
    "policy": PARAMS,
    "policy, k3": TrainParams(beta=0.1, kl_estimator="k3"),
    "policy, delta": TrainParams(delta=1.4),
    "policy, dual clip": TrainParams(clip_ratio_c=1.5),
    "policy, sequence": TrainParams(importance_sampling_level="sequence", epsilon=0.02, epsilon_high=0.02),
    "reinforce": PARAMS,
    "imitation": PARAMS,
    "pair, sigmoid": TrainParams(beta=0.3),
    "pair, smoothed": TrainParams(beta=0.3, label_smoothing=0.1),
    "pair, ipo": TrainParams(beta=0.3, pair_loss="ipo"),
    "value": TrainParams(vf_coef=0.5, cliprange_value=0.2),
}


def random_inputs(m: int, seed: int = 0, sequences: int = 6) -> LossInputs:
    """Tokens of trajectories of unequal length in a mixed order; advantage and weight are constant in each pair."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float, count: int = m) -> Tensor:
        return scale * torch.randn(count, generator=g, dtype=torch.float64)

    logprobs = -noise(1.0).abs() - 0.1
    sequence = torch.cat([torch.arange(sequences), torch.randint(sequences, (m,), generator=g)])[:m]
    pair = sequence // 2
    return LossInputs(
        logprobs=logprobs,
        old=logprobs + noise(0.4),
        behaviour=logprobs + noise(0.6),
        advantage=noise(1.0, sequences)[pair],
        weight=(noise(0.05, sequences).abs() + 0.01)[pair],
        sequence=sequence,
        sequences=sequences,
        reference=logprobs + noise(0.5),
        entropy=noise(1.0).abs(),
    )


def component(variant: str) -> str:
    return variant.partition(",")[0]


def loss_of(variant: str, inputs: LossInputs) -> LossOutputs:
    params = VARIANTS[variant]
    match component(variant):
        case "policy":
            return policy_loss(inputs, params)
        case "reinforce":
            return reinforce_loss(inputs, params)
        case "imitation":
            return imitation_loss(inputs)
        case "pair":
            return pair_loss(replace(inputs, advantage=inputs.advantage.abs()), params)
    loss = value_loss(inputs.logprobs, inputs.old, inputs.behaviour, inputs.weight, params)
    return LossOutputs(loss, LossSums())


def at(inputs: LossInputs, index: Any) -> LossInputs:
    """Some of the tokens, in the order of ``index``."""
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name != "sequences"}
    return replace(inputs, **{name: None if t is None else t[index] for name, t in tensors.items()})


def rows(inputs: LossInputs) -> list[dict[str, float]]:
    names = [f.name for f in fields(inputs) if f.name != "sequences"]
    return [dict(zip(names, r, strict=True)) for r in zip(*(getattr(inputs, n).tolist() for n in names), strict=True)]


def relative(got: Tensor | float, wanted: Tensor | float) -> float:
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, wanted))
    return float((a - b).norm() / b.norm())


def plain_surrogate(t: dict[str, float], ratio: float, params: TrainParams) -> float:
    """PPO's clip in cases instead of minima: what of the ratio counts for a token's advantage."""
    a, low, high = t["advantage"], 1 - params.epsilon, 1 + params.epsilon_high
    if a > 0:
        counted = min(ratio, high, params.delta or math.inf)
    else:
        counted = max(low, min(ratio, params.delta or math.inf))
        if params.clip_ratio_c is not None:
            counted = min(counted, params.clip_ratio_c)
    return -min(math.exp(t["old"] - t["behaviour"]), params.importance_cap) * a * counted


def plain_penalty(t: dict[str, float], params: TrainParams) -> float:
    d = t["reference"] - t["logprobs"]
    k2, k3 = d * d / 2, (math.exp(d) - d - 1) * math.exp(t["logprobs"] - t["old"])
    return params.beta * (k2 if params.kl_estimator == "k2" else k3) - params.entropy_coef * t["entropy"]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("policy")])
def test_policy_loss_is_its_definition_token_by_token(variant: str) -> None:
    inputs, params, wanted = random_inputs(200), VARIANTS[variant], 0.0
    inputs = replace(
        inputs, advantage=torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    )
    tokens = rows(inputs)
    cut = 0
    for t in tokens:
        same = [u for u in tokens if u["sequence"] == t["sequence"]] if "sequence" in variant else [t]
        ratio = math.exp(math.fsum(u["logprobs"] - u["old"] for u in same) / len(same))
        wanted += t["weight"] * (plain_surrogate(t, ratio, params) + plain_penalty(t, params))
        unbounded = plain_surrogate(t, ratio, TrainParams(epsilon=0.999, epsilon_high=1e9))
        cut += not math.isclose(plain_surrogate(t, ratio, params), unbounded)
    out = policy_loss(inputs, params)
    within(variant, "plain Python", relative(out.loss, wanted), 1e-12)
    assert out.sums.clipped == cut
    assert 0 < cut < out.sums.tokens == 200


def test_reinforce_loss_is_its_definition_token_by_token() -> None:
    inputs, wanted = random_inputs(200), 0.0
    for t in rows(inputs):
        weight = min(math.exp(t["logprobs"] - t["behaviour"]), PARAMS.importance_cap)
        wanted += t["weight"] * (-weight * t["advantage"] * t["logprobs"] + plain_penalty(t, PARAMS))
    out = reinforce_loss(inputs, PARAMS)
    within("reinforce", "plain Python", relative(out.loss, wanted), 1e-12)
    assert out.sums.clipped == 0


def test_reinforce_cuts_no_gradient_and_treats_its_importance_weight_as_constant() -> None:
    inputs = random_inputs(200)
    inputs.logprobs.requires_grad_()
    (got,) = torch.autograd.grad(reinforce_loss(inputs, TrainParams(importance_cap=1.5)).loss, inputs.logprobs)
    importance = (inputs.logprobs - inputs.behaviour).exp().clamp(max=1.5).detach()
    assert 0 < (importance == 1.5).sum() < 200
    within("reinforce, gradient", "closed form", relative(got, -inputs.weight * importance * inputs.advantage), 1e-12)


def test_the_sums_describe_sampler_and_reference() -> None:
    inputs = random_inputs(200)
    tokens = rows(inputs)
    capped = [min(math.exp(t["old"] - t["behaviour"]), 2.0) for t in tokens]
    sums = policy_loss(inputs, PARAMS).sums
    assert sums.importance == pytest.approx(sum(capped))
    assert sums.importance_squared == pytest.approx(sum(w * w for w in capped))
    drifts = [t["old"] - t["behaviour"] for t in tokens]
    assert sums.kl_behaviour == pytest.approx(sum(math.exp(d) - d - 1 for d in drifts))
    assert sums.kl_reference == pytest.approx(sum((t["reference"] - t["logprobs"]) ** 2 / 2 for t in tokens))
    assert effective_sample_size(sums) == pytest.approx(sum(capped) ** 2 / (200 * sum(w * w for w in capped)))
    without = policy_loss(replace(inputs, reference=None, entropy=None), TrainParams()).sums
    assert without.kl_reference == 0


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("pair")])
def test_pair_loss_is_its_definition_pair_by_pair(variant: str) -> None:
    inputs, params = random_inputs(60), VARIANTS[variant]
    tokens = rows(inputs)
    wanted = margins = 0.0
    hits = 0
    for k in range(3):
        sides = [[t for t in tokens if t["sequence"] == 2 * k + side] for side in (0, 1)]
        gains = [math.fsum(t["logprobs"] - t["reference"] for t in side) for side in sides]
        share = abs(sides[0][0]["advantage"]) * sides[0][0]["weight"]
        if params.pair_loss == "ipo":
            wanted += share * (gains[0] / len(sides[0]) - gains[1] / len(sides[1]) - 1 / (2 * params.beta)) ** 2
        else:
            right = 1 / (1 + math.exp(-params.beta * (gains[0] - gains[1])))
            e = params.label_smoothing
            wanted -= share * ((1 - e) * math.log(right) + e * math.log(1 - right))
        margins += params.beta * (gains[0] - gains[1])
        hits += gains[0] > gains[1]
    out = loss_of(variant, inputs)
    within(variant, "plain Python", relative(out.loss, wanted), 1e-12)
    assert (out.sums.pairs, out.sums.pair_accuracy) == (3, hits)
    assert out.sums.pair_margin == pytest.approx(margins)


def test_value_loss_is_its_definition_token_by_token() -> None:
    inputs, params = random_inputs(200), VARIANTS["value"]
    wanted = 0.0
    worse = 0
    for t in rows(inputs):
        value, old, target = t["logprobs"], t["old"], t["behaviour"]
        near = min(max(value, old - params.cliprange_value), old + params.cliprange_value)
        wanted += params.vf_coef * t["weight"] * 0.5 * max((value - target) ** 2, (near - target) ** 2)
        worse += (near - target) ** 2 > (value - target) ** 2
    within("value", "plain Python", relative(loss_of("value", inputs).loss, wanted), 1e-12)
    assert 0 < worse < 200


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(level: Any) -> None:
    inputs = random_inputs(50)
    inputs = replace(
        inputs, old=inputs.logprobs, behaviour=inputs.logprobs, weight=torch.full_like(inputs.logprobs, 1 / 50)
    )
    out = policy_loss(inputs, TrainParams(importance_sampling_level=level))
    within("policy, on-policy", "minus the mean advantage", relative(out.loss, -inputs.advantage.mean()), 1e-12)
    assert (out.sums.clipped, out.sums.kl_behaviour, effective_sample_size(out.sums)) == (0, 0, 1)


def test_on_policy_ppo_and_reinforce_have_the_same_gradient() -> None:
    inputs = random_inputs(50)
    inputs = replace(inputs, old=inputs.logprobs.clone(), behaviour=inputs.logprobs.clone())
    inputs.logprobs.requires_grad_()
    (policy,) = torch.autograd.grad(policy_loss(inputs, TrainParams()).loss, inputs.logprobs)
    (reinforce,) = torch.autograd.grad(reinforce_loss(inputs, TrainParams()).loss, inputs.logprobs)
    within("reinforce, gradient", "policy, gradient, on-policy", relative(reinforce, policy), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_splitting_and_reordering_change_neither_loss_nor_gradient_nor_sums(variant: str) -> None:
    inputs = random_inputs(97)

    def run(parts: list[Tensor]) -> tuple[Tensor, Tensor, LossSums]:
        leaf = inputs.logprobs.clone().requires_grad_()
        outs = [loss_of(variant, at(replace(inputs, logprobs=leaf), part)) for part in parts]
        loss = torch.stack([o.loss for o in outs]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss, gradient, add_sums(o.sums for o in outs)

    mixed = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    takes_trajectories = variant.startswith("pair") or "sequence" in variant
    whole = run([torch.arange(97)])
    split = run([mixed] if takes_trajectories else [mixed[:20], mixed[20:21], mixed[21:]])
    torch.testing.assert_close(split[:2], whole[:2], rtol=1e-12, atol=1e-14)
    assert vars(split[2]) == pytest.approx(vars(whole[2]))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("pair") or "sequence" in v])
def test_pairs_and_trajectories_may_be_spread_over_micro_batches(variant: str) -> None:
    inputs = random_inputs(97)
    parts = []
    for k in range(3):
        part = at(inputs, inputs.sequence // 2 == k)
        parts.append(loss_of(variant, replace(part, sequence=part.sequence - 2 * k, sequences=2)))
    whole = loss_of(variant, inputs)
    total = torch.stack([p.loss for p in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    assert vars(add_sums(p.sums for p in parts)) == pytest.approx(vars(whole.sums))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens_give_a_differentiable_zero(variant: str) -> None:
    inputs = replace(at(random_inputs(6), slice(0, 0)), sequences=0)
    inputs.logprobs.requires_grad_()
    out = loss_of(variant, inputs)
    (gradient,) = torch.autograd.grad(out.loss, inputs.logprobs)
    assert out.loss.item() == 0
    assert gradient.shape == (0,)
    assert out.sums == LossSums()
    assert effective_sample_size(out.sums) == 1


def test_other_components_leave_the_effective_sample_size_as_it_is() -> None:
    inputs = random_inputs(60)
    policy = loss_of("policy", inputs).sums
    others = [loss_of(v, inputs).sums for v in ("imitation", "pair, sigmoid", "value")]
    assert effective_sample_size(add_sums([policy, *others])) == effective_sample_size(policy) < 1


def test_no_micro_batches_add_up_to_nothing() -> None:
    assert add_sums([]) == LossSums()


@pytest.mark.parametrize(
    ("variant", "value"),
    [*((v, math.nan) for v in VARIANTS), *((v, -math.inf) for v in ("policy", "reinforce", "imitation", "value"))],
)
def test_a_loss_that_is_not_finite_is_refused_by_name(variant: str, value: float) -> None:
    inputs = random_inputs(12)
    logprobs = inputs.logprobs.clone()
    logprobs[3] = value
    with pytest.raises(TrainError, match=rf"The {component(variant)} loss is (nan|-?inf)"):
        loss_of(variant, replace(inputs, logprobs=logprobs, advantage=inputs.advantage.abs() + 0.1))


@pytest.mark.parametrize("loss", [policy_loss, reinforce_loss])
@pytest.mark.parametrize(("missing", "said"), [("reference", "beta > 0"), ("entropy", "entropy_coef > 0")])
def test_a_regulariser_without_its_stream_is_refused(loss: Callable[..., Any], missing: str, said: str) -> None:
    with pytest.raises(TrainError, match=f"{said} needs"):
        loss(replace(random_inputs(5), **{missing: None}), PARAMS)


def test_pairs_without_a_reference_are_refused() -> None:
    with pytest.raises(TrainError, match=r"The pair loss needs the reference"):
        pair_loss(replace(random_inputs(6), reference=None), VARIANTS["pair, ipo"])


def test_imitation_and_pairs_read_no_behaviour_log_probabilities() -> None:
    inputs = replace(random_inputs(20), behaviour=torch.full((20,), math.nan), old=torch.full((20,), math.nan))
    for variant in ("imitation", "pair, sigmoid"):
        assert math.isfinite(loss_of(variant, inputs).loss.item())


def test_far_references_give_a_large_but_finite_penalty() -> None:
    inputs = random_inputs(8)
    inputs = replace(inputs, old=inputs.logprobs, behaviour=inputs.logprobs, reference=inputs.logprobs + 900)
    assert math.isfinite(policy_loss(inputs, TrainParams(beta=0.1, kl_estimator="k3")).loss.item())


def finite_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central ones, of every entry of x."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        moved = torch.zeros_like(x).view(-1)
        moved[i] = step
        ends = [function(x + sign * moved.view_as(x)) for sign in (1, -1)]
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_a_toy_policy_equals_finite_differences(variant: str) -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 5, generator=g, dtype=torch.float64)
    chosen = torch.randint(5, (24,), generator=g)
    start = torch.log_softmax(logits, -1)[torch.arange(24), chosen]
    fixed = random_inputs(24, seed=4)
    drift = {name: getattr(fixed, name) - fixed.logprobs for name in ("old", "behaviour", "reference")}
    fixed = replace(fixed, **{name: start + d for name, d in drift.items()})
    if "sequence" in variant:
        fixed = replace(fixed, behaviour=fixed.old)
    if variant == "reinforce":
        # The weight is held as it is: the gradient is to be that of the loss with a constant weight.
        importance = (start - fixed.behaviour).exp().clamp(max=PARAMS.importance_cap)

    def inputs_of(logits: Tensor) -> LossInputs:
        all_logprobs = torch.log_softmax(logits, -1)
        logprobs = all_logprobs[torch.arange(24), chosen]
        return replace(fixed, logprobs=logprobs, entropy=-(all_logprobs.exp() * all_logprobs).sum(-1))

    def value(logits: Tensor) -> Tensor:
        inputs = inputs_of(logits)
        if variant == "reinforce":
            penalty = reinforce_loss(replace(inputs, advantage=torch.zeros(24)), PARAMS).loss
            return penalty - (inputs.weight * importance * inputs.advantage * inputs.logprobs).sum()
        return loss_of(variant, inputs).loss

    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss_of(variant, inputs_of(leaf)).loss, leaf)
    within(f"{variant}, gradient", "finite differences", relative(got, finite_differences(value, logits)), 1e-6)


def kl_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, the policy's and the reference's log-probabilities, and the exact gradient of KL(policy || reference)."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), -1)
    pi = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits, retain_graph=True)
    return logits, pi, reference, exact


def every_token(pi: Tensor, sampler: Tensor, reference: Tensor) -> LossInputs:
    """Each token of the vocabulary once, weighted by the sampler's probability: an expectation taken exactly."""
    return LossInputs(
        logprobs=pi,
        old=sampler,
        behaviour=sampler,
        advantage=torch.zeros_like(sampler),
        weight=sampler.exp(),
        sequence=torch.arange(7),
        sequences=7,
        reference=reference,
    )


@pytest.mark.parametrize("loss", [policy_loss, reinforce_loss])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_penalty_has_the_gradient_of_the_divergence(loss: Callable[..., Any], estimator: Any) -> None:
    logits, pi, reference, exact = kl_problem()
    out = loss(every_token(pi, pi.detach(), reference), TrainParams(beta=1.0, kl_estimator=estimator))
    (got,) = torch.autograd.grad(out.loss, logits)
    name = {"k2": "k2 in the loss", "k3": "ratio * k3 in the loss"}[estimator]
    within(f"{name}, gradient", "KL of the exact softmax", relative(got, exact), 1e-12)


def test_ratio_times_k3_has_it_also_when_another_policy_sampled() -> None:
    logits, pi, reference, exact = kl_problem()
    sampler = torch.log_softmax(torch.linspace(-1, 1, 7, dtype=torch.float64), -1)
    out = policy_loss(every_token(pi, sampler, reference), TrainParams(beta=1.0, kl_estimator="k3"))
    (got,) = torch.autograd.grad(out.loss, logits)
    within("ratio * k3 off-policy, gradient", "KL of the exact softmax", relative(got, exact), 1e-12)
    assert out.sums.kl_reference > 0
    assert out.loss.item() == pytest.approx((pi.exp() * (pi - reference)).sum().item())


def test_bare_k1_and_k3_would_not_have_it() -> None:
    logits, pi, reference, exact = kl_problem()
    d = reference - pi
    (k1,) = torch.autograd.grad((pi.exp().detach() * -d).sum(), logits, retain_graph=True)
    (k3,) = torch.autograd.grad((pi.exp().detach() * (d.exp() - d - 1)).sum(), logits)
    assert k1.abs().max() < 1e-12
    assert relative(k3, exact) > 0.1
