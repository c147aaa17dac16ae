"""Trajectories of several turns, and their log-probabilities from plain padded forward passes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from bascule.schemas.trajectory import (
    ModelCall,
    Output,
    Sampling,
    Step,
    ToolCall,
    Trajectory,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)


def spoken(trajectory: Trajectory) -> list[tuple[list[int], list[int], float, list[float]]]:
    """Each output by itself: its prompt, its tokens, its temperature and the sampler's log-probabilities."""
    return [
        (unpack_ids(c.prompt_ids), unpack_ids(o.token_ids), c.sampling.temperature, unpack_floats(o.logprobs))
        for c in trajectory.steps
        if isinstance(c, ModelCall)
        for o in c.outputs
    ]


def plain(model: Any, batch: Mapping[str, Trajectory]) -> dict[str, tuple[Tensor, Tensor]]:
    """[T] log-probabilities and entropies of each trajectory's sampled tokens, from one right-padded forward pass."""
    rows = [(name, *turn) for name, t in batch.items() for turn in spoken(t)]
    longest = max(len(prompt) + len(ids) for _, prompt, ids, _, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (_, prompt, ids, _, _) in enumerate(rows):
        tokens[i, : len(prompt) + len(ids)] = torch.tensor(prompt + ids)
        mask[i, : len(prompt) + len(ids)] = 1
    logits = model(input_ids=tokens, attention_mask=mask).logits.float()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in batch}
    for i, (name, prompt, ids, temperature, _) in enumerate(rows):
        logp = torch.log_softmax(logits[i, len(prompt) - 1 : len(prompt) - 1 + len(ids)] / temperature, -1)
        found[name].append((logp[torch.arange(len(ids)), ids], -(logp.exp() * logp).sum(-1)))
    return {name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for name, parts in found.items()}


def conversations(model: Any, seed: int, groups: int = 2) -> dict[str, Trajectory]:
    """Four trajectories of each group: a tool between turns, a drift to another temperature, several outputs of a call,
    an output without tokens. The tokens are drawn at random; the sampler is near the model."""
    r = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [r.randrange(3, 300) for _ in range(n)]

    def call(prompt: list[int], *outputs: list[int], temperature: float = 1.0) -> ModelCall:
        return ModelCall(
            kind="chat",
            asked="",
            prompt_ids=pack_ids(prompt),
            outputs=tuple(
                Output(token_ids=pack_ids(o), logprobs=pack_floats([0.0] * len(o)), text="") for o in outputs
            ),
            sampling=Sampling(temperature=temperature),
        )

    tool = ToolCall(name="search", arguments="{}", result="{}")
    batch: dict[str, Trajectory] = {}
    for g in range(groups):
        prompt, a, b, c = ids(6 + g), ids(3), ids(2), ids(4)
        talks: list[tuple[Step, ...]] = [
            (call(prompt, a), tool, call([*prompt, *a, *ids(3)], b)),
            (call(prompt, a[:2]), tool, call([*prompt[:4], *ids(2)], c, temperature=0.7)),
            (call(prompt, b, c), call([*prompt, *c, *ids(2)], a), call([*prompt, *b, *ids(1)], ids(2))),
            (call(prompt, ids(3)), call([*prompt, *ids(2)], []), call([*prompt, *a[:1], *ids(2)], ids(2), ids(1))),
        ]
        batch |= {f"g{g}-s{i}": Trajectory(steps=steps) for i, steps in enumerate(talks)}
    with torch.no_grad():
        known = {name: logp for name, (logp, _) in plain(model, batch).items()}
    return {name: sampled_at(t, [float(x) + r.gauss(0, 0.2) for x in known[name]]) for name, t in batch.items()}


def sampled_at(trajectory: Trajectory, logprobs: Sequence[float]) -> Trajectory:
    """The trajectory with these as the sampler's log-probabilities, in the order of time."""
    rest = iter(logprobs)

    def again(output: Output) -> Output:
        return msgspec.structs.replace(output, logprobs=pack_floats([next(rest) for _ in unpack_ids(output.token_ids)]))

    steps = [
        msgspec.structs.replace(step, outputs=tuple(map(again, step.outputs))) if isinstance(step, ModelCall) else step
        for step in trajectory.steps
    ]
    return Trajectory(steps=tuple(steps))
