"""Budgets: when the loop stops for one, when a lever is out of the question, when a training job has its last update.

All of it follows from what the log says was spent, so a replay finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from bascule.runtime.spending import before_the_stop, figures
from bascule.runtime.state import RunState
from bascule.schemas.budget import Bounds, BudgetConfig, MachinePrice
from bascule.schemas.decision import Evidence, Lever, LeverDecision
from bascule.schemas.errors import ConfigError
from bascule.schemas.run import RunConfig

#: Who chose, where a budget did and no policy was asked.
POLICY, VERSION = "budget", "1"

_UNITS = {"gpu_seconds": "GPU seconds"}
_DIGITS = {"seconds": 1, "gpu_seconds": 1, "dollars": 4}


def spent(state: RunState, lever: str | None = None) -> dict[str, int | float]:
    """What the loop has spent so far, or the generations of one lever, by the names of :class:`Bounds`."""
    chosen = [s.lever.lever for s in state.steps.values() if s.lever is not None]
    generations = sum(found != "stop" and lever in (None, found) for found in chosen)
    return figures(before_the_stop(state.spending, lever), generations, state.config)


def amount(name: str, value: float) -> str:
    """A figure of a budget as people read it."""
    return f"{value:,.{_DIGITS.get(name, 0)}f}"


def unit(name: str) -> str:
    """What a figure of a budget counts."""
    return _UNITS.get(name, name)


def reached(bounds: Bounds, figures: Mapping[str, float], *, but: str = "") -> str:
    """Which bounds are reached, in words; empty if none is. ``but`` is one that does not count."""
    found = [
        f"{amount(name, figures[name])} of {amount(name, bound)} {unit(name)}"
        for name in Bounds.__struct_fields__
        if name != but and (bound := getattr(bounds, name)) is not None and figures[name] >= bound
    ]
    return f"{' and '.join(found)} spent" if found else ""


def spent_levers(state: RunState) -> dict[Lever, str]:
    """The levers of the run whose own budget is spent, with the reason."""
    budgets = state.config.budget.levers.items()
    found: dict[Lever, str] = {
        lever: reached(bounds, spent(state, lever)) for lever, bounds in budgets if lever in state.config.levers
    }
    return {lever: f"budget of {lever}: {why}" for lever, why in found.items() if why}


def stop(state: RunState, event: str) -> LeverDecision | None:
    """The decision to stop, if the run's budget is spent or that of each of its levers; None if not.

    Args:
        event: upon which the lever is chosen: its subject without ``bascule.<run>.``.
    """
    budget = state.config.budget
    if budget == BudgetConfig():
        return None
    whole = reached(budget, spent(state))
    levers = spent_levers(state)
    if not whole and set(levers) != set(state.config.levers):
        return None
    reasons = (f"budget: {whole}",) if whole else tuple(levers.values())
    bounded: list[tuple[str, Bounds, dict[str, int | float]]] = [("", budget, spent(state))] if whole else []
    bounded += [(f"{x} ", bounds, spent(state, x)) for x, bounds in budget.levers.items() if not whole and x in levers]
    evidence = [
        Evidence(name=f"{of}{name} spent", value=float(value), event=event)
        for of, bounds, values in bounded
        for name, value in values.items()
        if getattr(bounds, name) is not None
    ]
    return LeverDecision(lever="stop", reasons=reasons, evidence=tuple(evidence))


def within(decision: LeverDecision, state: RunState) -> LeverDecision:
    """A policy's decision, as far as budgets of levers allow it: their options are not feasible once they are spent."""
    levers = spent_levers(state)
    if not levers:
        return decision
    options = tuple(
        msgspec.structs.replace(o, feasible=False, score=None, reasons=(levers[o.lever],)) if o.lever in levers else o
        for o in decision.options
    )
    why = levers.get(decision.lever)
    if why is None:
        return msgspec.structs.replace(decision, options=options)
    reasons = (f"{why}, and {decision.lever} is what the policy chose", *decision.reasons)
    return LeverDecision(lever="stop", reasons=reasons, options=options, evidence=decision.evidence)


def over(state: RunState, lever: Literal["harness", "weights"]) -> str:
    """Why a generation of a lever under way begins nothing more: the run's budget is spent, or the lever's; else empty.

    That generation may be the last one that is allowed, so that generations do not count.
    """
    budget, own = state.config.budget, state.config.budget.levers.get(lever, Bounds())
    if budget == BudgetConfig():
        return ""
    if whole := reached(budget, spent(state), but="generations"):
        return f"budget: {whole}"
    part = reached(own, spent(state, lever), but="generations")
    return f"budget of {lever}: {part}" if part else ""


def left(state: RunState) -> BudgetConfig:
    """What is left of each bound, at least 0; no bound stays none."""
    budget = state.config.budget
    levers = {lever: _left(state, bounds, lever) for lever, bounds in budget.levers.items()}
    return msgspec.convert(_left(state, budget, None) | {"levers": levers}, BudgetConfig)


def _left(state: RunState, bounds: Bounds, lever: str | None) -> dict[str, Any]:
    values = spent(state, lever)
    given = ((name, getattr(bounds, name)) for name in Bounds.__struct_fields__)
    return {name: max(bound - values[name], 0) for name, bound in given if bound is not None}


def bounds_dollars(config: RunConfig) -> bool:
    """Whether some budget is in dollars."""
    return any(bounds.dollars is not None for bounds in (config.budget, *config.budget.levers.values()))


def check_prices(config: RunConfig, models: Iterable[str]) -> None:
    """Refuse a budget in dollars that nobody could hold the run to.

    Args:
        models: that policy, author and episodes call.

    Raises:
        ConfigError: names the first price that is missing.
    """
    if not bounds_dollars(config):
        return
    for name in MachinePrice.__struct_fields__:
        if getattr(config.machine, name) is None:
            raise ConfigError(
                f"The budget is in dollars, and machine.{name} has no price.",
                next_step=f"Give what it costs with --set machine.{name}=DOLLARS, 0 if that is nothing.",
            )
    for model in models:
        if model not in config.prices:
            raise ConfigError(
                f"The budget is in dollars, and the model {model!r} has no price.",
                next_step="Give dollars for a million tokens: "
                f'--set \'prices={{"{model}": {{"input": 5, "output": 25}}}}\'.',
            )
