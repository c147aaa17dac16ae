"""Small batches for the trainer's tests, sampled from the model itself by plain forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bascule.plugins.algorithm import Algorithm, Credit, Group, Requires, Sample, Stream, Turn
from bascule.schemas.trajectory import (
    ModelCall,
    Output,
    Sampling,
    Trajectory,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)
from bascule.trainers.loop import TrainJob, UpdateMetrics

PROMPTS = ((10, 11, 12, 13, 14), (10, 11, 12, 20, 21, 22), (30, 31))
PARAMS: dict[str, Any] = {"learning_rate": 3e-3, "lora_r": 4, "lora_alpha": 8, "steps": 8, "max_nodes": 24}


class Given:
    """An algorithm whose credit a test has decided."""

    name = "given"
    version = "1"
    requires = Requires()
    streams: frozenset[Stream] = frozenset()

    def __init__(self, credit: Sequence[Credit] = ()) -> None:
        self.given = list(credit)

    def defaults(self) -> dict[str, Any]:
        return {}

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        del groups, params
        return self.given


def make_job(
    base: Path, params: Mapping[str, Any], seed: int, parent_adapter: Mapping[str, bytes] | None = None
) -> TrainJob:
    """A job whose credit the test decides."""
    return TrainJob(base, Given(), params, seed, parent_adapter)


def train(job: TrainJob, batch: Mapping[str, Trajectory], credit: Sequence[Credit], iteration: int) -> UpdateMetrics:
    """One update with decided credit; the trajectories are grouped as their names begin."""
    assert isinstance(job.algorithm, Given)
    job.algorithm.given = list(credit)
    return job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, iteration)


def grouped(batch: Mapping[str, Trajectory], rewards: Mapping[str, float | None]) -> list[Group]:
    """The trajectories as groups by what their names begin with (``p0-s3`` is of ``p0``), in the order of names."""
    groups: dict[str, list[Sample]] = {}
    for name in sorted(batch):
        groups.setdefault(name.partition("-")[0], []).append(sample_of(name, batch[name], rewards[name]))
    return [Group(example=example, samples=tuple(samples)) for example, samples in groups.items()]


def sample_of(name: str, trajectory: Trajectory, reward: float | None) -> Sample:
    """A trajectory as credit assignment sees it."""
    outputs = [o for call in trajectory.steps if isinstance(call, ModelCall) for o in call.outputs]
    turns = tuple(
        Turn(token_ids=tuple(unpack_ids(o.token_ids)), behaviour=tuple(unpack_floats(o.logprobs))) for o in outputs
    )
    passed = None if reward is None else reward > 0
    return Sample(
        trajectory=name, reward=reward, passed=passed, tokens=sum(len(t.token_ids) for t in turns), turns=turns
    )


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
        samples.append(sample_of(name, trajectory, float(call.outputs[0].token_ids[:4] == pack_ids([best]))))
    return [Group(example="bandit", samples=tuple(samples))]


def play_bandit(base: Path, algorithm: Algorithm, updates: int) -> tuple[float, float]:
    """Probability of the rewarded token, at first the second likeliest, before and after some updates."""
    job = TrainJob(
        base,
        algorithm,
        {**algorithm.defaults(), **PARAMS, "learning_rate": 1e-2, "max_kl": 99, "steps": updates},
        seed=1,
    )
    prompt = PROMPTS[2]

    def probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.softmax(job.model(input_ids=torch.tensor([prompt])).logits[0, -1].float(), -1)

    best = int(probabilities().topk(2).indices[1])
    before = float(probabilities()[best])
    for i in range(updates):
        batch = sample_batch(job, seed=i, samples=24, length=1, prompts=[prompt])
        job.update(reward_first_token(batch, best), batch, i)
    return before, float(probabilities()[best])
