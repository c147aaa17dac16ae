"""Small batches for the trainer's tests, sampled from the model itself by plain forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bascule.plugins.algorithm import Algorithm, Credit, Group, Sample
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.trainers.loop import TrainJob

PROMPTS = ((10, 11, 12, 13, 14), (10, 11, 12, 20, 21, 22), (30, 31))
PARAMS: dict[str, Any] = {"learning_rate": 3e-3, "lora_r": 4, "lora_alpha": 8, "steps": 8, "max_nodes": 24}


def plain_logprobs(model: Any, rows: Sequence[tuple[Sequence[int], float]]) -> torch.Tensor:
    """[rows, longest - 1] log-probabilities of each row's own next tokens, by one right-padded forward pass."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, (tokens, _) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    scaled = logits[:, :-1] / torch.tensor([t for _, t in rows])[:, None, None]
    return torch.log_softmax(scaled, -1).gather(-1, ids[:, 1:, None])[..., 0]


def sample_batch(
    job: TrainJob, seed: int, samples: int = 6, length: int = 3, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> dict[str, Trajectory]:
    """``samples`` trajectories of ``length`` tokens for each prompt, from the job's current adapter."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for p, prompt in enumerate(prompts):
        temperature = 0.8 if p == 1 else 1.0
        tokens = torch.tensor([prompt] * samples)
        logprobs = torch.zeros(samples, 0)
        for _ in range(length):
            with torch.no_grad():
                logits = job.model(input_ids=tokens).logits[:, -1].float()
            rows = torch.log_softmax(logits / temperature, -1)
            drawn = torch.multinomial(rows.exp(), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
            logprobs = torch.cat([logprobs, rows.gather(1, drawn)], 1)
        for s in range(samples):
            output = Output(
                token_ids=pack_ids(tokens[s, len(prompt) :].tolist()),
                logprobs=pack_floats(logprobs[s].tolist()),
                text="",
            )
            call = ModelCall(
                kind="completion",
                asked="",
                prompt_ids=pack_ids(prompt),
                outputs=(output,),
                sampling=Sampling(temperature=temperature),
            )
            batch[f"p{p}-s{s}"] = Trajectory(steps=(call,))
    return batch


def alternating_credit(batch: Mapping[str, Trajectory]) -> list[Credit]:
    """Advantages of both signs, and imitation for every third trajectory."""
    return [
        Credit(trajectory=t, component="imitation", advantage=0.5)
        if i % 3 == 2
        else Credit(trajectory=t, component="policy", advantage=(-1.0) ** i * (1 + i % 5))
        for i, t in enumerate(sorted(batch))
    ]


def reward_first_token(batch: Mapping[str, Trajectory], best: int) -> list[Group]:
    """One group whose samples are rewarded for starting with ``best``."""
    samples = []
    for name, trajectory in batch.items():
        call = trajectory.steps[0]
        assert isinstance(call, ModelCall)
        hit = call.outputs[0].token_ids[:4] == pack_ids([best])
        samples.append(Sample(trajectory=name, reward=float(hit), passed=hit, tokens=1))
    return [Group(example="bandit", samples=tuple(samples))]


def play_bandit(base: Path, algorithm: Algorithm, updates: int) -> tuple[float, float]:
    """Probability of the rewarded token, at first the second likeliest, before and after some updates."""
    job = TrainJob(base, {**algorithm.defaults(), **PARAMS, "learning_rate": 1e-2, "steps": updates}, seed=1)
    prompt = PROMPTS[2]

    def probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.softmax(job.model(input_ids=torch.tensor([prompt])).logits[0, -1].float(), -1)

    best = int(probabilities().topk(2).indices[1])
    before = float(probabilities()[best])
    for i in range(updates):
        batch = sample_batch(job, seed=i, samples=24, length=1, prompts=[prompt])
        job.update(batch, algorithm.credit(reward_first_token(batch, best), algorithm.defaults()), i)
    return before, float(probabilities()[best])
