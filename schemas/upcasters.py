"""Upcasters: how data of an older version becomes that of the next, step by step up to the version of this code.

**A new version of a type:** raise its ``VERSION``, add a line to ``STEPS``, ``python -m bascule.schemas.lock --write``,
``python -m tests.schemas.make_golden``. Steps are never taken out: logs of every version stay readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from bascule.schemas.errors import SchemaError

Step = Callable[[dict[str, Any]], dict[str, Any]]


class Upcast(msgspec.Struct, frozen=True):
    """``step`` turns the data of ``type`` in version ``old`` into that of version ``new``, as plain JSON values."""

    type: str
    old: int
    new: int
    step: Step


def _same(data: dict[str, Any]) -> dict[str, Any]:
    """The next version only has more fields, whose defaults say that nothing was recorded."""
    return data


def _config_v3(data: dict[str, Any]) -> dict[str, Any]:
    """Landscape and gate say by which rules they are made: recorded runs by the first ones."""
    config = data["config"]
    gate = {**config.get("gate", {}), "version": 1}
    return {**data, "config": {**config, "landscape": 1, "gate": gate}}


STEPS: tuple[Upcast, ...] = (
    Upcast("bascule.trajectory.scored", 1, 2, _same),  # Scored.steps
    Upcast("bascule.evaluation.completed", 1, 2, _same),  # RewardLandscape.step_rewards
    Upcast("bascule.evaluation.completed", 2, 3, _same),  # the landscape's figures of version 2, seconds of a rollout
    Upcast("bascule.train.started", 1, 2, _same),  # versions
    Upcast("bascule.adapter.checkpointed", 1, 2, _same),  # base
    Upcast("bascule.adapter.published", 1, 2, _same),  # data_digest, metrics, base
    Upcast("bascule.run.started", 1, 2, _same),  # RunConfig.sandbox
    Upcast("bascule.run.forked", 1, 2, _same),  # RunConfig.sandbox
    Upcast("bascule.trajectory.logged", 1, 2, _same),  # WorkMeasured
    Upcast("bascule.trajectory.scored", 2, 3, _same),  # measured
    Upcast("bascule.episodes.requested", 1, 2, _same),  # perturbed
    Upcast("bascule.tool.called", 1, 2, _same),  # WorkMeasured, trial
    Upcast("bascule.train.failed", 1, 2, _same),  # measured
    Upcast("bascule.model.called", 1, 2, _same),  # cached tokens, stop_reason, request_blob
    Upcast("bascule.adapter.checkpointed", 2, 3, _same),  # probe
    Upcast("bascule.adapter.served", 1, 2, _same),  # probe
    Upcast("bascule.candidate.promoted", 1, 2, _same),  # GateFigures of version 2 of the rules
    Upcast("bascule.candidate.rejected", 1, 2, _same),  # the same
    Upcast("bascule.run.started", 2, 3, _config_v3),
    Upcast("bascule.run.forked", 2, 3, _config_v3),
)


def prove(types: Iterable[tuple[str, int]], upcasts: Iterable[Upcast]) -> dict[tuple[str, int], Step]:
    """The steps by (type, old version), once they are known to lead from every version to the current one.

    Raises:
        SchemaError: lists every type that is declared twice, every version without a step, and every step that is there
            twice, does not go to the next version, or starts at no version older than the current one.
    """
    current: dict[str, int] = {}
    steps: dict[tuple[str, int], Step] = {}
    faults: list[str] = []
    for type_, version in types:
        if type_ in current:
            faults.append(
                f"{type_} is declared in versions {current[type_]} and {version}; only the newest belongs there"
            )
        current[type_] = max(version, current.get(type_, 0))
    for u in upcasts:
        name = f"the step of {u.type} from version {u.old}"
        if u.type not in current:
            faults.append(f"{name} is for an unknown type")
        elif not 1 <= u.old < current[u.type]:
            faults.append(f"{name} starts at no older version than the current one, {current[u.type]}")
        if u.new != u.old + 1:
            faults.append(f"{name} goes to version {u.new}, not to {u.old + 1}")
        if (u.type, u.old) in steps:
            faults.append(f"{name} is there twice")
        steps[u.type, u.old] = u.step
    faults += [
        f"{type_} has no step from version {old} to {old + 1}"
        for type_, newest in current.items()
        for old in range(1, newest)
        if (type_, old) not in steps
    ]
    if faults:
        raise SchemaError(
            f"The upcasters do not lead to the current versions: {'; '.join(faults)}.",
            next_step="Correct STEPS in schemas/upcasters.py.",
        )
    return steps
