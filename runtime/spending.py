"""What a run has spent, folded from its events: by generation, by what it was for, and by service.

Only what is recorded counts. Work that a crash took away before it was recorded is not there, and of runs that were
recorded by earlier code some of it lacks its seconds or its device; ``Spent`` says of how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from bascule.runtime.engines.remote import target_model
from bascule.schemas import events as ev
from bascule.schemas.budget import Bounds, Price
from bascule.schemas.landscape import Measured
from bascule.schemas.run import RunConfig

#: What work was for: a lever, the sealed split after the stop, an ablation; None for the first harness and choices.
Part = Literal["harness", "weights", "stop", "ablation"] | None
#: Generation, part, service.
Account = tuple[int, Part, str]

ROLLOUT, VERIFIER, TRAINER, FEEDBACK = "rollout", "verifier", "trainer", "feedback"
_HOUR = 3600.0
_MILLION = 1e6


class Tokens(msgspec.Struct, kw_only=True):
    """Of the calls of one model; ``input`` without what a cache held or was told to hold."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0


class Spent(msgspec.Struct, kw_only=True):
    """What was spent.

    Attributes:
        rollouts: episodes, those of trials included; ``prompt_tokens`` and ``output_tokens`` are theirs.
        calls: of models by policies and authors; ``models`` has their tokens by model.
        seconds: of the services' work, each worker's seconds counted once; ``gpu_seconds`` of those on GPUs, times the
            GPUs.
        cpu_seconds: of those that need no GPU.
        untimed: pieces of work whose seconds are not recorded; ``unplaced`` those whose device is not.
        episode_seconds: of untimed episodes, each by itself, although many ran at once.
        untold: trials whose episodes and tokens are not recorded.
    """

    rollouts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    calls: int = 0
    models: dict[str, Tokens] = {}
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    untimed: int = 0
    unplaced: int = 0
    untold: int = 0
    episode_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Of episodes, and of the calls of policy and author, those that a cache held included."""
        calls = sum(m.input + m.output + m.cache_read + m.cache_write for m in self.models.values())
        return self.prompt_tokens + self.output_tokens + calls


Spending = dict[Account, Spent]


def gpus_of(versions: Mapping[str, str]) -> int | None:
    """How many GPUs a trainer computes on; None if what it computes on is not recorded."""
    device = versions.get("device")
    if device is None:
        return None
    return int(versions.get("processes", "1")) if _is_gpu(device) else 0


def _is_gpu(device: str) -> bool:
    return bool(device) and not device.startswith("cpu")


def add_episode(spent: Spent, data: ev.TrajectoryLogged) -> None:
    spent.rollouts += 1
    spent.prompt_tokens += data.prompt_tokens
    spent.output_tokens += data.output_tokens
    if data.measured.share is None:
        spent.episode_seconds += data.measured.seconds
    _add_work(spent, data.measured.share, int(_is_gpu(data.measured.device)))


def add_score(spent: Spent, data: ev.TrajectoryScored) -> None:
    _add_work(spent, data.measured.share if data.measured is not None else None, 0)


def add_update(spent: Spent, measured: Measured | None, gpus: int | None) -> None:
    """An update of a training job on ``gpus`` GPUs, or one that failed."""
    if gpus is None:
        spent.unplaced += 1
    _add_work(spent, measured.seconds if measured is not None else None, gpus or 0)


def add_call(spent: Spent, data: ev.ModelCalled | ev.ToolCalled, trial: str) -> None:
    """A call of a policy or an author; ``trial`` is the name of the tool that runs episodes."""
    if isinstance(data, ev.ModelCalled):
        spent.calls += 1
        used = spent.models.setdefault(data.model, Tokens())
        used.input += data.input_tokens
        used.output += data.output_tokens
        used.cache_read += data.cache_read_tokens
        used.cache_write += data.cache_write_tokens
        _add_work(spent, data.measured.seconds, 0)
        return
    if data.trial is not None:
        spent.rollouts += data.trial.rollouts
        spent.prompt_tokens += data.trial.prompt_tokens
        spent.output_tokens += data.trial.output_tokens
    elif data.name == trial and data.result is not None:
        spent.untold += 1
    _add_work(spent, data.measured.seconds, int(_is_gpu(data.measured.device)))


def _add_work(spent: Spent, seconds: float | None, gpus: int) -> None:
    if seconds is None:
        spent.untimed += 1
        return
    spent.seconds += seconds
    if gpus:
        spent.gpu_seconds += seconds * gpus
    else:
        spent.cpu_seconds += seconds


def total(parts: Iterable[Spent]) -> Spent:
    """The sum."""
    out = Spent()
    for part in parts:
        for field in Spent.__struct_fields__:
            if field == "models":
                continue
            setattr(out, field, getattr(out, field) + getattr(part, field))
        for model, tokens in part.models.items():
            used = out.models.setdefault(model, Tokens())
            for field in tokens.__struct_fields__:
                setattr(used, field, getattr(used, field) + getattr(tokens, field))
    return out


def before_the_stop(spending: Spending, lever: str | None = None) -> Spent:
    """What the loop has spent, or the generations of one lever: what budgets are held against."""
    return total(
        spent for (_, part, _), spent in spending.items() if part not in ("stop", "ablation") and lever in (None, part)
    )


def paid_target(config: RunConfig) -> str | None:
    """The model that episodes ask, where somebody else serves it and wants money for its tokens."""
    return target_model(config.engine.name, config.engine.params, config.model)


def unpriced(spent: Spent, config: RunConfig) -> tuple[str, ...]:
    """What was spent and has no price: models by name, ``gpu_hour``, ``cpu_hour``."""
    target = paid_target(config)
    called = {*spent.models, *((target,) if target and (spent.prompt_tokens or spent.output_tokens) else ())}
    models = sorted(model for model in called if model not in config.prices)
    gpu = ("gpu_hour",) if spent.gpu_seconds and config.machine.gpu_hour is None else ()
    cpu = ("cpu_hour",) if spent.cpu_seconds and config.machine.cpu_hour is None else ()
    return (*models, *gpu, *cpu)


def dollars(spent: Spent, config: RunConfig) -> float:
    """What it cost, by the run's prices; what has none counts as nothing, see :func:`unpriced`."""
    per_hour = config.machine
    cost = (spent.gpu_seconds * (per_hour.gpu_hour or 0.0) + spent.cpu_seconds * (per_hour.cpu_hour or 0.0)) / _HOUR
    own = config.prices.get(paid_target(config) or config.model)
    if own is not None:
        cost += tokens_cost(Tokens(input=spent.prompt_tokens, output=spent.output_tokens), own)
    return cost + sum(
        tokens_cost(tokens, config.prices[model]) for model, tokens in spent.models.items() if model in config.prices
    )


def tokens_cost(tokens: Tokens, price: Price) -> float:
    """Dollars for the tokens of a model's calls."""
    read = price.input if price.cache_read is None else price.cache_read
    write = price.input if price.cache_write is None else price.cache_write
    return (
        tokens.input * price.input
        + tokens.output * price.output
        + tokens.cache_read * read
        + tokens.cache_write * write
    ) / _MILLION


def figures(spent: Spent, generations: int, config: RunConfig) -> dict[str, int | float]:
    """What was spent, by the names of :class:`Bounds`."""
    found = {
        "generations": generations,
        "rollouts": spent.rollouts,
        "tokens": spent.tokens,
        "seconds": spent.seconds,
        "gpu_seconds": spent.gpu_seconds,
        "dollars": dollars(spent, config),
    }
    assert tuple(found) == Bounds.__struct_fields__
    return found
