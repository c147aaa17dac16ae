"""What a run cost, and how much of its budgets is left, folded from its log."""

from __future__ import annotations

import msgspec

from bascule.runtime.services.budgets import spent
from bascule.runtime.spending import FEEDBACK, Part, Spent, Tokens, dollars, total, unpriced
from bascule.runtime.state import RunState
from bascule.schemas.budget import Bounds


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent for one generation, one purpose and by one service, or a sum of such.

    Attributes:
        part: a lever; ``stop`` for the sealed split, ``ablation``; None for the first harness and for choosing.
        rollouts, prompt_tokens, output_tokens: of episodes, those of trials included.
        calls: of models by the policy and the author, with their tokens; ``input_tokens`` without cached ones.
        seconds, gpu_seconds: None if none of them are recorded.
        partial: some of its work is recorded without its seconds, its device or its tokens, and is not in there.
        dollars: None if it cost something and nothing of that is known and has a price.
    """

    generation: int | None
    part: Part
    service: str | None
    rollouts: int
    prompt_tokens: int
    output_tokens: int
    calls: int
    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    answer_tokens: int
    seconds: float | None
    gpu_seconds: float | None
    dollars: float | None
    partial: bool


class BudgetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One bound; ``lever`` is None for the run as a whole. ``left`` is at least 0."""

    lever: str | None
    name: str
    bound: float
    spent: float
    left: float


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bascule cost --json`` prints.

    Attributes:
        rows: by generation, part and service, in the order in which they came to be.
        services: sums by service.
        loop: what budgets are held against: the run up to its stop.
        feedback: the policy's and the author's own part of it.
        total: everything, the sealed split and ablations included.
        unpriced: what was spent and has no price, so that it counts nothing in ``dollars``.
        lacks: what the log does not say, a sentence each.
    """

    run: str
    status: str
    rows: tuple[CostRow, ...]
    services: tuple[CostRow, ...]
    loop: CostRow
    feedback: CostRow
    total: CostRow
    budget: tuple[BudgetRow, ...]
    unpriced: tuple[str, ...]
    lacks: tuple[str, ...]


def cost_report(state: RunState) -> CostReport:
    """The cost of a run, as far as its log goes."""
    accounts = state.spending
    everything = total(accounts.values())
    services = list(dict.fromkeys(service for _, _, service in accounts))

    def summed(service: str | None, *, loop: bool = False) -> CostRow:
        found = (
            s
            for (_, part, by), s in accounts.items()
            if service in (None, by) and not (loop and part in ("stop", "ablation"))
        )
        return _row(state, total(found), None, None, service)

    return CostReport(
        run=state.run,
        status=state.status,
        rows=tuple(_row(state, s, *account) for account, s in accounts.items()),
        services=tuple(summed(service) for service in services),
        loop=summed(None, loop=True),
        feedback=summed(FEEDBACK),
        total=summed(None),
        budget=budget_rows(state),
        unpriced=unpriced(everything, state.config),
        lacks=_lacks(everything),
    )


def budget_rows(state: RunState) -> tuple[BudgetRow, ...]:
    """Every bound of the run, with what is spent of it."""
    budget = state.config.budget
    whose: list[tuple[str | None, Bounds]] = [(None, budget), *budget.levers.items()]
    rows = []
    for lever, bounds in whose:
        for name, value in spent(state, lever).items():
            bound = getattr(bounds, name)
            if bound is not None:
                rows.append(BudgetRow(lever=lever, name=name, bound=bound, spent=value, left=max(bound - value, 0)))
    return tuple(rows)


def _row(state: RunState, found: Spent, generation: int | None, part: Part, service: str | None) -> CostRow:
    config = state.config
    tokens = [*found.models.values()] or [Tokens()]
    cost = dollars(found, config)
    return CostRow(
        generation=generation,
        part=part,
        service=service,
        rollouts=found.rollouts,
        prompt_tokens=found.prompt_tokens,
        output_tokens=found.output_tokens,
        calls=found.calls,
        input_tokens=sum(t.input for t in tokens),
        cache_read_tokens=sum(t.cache_read for t in tokens),
        cache_write_tokens=sum(t.cache_write for t in tokens),
        answer_tokens=sum(t.output for t in tokens),
        seconds=None if found.untimed and not found.seconds else found.seconds,
        gpu_seconds=None if (found.untimed or found.unplaced) and not found.gpu_seconds else found.gpu_seconds,
        dollars=None if not cost and (found.untimed or unpriced(found, config)) else cost,
        partial=bool(found.untimed or found.unplaced or found.untold),
    )


def _lacks(found: Spent) -> tuple[str, ...]:
    lacks = []
    if found.untimed:
        lacks.append(
            f"{found.untimed:,} episodes, scores and failed updates were recorded without their share of a worker's "
            f"time; these episodes took {found.episode_seconds:,.1f} s, each by itself, many of them at once"
        )
    if found.unplaced:
        lacks.append(f"{found.unplaced:,} updates were recorded without what they were computed on")
    if found.untold:
        lacks.append(f"{found.untold:,} trials were recorded without their episodes and tokens")
    return tuple(lacks)
