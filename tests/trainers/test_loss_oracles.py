"""The losses against those of TRL and stable-baselines3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bascule.trainers.loss import LossInputs, imitation_loss, pair_loss, policy_loss, reinforce_loss, value_loss
from bascule.trainers.params import TrainParams
from tests.oracles import within
from tests.tiny_model import make_tiny_model

BOUND = 1e-6
MAX_COMPLETION_LENGTH = 16
NO_EXTRAS = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape: the policy and the reference."""
    root = tmp_path_factory.mktemp("models")
    return make_tiny_model(root / "policy", seed=0), make_tiny_model(root / "reference", seed=1)


@pytest.fixture(scope="module")
def tokenizer(folders: tuple[Path, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folders[0])


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """TRL's trainers report themselves at their start; the environment was read when the library was first imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
            patch.setattr(f"huggingface_hub.constants.{name}", True)
        yield


def load(folder: Path) -> Any:
    """In float64, and with small logits: TRL's head computes in float32 and so rounds them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.get_output_embeddings().weight.data.mul_(0.2)
    return model


def next_logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T - 1] log-probabilities of each row's own next tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


@dataclass(frozen=True)
class Grid:
    """B completions of up to T tokens as TRL holds them; all tensors but ``advantages`` [B] are [B, T]."""

    logprobs: Tensor
    old: Tensor
    sampler: Tensor
    reference: Tensor
    entropy: Tensor
    advantages: Tensor
    completion_mask: Tensor
    tool_mask: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, T] true at sampled tokens."""
        return (self.completion_mask * self.tool_mask).bool()

    def inputs(self, loss_type: str) -> LossInputs:
        """The sampled tokens alone, each with its share of the step."""
        lengths = self.mask.sum(1, keepdim=True).expand_as(self.mask)[self.mask]
        rows = len(self.mask)
        divisor = {
            "dapo": torch.full_like(lengths, len(lengths)),
            "grpo": lengths * rows,
            "dr_grpo": torch.full_like(lengths, rows * MAX_COMPLETION_LENGTH),
        }[loss_type]
        return LossInputs(
            logprobs=self.logprobs[self.mask],
            old=self.old[self.mask],
            behaviour=self.sampler[self.mask],
            advantage=self.advantages[:, None].expand_as(self.mask)[self.mask],
            weight=1 / divisor.to(self.logprobs.dtype),
            sequence=torch.arange(rows)[:, None].expand_as(self.mask)[self.mask],
            sequences=rows,
            reference=self.reference[self.mask],
            entropy=self.entropy[self.mask],
        )


def random_grid(seed: int = 0) -> Grid:
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(6, 12, generator=g, dtype=torch.float64)

    logprobs = -noise(1.0).abs() - 0.1
    lengths = torch.tensor([12, 3, 7, 12, 1, 9])
    return Grid(
        logprobs=logprobs.requires_grad_(),
        old=logprobs.detach() + noise(0.4),
        sampler=logprobs.detach() + noise(0.5),
        reference=logprobs.detach() + noise(0.5),
        entropy=noise(1.0).abs(),
        advantages=torch.tensor([1.3, -0.7, 0.4, -1.1, 0.9, -0.2], dtype=torch.float64),
        completion_mask=(torch.arange(12) < lengths[:, None]).long(),
        tool_mask=(torch.rand(6, 12, generator=g) < 0.8).long().index_fill(1, torch.tensor([0]), 1),
    )


@pytest.fixture(scope="module")
def grpo(folders: tuple[Path, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=load(folders[0]),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("grpo")),
            num_generations=2,
            max_completion_length=MAX_COMPLETION_LENGTH,
            **NO_EXTRAS,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["What is 12 + 13?"] * 4}),
        processing_class=tokenizer,
    )
    trainer.model.eval()  # TRL then divides by nothing for gradient accumulation
    return trainer


def trl_grpo_loss(
    trainer: Any, params: TrainParams, grid: Grid, corrected: bool, loss_type: str | None = None, **tokens: Any
) -> Tensor:
    """GRPOTrainer's own loss of a prepared batch, with its settings made those of ``params``."""
    trainer.loss_type = loss_type or params.loss_type
    trainer.epsilon_low, trainer.epsilon_high = params.epsilon, params.epsilon_high
    trainer.args.delta = params.delta
    trainer.beta, trainer.args.use_bias_correction_kl = params.beta, True
    trainer.importance_sampling_level = params.importance_sampling_level
    trainer.entropy_coef, trainer._entropy_bonus_enabled = params.entropy_coef, params.entropy_coef > 0
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = corrected
    shape = grid.mask.shape
    batch = {
        "prompt_ids": torch.ones(shape[0], 1, dtype=torch.long),
        "prompt_mask": torch.ones(shape[0], 1, dtype=torch.long),
        "completion_ids": torch.ones(shape, dtype=torch.long),
        "completion_mask": grid.completion_mask,
        "tool_mask": grid.tool_mask,
        "advantages": grid.advantages,
        "old_per_token_logps": grid.old,
        "ref_per_token_logps": grid.reference,
        "importance_sampling_ratio": (grid.old - grid.sampler).exp().clamp(max=params.importance_cap),
        "num_items_in_batch": grid.mask.sum(),
    }
    return trainer._compute_loss(trainer.model, {**batch, **tokens})


GRPO = {
    "dapo": TrainParams(),
    "grpo": TrainParams(loss_type="grpo"),
    "dr_grpo": TrainParams(loss_type="dr_grpo"),
    "symmetric clip": TrainParams(epsilon=0.1, epsilon_high=0.1),
    "two-sided clip (delta)": TrainParams(delta=1.5),
    "two-sided clip below epsilon_high": TrainParams(delta=1.1),
    "ratio * k3 (beta)": TrainParams(loss_type="grpo", beta=0.2, kl_estimator="k3"),
    "entropy bonus": TrainParams(entropy_coef=0.05),
    "sequence level (GSPO)": TrainParams(importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.05),
    "sequence level, grpo": TrainParams(
        importance_sampling_level="sequence", loss_type="grpo", epsilon=0.1, epsilon_high=0.1
    ),
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", GRPO)
def test_policy_loss_and_its_gradient_are_trls(
    grpo: Any, name: str, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, grid = GRPO[name], random_grid()
    if corrected and params.importance_sampling_level == "sequence":
        # A token weight takes no part in a trajectory's ratio, so here it has to be one for the whole trajectory.
        shift = torch.linspace(-0.9, 0.9, 6, dtype=torch.float64)[:, None]
        grid = replace(grid, sampler=grid.old + shift)
    monkeypatch.setattr(grpo, "_get_per_token_logps_and_entropies", lambda *a, **k: (grid.logprobs, grid.entropy, None))
    wanted = trl_grpo_loss(grpo, params, grid, corrected)
    got = policy_loss((grid if corrected else replace(grid, sampler=grid.old)).inputs(params.loss_type), params)
    assert 0 < got.sums.clipped < got.sums.tokens
    within(f"policy, {name}", "TRL GRPOTrainer", relative(got.loss, wanted), BOUND)
    gradients = [torch.autograd.grad(loss, grid.logprobs)[0] for loss in (got.loss, wanted)]
    within(f"policy, {name}, gradient", "TRL GRPOTrainer", relative(*gradients), BOUND)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_policy_loss_and_the_models_gradient_are_trls_through_a_model(grpo: Any, loss_type: Any) -> None:
    params = TrainParams(loss_type=loss_type)
    g = torch.Generator().manual_seed(1)
    grid = random_grid()
    prompts, completions = torch.randint(3, 300, (6, 5), generator=g), torch.randint(3, 300, (6, 12), generator=g)
    ids, attended = torch.cat([prompts, completions], 1), torch.cat([torch.ones(6, 5).long(), grid.completion_mask], 1)
    logprobs = next_logprobs(grpo.model, ids, attended)[:, 4:]
    old = logprobs.detach() + 0.3 * torch.randn(6, 12, generator=g, dtype=torch.float64)
    # Advantages that nearly cancel would measure the rounding of TRL's float32 head against a loss of nearly 0.
    grid = replace(grid, logprobs=logprobs, old=old, sampler=old, advantages=grid.advantages + 1)
    wanted = trl_grpo_loss(
        grpo,
        params,
        grid,
        corrected=False,
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts),
        completion_ids=completions,
    )
    got = policy_loss(grid.inputs(loss_type), params).loss
    within(f"policy, {loss_type}, through a model", "TRL GRPOTrainer", relative(got, wanted), BOUND)
    weights = [p for p in grpo.model.parameters() if p.requires_grad]
    flat = [torch.cat([d.flatten() for d in torch.autograd.grad(loss, weights)]) for loss in (got, wanted)]
    within(f"policy, {loss_type}, model's gradient", "TRL GRPOTrainer", relative(*flat), 1e-5)


def test_reinforce_is_trls_cispo(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = random_grid()
    grid = replace(grid, sampler=grid.old)
    monkeypatch.setattr(grpo, "_get_per_token_logps_and_entropies", lambda *a, **k: (grid.logprobs, grid.entropy, None))
    wanted = trl_grpo_loss(grpo, TrainParams(epsilon_high=1.4), grid, corrected=False, loss_type="cispo")
    got = reinforce_loss(grid.inputs("dapo"), TrainParams(importance_cap=1.4)).loss
    within("reinforce", "TRL GRPOTrainer, cispo", relative(got, wanted), BOUND)
    gradients = [torch.autograd.grad(loss, grid.logprobs)[0] for loss in (got, wanted)]
    within("reinforce, gradient", "TRL GRPOTrainer, cispo", relative(*gradients), BOUND)


PAIRS = {
    "prompt": ["What is 12 + 13?", "A bascule is a balance with", "0 1 2 3"],
    "chosen": [" The answer is 25.", " two arms; one rises.", " 4 5 6 7 8 9"],
    "rejected": [" I do not know what it is.", " one arm", " 3 2 1"],
}


@pytest.fixture(scope="module")
def dpo(folders: tuple[Path, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=load(folders[0]),
        ref_model=load(folders[1]),
        args=DPOConfig(str(tmp_path_factory.mktemp("dpo")), **{**NO_EXTRAS, "per_device_train_batch_size": 3}),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    return trainer


def trl_dpo_loss(trainer: Any, params: TrainParams, loss_type: str, batch: Any, model: Any) -> Tensor:
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer.beta, trainer.label_smoothing = params.beta, params.label_smoothing
    return trainer._compute_loss(model, batch, False)


def pair_inputs(logprobs: Tensor, reference: Tensor, mask: Tensor) -> LossInputs:
    """From TRL's layout [2 B, T], all preferred ones first, to pairs side by side."""
    pairs = len(mask) // 2
    sequence = (2 * (torch.arange(2 * pairs) % pairs) + torch.arange(2 * pairs) // pairs)[:, None].expand_as(mask)
    one = torch.ones_like(logprobs[mask])
    return LossInputs(
        logprobs=logprobs[mask],
        old=logprobs[mask].detach(),
        behaviour=one * torch.nan,
        advantage=one,
        weight=one / pairs,
        sequence=sequence[mask],
        sequences=2 * pairs,
        reference=reference[mask],
    )


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_pair_loss_and_the_models_gradient_are_trls_on_text(dpo: Any, name: Any) -> None:
    params = TrainParams(beta=0.1, pair_loss=name)
    batch = next(iter(dpo.get_train_dataloader()))
    ids, attended = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        reference = next_logprobs(dpo.ref_model, ids, attended)
    mask = batch["completion_mask"][:, 1:].bool()
    out = pair_loss(pair_inputs(next_logprobs(dpo.model, ids, attended), reference, mask), params)
    wanted = trl_dpo_loss(dpo, params, name, batch, dpo.model)
    within(f"pair, {name}, on text", "TRL DPOTrainer", relative(out.loss, wanted), BOUND)
    weights = [p for p in dpo.model.parameters() if p.requires_grad]
    flat = [torch.cat([d.flatten() for d in torch.autograd.grad(loss, weights)]) for loss in (out.loss, wanted)]
    within(f"pair, {name}, model's gradient", "TRL DPOTrainer", relative(*flat), 1e-5)
    assert out.sums.pair_accuracy / 3 == pytest.approx(dpo._metrics["eval"]["rewards/accuracies"][-1])
    assert out.sums.pair_margin / 3 == pytest.approx(dpo._metrics["eval"]["rewards/margins"][-1], rel=1e-4)


def answering(logprobs: Tensor) -> Callable[..., Any]:
    """What TRL's fused head gives, for log-probabilities that are known: zero where no token is predicted."""
    zero = torch.zeros_like(logprobs)
    return lambda **_: SimpleNamespace(
        log_probs=logprobs, entropy=zero, mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=zero
    )


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "smoothed"])
def test_pair_loss_and_its_gradient_are_trls(dpo: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL 1.16 has cDPO's label smoothing in ``aot`` only, which for a single pair is the same loss."""
    params = TrainParams(
        beta=0.3, pair_loss="ipo" if name == "ipo" else "sigmoid", label_smoothing=0.2 if name == "smoothed" else 0.0
    )
    grid = random_grid()
    mask = grid.completion_mask.bool()
    out = pair_loss(pair_inputs(grid.logprobs, grid.reference, mask), params)
    parts = []
    for rows in [[k, k + 3] for k in range(3)] if name == "smoothed" else [list(range(6))]:
        kept = mask[rows]
        policy, reference = (torch.where(kept, x[rows], 0.0) for x in (grid.logprobs, grid.reference))
        monkeypatch.setattr(dpo, "ref_model", answering(reference))
        completion = torch.cat([torch.zeros(len(rows), 1).long(), kept.long()], 1)  # the prompt is one token
        batch = {"input_ids": torch.ones_like(completion), "completion_mask": completion, "attention_mask": completion}
        parts.append(trl_dpo_loss(dpo, params, "aot" if name == "smoothed" else name, batch, answering(policy)))
    wanted = torch.stack(parts).mean()
    within(f"pair, {name}", "TRL DPOTrainer", relative(out.loss, wanted), BOUND)
    gradients = [torch.autograd.grad(loss, grid.logprobs)[0] for loss in (out.loss, wanted)]
    within(f"pair, {name}, gradient", "TRL DPOTrainer", relative(*gradients), BOUND)


@pytest.fixture(scope="module")
def imitated(folders: tuple[Path, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    g = torch.Generator().manual_seed(2)
    tokens = [torch.randint(3, 300, (length,), generator=g).tolist() for length in (9, 14)]
    masks = [[0] * 3 + [1] * 6, [0] * 4 + [1] * 3 + [0] * 4 + [1] * 3]
    trainer = SFTTrainer(
        model=load(folders[0]),
        args=SFTConfig(str(tmp_path_factory.mktemp("sft")), completion_only_loss=True, **NO_EXTRAS),
        train_dataset=Dataset.from_dict({"input_ids": tokens, "completion_mask": masks}),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    return trainer


def test_imitation_loss_is_trls_and_that_of_transformers(imitated: Any) -> None:
    batch = next(iter(imitated.get_train_dataloader()))
    ids, labels = batch["input_ids"], batch["labels"]
    mask = labels[:, 1:] != -100
    assert mask.sum() == 12
    logprobs = next_logprobs(imitated.model, ids, batch["attention_mask"])[mask]
    one = torch.ones_like(logprobs)
    got = imitation_loss(
        LossInputs(
            logprobs=logprobs,
            old=one * torch.nan,
            behaviour=one * torch.nan,
            advantage=one,
            weight=one / len(one),
            sequence=torch.arange(2)[:, None].expand_as(mask)[mask],
            sequences=2,
        )
    ).loss
    model_loss = imitated.model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels).loss
    sft_loss = imitated.compute_loss(imitated.model, dict(batch))
    weights = [p for p in imitated.model.parameters() if p.requires_grad]
    ours, theirs, trls = (
        torch.cat([d.flatten() for d in torch.autograd.grad(loss, weights)]) for loss in (got, model_loss, sft_loss)
    )
    within("imitation", "transformers", relative(got, model_loss), BOUND)
    within("imitation", "TRL SFTTrainer", relative(got, sft_loss), BOUND)
    within("imitation, model's gradient", "transformers", relative(ours, theirs), 1e-5)
    within("imitation, model's gradient", "TRL SFTTrainer", relative(ours, trls), 1e-5)


class KnownPolicy(torch.nn.Module):
    """A policy of stable-baselines3 whose answers are its parameters."""

    def __init__(self, values: Tensor, logprobs: Tensor, entropy: Tensor) -> None:
        super().__init__()
        self.values, self.logprobs, self.entropy = (torch.nn.Parameter(x.clone()) for x in (values, logprobs, entropy))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.0)

    def set_training_mode(self, mode: bool) -> None:
        self.train(mode)

    def evaluate_actions(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.logprobs, self.entropy


def test_policy_and_value_loss_are_those_of_stable_baselines3() -> None:
    """Its critic's loss has no half and, clipped, no maximum: so here the coefficient is doubled and nothing clips."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    g = torch.Generator().manual_seed(3)
    logprobs, values, old, old_values, returns, advantage, entropy = (
        torch.randn(64, generator=g, dtype=torch.float64) for _ in range(7)
    )
    old = logprobs + 0.3 * old
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        device="cpu",
        n_steps=64,
        batch_size=64,
        n_epochs=1,
        clip_range=0.2,
        ent_coef=0.03,
        vf_coef=0.25,
        max_grad_norm=1e9,
        normalize_advantage=False,
    )
    logger = Logger(None, [])
    model.set_logger(logger)
    policy: Any = KnownPolicy(values, logprobs, entropy)
    model.policy = policy
    batch = SimpleNamespace(
        observations=None, actions=torch.zeros(64), advantages=advantage, old_log_prob=old, returns=returns
    )
    buffer: Any = SimpleNamespace(get=lambda _: [batch], values=old_values.numpy(), returns=returns.numpy())
    model.rollout_buffer = buffer
    model.train()

    leaves = [x.clone().requires_grad_() for x in (values, logprobs, entropy)]
    weight = torch.full((64,), 1 / 64, dtype=torch.float64)
    params = TrainParams(epsilon=0.2, epsilon_high=0.2, entropy_coef=0.03, vf_coef=0.5, cliprange_value=1e9)
    inputs = LossInputs(
        logprobs=leaves[1],
        old=old,
        behaviour=old,
        advantage=advantage,
        weight=weight,
        sequence=torch.zeros(64).long(),
        sequences=1,
        entropy=leaves[2],
    )
    got = policy_loss(inputs, params)
    critic = value_loss(leaves[0], old_values, returns, weight, params)
    recorded = logger.name_to_value
    assert 0 < got.sums.clipped < 64
    total = got.loss + critic
    within("policy + value", "stable-baselines3 PPO", relative(total, torch.tensor(recorded["train/loss"])), BOUND)
    error = torch.tensor(recorded["train/value_loss"])
    within("value error", "stable-baselines3 PPO", relative(2 * critic.detach() / params.vf_coef, error), BOUND)
    gradients = torch.autograd.grad(total, leaves)
    for name, mine, its in zip(("value", "policy", "entropy"), gradients, policy.parameters(), strict=True):
        within(f"{name}, gradient", "stable-baselines3 PPO", relative(mine, its.grad), BOUND)
