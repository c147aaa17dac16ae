"""Budgets and prices: what a run may spend, and what that costs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Bounds(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What may be spent; None is no bound.

    Attributes:
        generations: lever choices after the first harness.
        rollouts: episodes, those of an author's trials included.
        tokens: of their prompts and outputs, and of what a policy and an author ask models.
        seconds: of the services' work; what several pieces of work share on one worker counts once.
        gpu_seconds: of those, on a GPU, times the GPUs.
        dollars: by the run's prices.
    """

    generations: Count | None = None
    rollouts: Count | None = None
    tokens: Count | None = None
    seconds: Amount | None = None
    gpu_seconds: Amount | None = None
    dollars: Amount | None = None


class BudgetConfig(Bounds, frozen=True, kw_only=True, omit_defaults=True):
    """What a run may spend before its loop stops; the first harness and the sealed split are measured in any case.

    Attributes:
        levers: what the generations of a lever may spend, by lever.
    """

    levers: dict[Literal["harness", "weights"], Bounds] = {}


class Price(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a model, in dollars for a million tokens.

    Attributes:
        input: that no cache held; output: what it answered.
        cache_read, cache_write: input that a cache held, or was told to hold; None is the price of other input.
    """

    input: Amount
    output: Amount
    cache_read: Amount | None = None
    cache_write: Amount | None = None


class MachinePrice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of the machines, in dollars an hour: of one GPU while it works, and of work that needs none."""

    gpu_hour: Amount | None = None
    cpu_hour: Amount | None = None
