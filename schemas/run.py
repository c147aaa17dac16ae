"""The configuration of a run: recorded in its first event, never changed afterwards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from bascule.schemas.errors import ConfigError
from bascule.schemas.sandbox import SandboxConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How candidates are measured.

    Attributes:
        dev_examples: at most this many examples of ``dev`` (0 = all).
        sealed_examples: at most this many of ``sealed`` (0 = all).
        train_groups: examples of ``train`` that each candidate's landscape is taken over.
        train_samples: samples per example on ``train``, at ``train_temperature``.
    """

    dev_examples: Annotated[int, msgspec.Meta(ge=0)] = 0
    sealed_examples: Annotated[int, msgspec.Meta(ge=0)] = 0
    train_groups: Positive = 32
    train_samples: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    train_temperature: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1.0


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The promotion gate: a candidate replaces its parent if a paired one-sided test on ``dev`` gives p < ``alpha``.

    Attributes:
        version: of the rules; runs that were recorded before there were more than one are of version 1.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05


class PluginChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin by name, with the parameters given to it."""

    name: str
    params: dict[str, Any] = {}


def task_label(task: PluginChoice) -> str:
    """What people call a task: its name, or that of the user's file or folder that it is."""
    path = task.params.get("path") if task.name in ("own", "sia-dir") else None
    return (path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else "") or task.name


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a run was asked to do.

    Attributes:
        task: name of the task plugin and its parameters.
        model: name of an embedded model, or a local folder.
        engine: name of the engine plugin and its parameters.
        levers: which levers the policy may pull.
        max_generations: lever choices after the first harness; then the run stops.
        algorithms: parameters by algorithm name, over the algorithm's and the task's defaults.
        shard_size: examples in one unit of rollout work.
        concurrency: harness processes at one time on each rollout worker.
        threads: compute threads of the model; 0 leaves it to the machine.
        sandbox: what harnesses and candidates are confined by.
        landscape: version of the figures that landscapes are made of; runs that were recorded before there were more
            than one are of version 1.
    """

    task: PluginChoice
    model: str = "smollm2-135m-instruct"
    engine: PluginChoice = PluginChoice(name="transformers")
    policy: PluginChoice = PluginChoice(name="rules")
    author: PluginChoice = PluginChoice(name="operators")
    levers: tuple[Literal["harness", "weights"], ...] = ("harness", "weights")
    max_generations: Annotated[int, msgspec.Meta(ge=0, le=300)] = 4
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 1
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    algorithms: dict[str, dict[str, Any]] = {}
    shard_size: Annotated[int, msgspec.Meta(ge=1, le=32)] = 32
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    sandbox: SandboxConfig = SandboxConfig()
    landscape: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2


class PluginPin(msgspec.Struct, frozen=True, kw_only=True):
    """What a run depends on: a plugin, its distribution's version, and the hash of its code."""

    kind: str
    name: str
    version: str
    distribution: str
    hash: str


def _unknown(values: dict[str, Any], struct: msgspec.Struct) -> str | None:
    """The first key, as a path, that the struct has no field for; recorded types themselves ignore such keys."""
    for key, value in values.items():
        if key not in struct.__struct_fields__:
            return key
        field = getattr(struct, key)
        if isinstance(field, msgspec.Struct) and isinstance(value, dict):
            inner = _unknown(value, field)
            if inner is not None:
                return f"{key}.{inner}"
    return None


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from plain values.

    Raises:
        ConfigError: naming the field that is unknown or out of range.
    """
    try:
        config = msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as e:
        raise ConfigError(f"The configuration is not valid: {e}.", next_step="Correct that value.") from e
    unknown = _unknown(values, config)
    if unknown is not None:
        known = ", ".join(RunConfig.__struct_fields__)
        raise ConfigError(f"The configuration has no {unknown!r}.", next_step=f"It has {known}.")
    if not config.levers:
        raise ConfigError("A run needs at least one lever.", next_step="Give --levers harness, weights or both.")
    return config
