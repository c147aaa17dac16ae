"""The configuration of a run: recorded in its first event, never changed afterwards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from bascule.schemas.budget import BudgetConfig, MachinePrice, Price
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
        perturbed: so many examples of ``dev`` are asked once more in another form before a candidate is promoted.
        regression: at most this many examples of the task's regression set (0 = all), if it has one.
        fresh_dev: each generation's candidate and its parent are measured on so many examples of ``dev``, others than
            those of the generations before (0 = always on the same ones).
    """

    dev_examples: Annotated[int, msgspec.Meta(ge=0)] = 0
    sealed_examples: Annotated[int, msgspec.Meta(ge=0)] = 0
    train_groups: Positive = 32
    train_samples: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    train_temperature: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1.0
    perturbed: Annotated[int, msgspec.Meta(ge=0)] = 0
    regression: Annotated[int, msgspec.Meta(ge=0)] = 0
    fresh_dev: Annotated[int, msgspec.Meta(ge=0)] = 0


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The promotion gate: a candidate replaces its parent if a paired one-sided test on ``dev`` gives p < ``alpha``.

    From version 2 on it must also pass the guard, since ``dev`` is asked again in each generation.

    Attributes:
        version: of the rules; runs that were recorded before there were more than one are of version 1.
        guard: what keeps levers from adapting to ``dev``: a fixed step above the parent, the same step with noise, or
            nothing.
        step: of the guard, in standard errors of the paired difference; what all examples agree on is sqrt(n) of them,
            so that at the default nothing is promoted on fewer than 8.
        noise: of ``thresholdout``, in the same unit.
        margin: a candidate that is cheaper may be worse by less than this, in points of the score (0 = it may not).
        cheaper: fraction of the parent's tokens a rollout that it must save for that.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    guard: Literal["none", "ladder", "thresholdout"] = "ladder"
    step: Annotated[float, msgspec.Meta(ge=0, le=10)] = 2.75
    noise: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.1
    margin: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    cheaper: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2


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
        second: a second verifier, which no lever works towards: ``task`` is the one that the task brings itself.
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
        budget: what the run may spend until its loop stops.
        prices: of models, by name; that of ``model`` is what its episodes' tokens cost, and nothing if it has none.
        machine: what its machines cost.
        harness: files of the first harness, by name; the task's own if there are none.
    """

    task: PluginChoice
    second: PluginChoice | None = None
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
    budget: BudgetConfig = BudgetConfig()
    prices: dict[str, Price] = {}
    machine: MachinePrice = MachinePrice()
    harness: dict[str, str] = {}


class PluginPin(msgspec.Struct, frozen=True, kw_only=True):
    """What a run depends on: a plugin, its distribution's version, and the hash of its code."""

    kind: str
    name: str
    version: str
    distribution: str
    hash: str


def _unknown(values: dict[str, Any], struct: msgspec.Struct) -> tuple[str, tuple[str, ...]] | None:
    """The first key, as a path, that the struct has no field for, and the fields that there are in its place.

    Recorded types themselves ignore such keys.
    """
    for key, value in values.items():
        if key not in struct.__struct_fields__:
            return key, struct.__struct_fields__
        field = getattr(struct, key)
        inner = {"": (value, field)} if isinstance(field, msgspec.Struct) else {}
        if isinstance(field, dict) and isinstance(value, dict):
            inner = {f".{name}": (value[name], part) for name, part in field.items()}
        for name, (given, part) in inner.items():
            if isinstance(part, msgspec.Struct) and isinstance(given, dict) and (found := _unknown(given, part)):
                return f"{key}{name}.{found[0]}", found[1]
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
        path, known = unknown
        raise ConfigError(f"The configuration has no {path!r}.", next_step=f"It has {', '.join(known)}.")
    if not config.levers:
        raise ConfigError("A run needs at least one lever.", next_step="Give --levers harness, weights or both.")
    return config
