"""What tasks share: seeded order and seeded generators, parameters, and the constant baselines."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from bascule.plugins.task import Baseline, Example, PublicFace
from bascule.schemas.errors import ConfigError

T = TypeVar("T")


def seeded_order(items: Iterable[T], key: Callable[[T], str], salt: str) -> list[T]:
    """``items`` by the SHA-256 of salt and key: the same on every machine and Python version."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}\0{key(item)}".encode()).digest())


def seeded_random(text: str) -> random.Random:
    """A generator whose seed is the first 8 bytes of the SHA-256 of ``text``."""
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))  # noqa: S311


def split_seed(task: str, params: dict[str, Any], others: Iterable[str] = ()) -> int:
    """The one parameter that the built-in tasks have in common; ``others`` are further ones of this task.

    Raises:
        ConfigError: another parameter, or a seed that is no integer of at least 0.
    """
    known = ["split_seed", *others]
    unknown = sorted(set(params) - set(known))
    if unknown:
        only = "Its only one is split_seed." if len(known) == 1 else f"It has {', '.join(known)}."
        raise ConfigError(f"The task {task} has no parameter {unknown[0]!r}.", next_step=only)
    seed = params.get("split_seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"split_seed of the task {task} is {seed!r}.", next_step="Give an integer of at least 0.")
    return seed


def best_constant(public: PublicFace) -> str:
    """The most frequent train answer; of equally frequent ones the shortest, then the first in text order.

    This is also what an engine that always gives one answer should give in an ablation.
    """
    counts = Counter(public.answers[e.id] for e in public.train)
    return min(counts, key=lambda answer: (-counts[answer], len(answer), answer))


def rule_baseline(name: str, public: PublicFace, rule: Callable[[Example], str]) -> Baseline:
    """A baseline that answers every example of every split by ``rule``."""
    splits: dict[str, tuple[Example, ...]] = {"train": public.train, "dev": public.dev, "sealed": public.sealed}
    if public.regression:
        splits["regression"] = public.regression
    return Baseline(name=name, answers={split: {e.id: rule(e) for e in found} for split, found in splits.items()})


def constant_baseline(name: str, public: PublicFace, answer: str) -> Baseline:
    """A baseline that always gives the same answer."""
    return rule_baseline(name, public, lambda _: answer)
