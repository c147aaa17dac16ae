"""The tiny model of the bench ``selector``: random weights, sampled in process, every answer's exact probability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Prompt = tuple[int, ...]

VOCABULARY = 8
LENGTH = 4  # tokens of an answer
ANSWERS = VOCABULARY**LENGTH
PROMPT = 3
#: [ANSWERS, LENGTH] every answer, in the order of :func:`answer_index`.
ALL_ANSWERS: Ints = np.indices((VOCABULARY,) * LENGTH).reshape(LENGTH, -1).T.astype(np.int64)


def make_model(folder: Path, seed: int) -> Path:
    """Write a Llama of 10,000 parameters without a tokenizer; same seed, same bytes.

    Its weights are larger than a fresh model's, so that its answers depend on the prompt.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as untyped

    logging: Any = untyped
    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make: Any = LlamaForCausalLM
        model = make(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def answer_index(tokens: Sequence[int]) -> int:
    """The row of an answer in :data:`ALL_ANSWERS`."""
    index = 0
    for token in tokens:
        index = index * VOCABULARY + token
    return index


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Prompt], seed: int) -> tuple[Ints, Floats]:
    """One answer for each prompt at temperature 1: [N, LENGTH] tokens and their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompts)
    found = []
    for _ in range(LENGTH):
        rows = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, -1].float(), -1)
        drawn = torch.multinomial(rows.exp(), 1, generator=generator)
        found.append(rows.gather(1, drawn))
        tokens = torch.cat([tokens, drawn], 1)
    answers: Ints = tokens[:, PROMPT:].numpy()
    logprobs: Floats = torch.cat(found, 1).double().numpy()
    return answers, logprobs


@torch.no_grad()
def probabilities(model: Any, prompts: Sequence[Prompt]) -> Floats:
    """[N, ANSWERS] of every answer to each prompt, at temperature 1."""
    prefixes = torch.from_numpy(ALL_ANSWERS[::VOCABULARY, :-1].copy())
    found = []
    for prompt in prompts:
        tokens = torch.cat([torch.tensor([prompt] * len(prefixes)), prefixes], 1)
        logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 :].double()
        rows = torch.log_softmax(logits, -1)
        before = rows[:, :-1].gather(-1, prefixes[..., None])[..., 0].sum(1)
        found.append((before[:, None] + rows[:, -1]).exp().flatten())
    every: Floats = torch.stack(found).numpy()
    return every
