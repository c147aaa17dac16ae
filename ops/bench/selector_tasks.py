"""The six reward landscapes of the bench ``selector``: small tasks whose verifiers are pure functions of the answer.

A prompt is a token for its kind and two that say nothing; an answer is four tokens. Each kind of prompt has at each
position of the answer some tokens that are right there.

=============  =====================================================================  ================================
landscape      reward                                                                 what a policy is truly worth
=============  =====================================================================  ================================
``dense``      1 if all four are right; each token is a model call with a reward of   mean reward
               its own, a quarter where it is right
``terminal``   1 if at least three are right                                          mean reward
``skewed``     lognormal: exp of a sum over the tokens and of what is of the answer   expected best of 16 samples
``regressing`` share of the right ones. Other prompts, whose right tokens are those   mean reward, less what was lost
               that the base model likes, make up the regression set                  on the other prompts
``cold``       1 if all four are right, which is hardly ever so                       mean reward
``ordinal``    a mark for the number of right ones; the distances of the marks are    mean share of right ones
               arbitrary, and the task says that they are ranks
=============  =====================================================================  ================================

What is drawn once for a landscape (:class:`Parameters`) is one thing, the tables of its tasks another: each seed has
its own, drawn until the base model starts where the parameters say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bascule.schemas.trajectory import Scored
from ops.bench.selector_model import ALL_ANSWERS, ANSWERS, LENGTH, VOCABULARY, Floats, Prompt, answer_index

Kind = Literal["dense", "terminal", "skewed", "regressing", "cold", "ordinal"]
LANDSCAPES: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "dev", "sealed", "regression"]

PROMPT_KINDS = 4
#: Kinds of prompts of the regression set of ``regressing``; its other splits have the others.
OTHER_KINDS = (2, 3)
BEST_OF = 16
NEAR = 0.15  # how near to its target, as a share of it, a task's start has to be
TRIES = 20_000
#: What is drawn: the base model's mean reward, or the standard deviation of the logarithm of the rewards or distances.
RANGES: dict[Kind, dict[str, tuple[float, float]]] = {
    "dense": {"start": (0.02, 0.06)},
    "terminal": {"start": (0.2, 0.4)},
    "skewed": {"sigma": (0.9, 1.4), "own": (0.1, 0.3)},
    "regressing": {"start": (0.15, 0.3), "liked": (0.7, 0.85), "apart": (0.0, 0.4)},
    "cold": {"start": (0.007, 0.013)},
    "ordinal": {"start": (0.3, 0.45), "sigma": (0.8, 1.6)},
}


@dataclass(frozen=True)
class Parameters:
    """What one draw of a landscape fixes for all its seeds.

    Attributes:
        start: the base model's expected reward, or of ``ordinal`` its expected share of right tokens.
        sigma: of the lognormal.
        own: share of the variance of a reward's logarithm that is of the whole answer, not of its tokens.
        liked: probability that the base model gives to the right tokens of a position on the other prompts.
        apart: probability that such a token is wrong on the task's own prompts, whatever else is drawn.
    """

    start: float = 0.0
    sigma: float = 0.0
    own: float = 0.0
    liked: float = 0.0
    apart: float = 0.0


@dataclass(frozen=True)
class Task:
    """One task of a landscape.

    Attributes:
        rewards: [PROMPT_KINDS, ANSWERS] what the verifier gives.
        values: [PROMPT_KINDS, ANSWERS] what an answer is worth.
        steps: [PROMPT_KINDS, ANSWERS, LENGTH] rewards of the model calls, where each token is one.
        kinds: of its prompts.
        others: of the prompts of its regression set; empty without one.
        pass_fail: whether rewards are 0 or 1.
    """

    kind: Kind
    rewards: Floats
    values: Floats
    steps: Floats | None = None
    kinds: tuple[int, ...] = tuple(range(PROMPT_KINDS))
    others: tuple[int, ...] = ()
    pass_fail: bool = False


def draw_parameters(kind: Kind, draw: int) -> Parameters:
    """The parameters of a landscape, uniform in their ranges."""
    rng = np.random.default_rng([draw, LANDSCAPES.index(kind)])
    return Parameters(**{name: float(rng.uniform(*bounds)) for name, bounds in RANGES[kind].items()})


def prompts(task: Task, split: Split) -> list[Prompt]:
    """All prompts of a split; no two splits share the two tokens that say nothing.

    Those of a regression set are other tokens than those of the task's own prompts.
    """
    half = VOCABULARY // 2 if task.others else VOCABULARY
    pairs = [(i, j) for i in range(half) for j in range(half)]
    order = np.random.default_rng(0).permutation(len(pairs))
    held, last = len(pairs) * 5 // 8, len(pairs) - 3
    if split == "regression":
        return [(kind, half + pairs[i][0], half + pairs[i][1]) for i in order for kind in task.others]
    parts = {"train": order[:held], "dev": order[held:last], "sealed": order[last:]}
    return [(kind, *pairs[i]) for i in parts[split] for kind in task.kinds]


def verdict(task: Task, prompt: Prompt, answer: Sequence[int]) -> Scored:
    """The verifier: a pure function of the prompt's kind and the answer."""
    index = answer_index(answer)
    reward = float(task.rewards[prompt[0], index])
    return Scored(
        reward=reward,
        passed=reward == 1 if task.pass_fail else None,
        steps=() if task.steps is None else tuple(map(float, task.steps[prompt[0], index])),
    )


def true_value(task: Task, found: Floats, asked: Sequence[Prompt]) -> float:
    """What a policy is worth on prompts of the task's own kinds.

    Args:
        found: [N, ANSWERS] its probabilities of every answer to each of the prompts ``asked``.
    """
    values = task.values[[prompt[0] for prompt in asked]]
    if task.kind == "skewed":
        return float(np.mean([expected_best(v, p, BEST_OF) for v, p in zip(values, found, strict=True)]))
    return float((values * found).sum(1).mean())


def expected_best(values: Floats, weights: Floats, samples: int) -> float:
    """E max of ``samples`` independent draws of ``values`` with probabilities ``weights``."""
    order = np.argsort(values, kind="stable")
    below = np.minimum(np.concatenate([[0.0], np.cumsum(weights[order])]), 1.0) ** samples
    return float((values[order] * np.diff(below)).sum() / below[-1])


def make_task(kind: Kind, given: Parameters, seed: int, base: Floats) -> Task:
    """A task of the landscape.

    Args:
        seed: of its tables.
        base: [PROMPT_KINDS, ANSWERS] the base model's mean probabilities of the answers to each kind of prompt.

    Raises:
        ValueError: no table gives the base model the start that the parameters ask for.
    """
    rng = np.random.default_rng([seed, LANDSCAPES.index(kind), 1])
    if kind == "skewed":
        scores = rng.standard_normal((PROMPT_KINDS, LENGTH, VOCABULARY))
        tokens = np.sum([scores[:, i, ALL_ANSWERS[:, i]] for i in range(LENGTH)], axis=0) / np.sqrt(LENGTH)
        whole = rng.standard_normal((PROMPT_KINDS, ANSWERS))
        rewards = np.exp(given.sigma * (np.sqrt(1 - given.own) * tokens + np.sqrt(given.own) * whole))
        return Task(kind, rewards, rewards)
    marks = np.cumsum(np.exp(given.sigma * rng.standard_normal(LENGTH + 1)))
    marks = (marks - marks[0]) / (marks[-1] - marks[0])
    liked = _liked(base, given.liked)
    barred = rng.random((LENGTH, VOCABULARY)) < given.apart
    kinds = tuple(k for k in range(PROMPT_KINDS) if kind != "regressing" or k not in OTHER_KINDS)
    for _ in range(TRIES):
        # Of each position at least one token is right and one wrong.
        chance = rng.uniform(0.1, 0.7)
        accepted = rng.random((PROMPT_KINDS, LENGTH, VOCABULARY)) < chance
        if kind == "regressing":
            accepted[list(kinds)] &= ~(liked[list(OTHER_KINDS)].any(0) & barred)
            accepted[list(OTHER_KINDS)] = liked[list(OTHER_KINDS)]
        if accepted.all(-1).any() or not accepted.any(-1).all():
            continue
        right = np.stack([accepted[:, i, ALL_ANSWERS[:, i]] for i in range(LENGTH)], -1)
        shown = {"dense": right.all(-1), "cold": right.all(-1), "terminal": right.sum(-1) >= LENGTH - 1}
        values = shown.get(kind, right.mean(-1)).astype(float)
        starts = (values * base).sum(1)[list(kinds)]
        if abs(starts.mean() / given.start - 1) > NEAR or starts.min() < given.start / 3:
            continue
        return Task(
            kind,
            marks[right.sum(-1)] if kind == "ordinal" else values,
            values,
            steps=right / LENGTH if kind == "dense" else None,
            kinds=kinds,
            others=OTHER_KINDS if kind == "regressing" else (),
            pass_fail=kind in shown,
        )
    raise ValueError(f"No table of {kind} has a start near {given.start:.3f} under this base model.")


def _liked(base: Floats, mass: float) -> np.ndarray:
    """[PROMPT_KINDS, LENGTH, VOCABULARY] the likeliest tokens of each position that together have at least ``mass``."""
    found = np.zeros((PROMPT_KINDS, LENGTH, VOCABULARY), bool)
    for kind in range(PROMPT_KINDS):
        for i in range(LENGTH):
            marginal = np.bincount(ALL_ANSWERS[:, i], base[kind], VOCABULARY)
            order = np.argsort(-marginal, kind="stable")
            count = int(np.searchsorted(np.cumsum(marginal[order]), mass)) + 1
            found[kind, i, order[: min(count, VOCABULARY - 1)]] = True
    return found
