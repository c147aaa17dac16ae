"""What a run is asked to do: from the task's defaults and the user's values to its start, checked and pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import msgspec

from bascule.plugins.algorithm import Algorithm, Stream
from bascule.plugins.engine import cannot
from bascule.plugins.extras import install_command
from bascule.plugins.loader import Plugins
from bascule.plugins.perturb import can_perturb
from bascule.plugins.policy import CallsModels, ChecksStart, PolicyStart
from bascule.plugins.task import SecondOpinion
from bascule.runtime.cli.harness_folder import check_harness
from bascule.runtime.engines.remote import REMOTE
from bascule.runtime.engines.vllm import RANKS
from bascule.runtime.log.rules import MAX_BATCH
from bascule.runtime.services.budgets import bounds_dollars, check_prices
from bascule.runtime.services.inference import check_trainable, engine_params
from bascule.runtime.spending import paid_target
from bascule.runtime.world import World, merged, plain, task_digest
from bascule.schemas.errors import ConfigError, TrainError
from bascule.schemas.events import RunStarted
from bascule.schemas.run import PluginChoice, RunConfig, parse_config
from bascule.trainers.credit import credit_of
from bascule.trainers.params import TrainParams, train_params

#: The parts of a configuration that are a plugin with its parameters.
CHOICES = ("task", "second", "engine", "policy", "author")


def configure(
    given: dict[str, Any], overrides: Sequence[str], loaded: Plugins, profile: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run's configuration: the task's defaults, then the values of a profile, of options, and of overrides.

    Raises:
        ConfigError: an unknown task, plugin, field or value.
    """
    base = layered(profile or {}, {k: v for k, v in given.items() if v is not None})
    for item in overrides:
        base = layered(base, override(item))
    played = base.get("task")
    if not isinstance(played, dict) or "name" not in played or not isinstance(played.get("params", {}), dict):
        raise ConfigError(f"{played!r} does not name a task.", next_step="Set task.name; `bascule tasks` lists them.")
    engine = base.get("engine")
    # A resume may come from another folder. An endpoint's model is a name, whatever lies here.
    named = base.get("model")
    remote = isinstance(engine, dict) and engine.get("name") in REMOTE
    if isinstance(named, str) and named and "\0" not in named and not remote and Path(named).exists():
        base = with_model(base, str(Path(named).absolute()))
    path = engine["params"].get("path") if isinstance(engine, dict) and isinstance(engine.get("params"), dict) else None
    if isinstance(path, str):
        base = merged(base, {"engine": {"params": {"path": str(Path(path).absolute())}}})
    task = loaded.registry.tasks.get(str(played["name"]))(played.get("params", {}))
    defaults = merged(plain(RunConfig(task=PluginChoice(name=task.name))), task.defaults())
    for kind in ("author", "policy", "engine"):
        usual = defaults[kind]["name"]
        if isinstance(base.get(kind), dict) and base[kind].get("name", usual) != usual:
            defaults.pop(kind)  # parameters for one plugin say nothing to another
    # What the task makes of its parameters is recorded, so that a report needs no plugin to say what was played.
    regime = getattr(task, "regime", "")
    named = {"task": {"params": {"regime": regime}}} if regime else {}
    # And which file of the user's it was, where the task reads one, so that no other takes its place.
    named = merged(named, {"task": {"params": getattr(task, "pinned", {})}})
    return parse_config(merged(merged(defaults, base), named))


def with_model(values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Values whose model has another name; the price that it has among them goes with it."""
    found = {**values, "model": model}
    if isinstance(prices := values.get("prices"), dict):
        found["prices"] = {model if name == values.get("model") else name: price for name, price in prices.items()}
    return found


def layered(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``; where it names another plugin, the parameters given for the former one are gone."""
    kept = dict(base)
    for kind in CHOICES:
        below, above = base.get(kind), over.get(kind)
        if isinstance(below, dict) and isinstance(above, dict):
            name = below.get("name")
            if name is not None and above.get("name", name) != name:
                del kept[kind]
    if "harness" in over:
        kept.pop("harness", None)  # files of two harnesses are none
    return merged(kept, dict(over))


def override(item: str) -> dict[str, Any]:
    """``KEY=VALUE`` as nested configuration values; VALUE is JSON, or else text.

    A plugin may be named alone (``policy=rules``), and its parameters without ``params`` (``policy.patience=2``).

    Raises:
        ConfigError: it is not KEY=VALUE.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item!r} is not KEY=VALUE.", next_step="For example --set gate.alpha=0.01.")
    try:
        value: Any = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = text
    parts = key.split(".")
    if parts[0] in CHOICES:
        if len(parts) == 1 and isinstance(value, str):
            parts.append("name")
        elif len(parts) == 2 and parts[1] not in ("name", "params"):
            parts.insert(1, "params")
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def preflight(config: RunConfig, loaded: Plugins) -> RunStarted:
    """Check everything that can be checked before anything is recorded or spent, and pin it.

    Raises:
        BasculeError: a plugin, the task's data or the model is not there or not usable.
    """
    world = World(loaded, config)
    usable = check_choices(world)
    public = world.public
    check_splits(world)
    check_gate(world)
    check_harness(world)
    digest = ""
    served = config.engine.name == "vllm" and not {"url", "urls"} & config.engine.params.keys()
    if config.engine.name == "transformers" or served or "weights" in config.levers:
        from bascule.trainers.base_model import model_digest, resolve_model

        folder = resolve_model(config.model)
        digest = model_digest(folder)
        if "weights" in config.levers:
            check_training(world, folder, usable)
    return RunStarted(
        config=config,
        task_version=public.version,
        task_digest=task_digest(public),
        train=len(world.positions("train")),
        dev=len(world.positions("dev")),
        sealed=len(world.positions("sealed")),
        model_digest=digest,
        plugins=world.pins(),
    )


def check_choices(world: World) -> dict[str, TrainParams]:
    """Check what needs neither the task's data nor the model: the plugins, their parameters, the budget.

    Returns:
        As :func:`check_algorithms`.

    Raises:
        ConfigError: naming what is not usable.
    """
    config = world.config
    engine = world.plugins.registry.engines.get(config.engine.name)(config.model, engine_params(config, config.engine))
    check_trainable(world, cannot(engine))
    _ = world.author
    usable = check_algorithms(world)
    check_policy(world)
    check_ranks(world, usable)
    check_budget(world)
    return usable


def check_algorithms(world: World) -> dict[str, TrainParams]:
    """The training parameters of each usable algorithm, by its name.

    One that is only installed, and broken, does not concern the run until a policy chooses it; then its job fails.

    Raises:
        ConfigError: one that the configuration names is not usable so; names it and the parameter.
    """
    usable = {}
    named = {*world.config.algorithms, *_told(world)}
    for info in world.algorithms:
        try:
            usable[info.name] = _check_algorithm(world.algorithm(info.name), info.params)
        except (ConfigError, TrainError) as error:
            if info.name not in named:
                continue
            raise ConfigError(
                f"The algorithm {info.name} cannot be used so. {error.message}",
                next_step=error.next_step or f"Correct it with --set algorithms.{info.name}.NAME=VALUE.",
            ) from error
    return usable


def _told(world: World) -> tuple[str, ...]:
    """The algorithms that the run's policy is told to use."""
    return world.policy.named if isinstance(world.policy, ChecksStart) else ()


def check_policy(world: World) -> None:
    """Refuse a run in which its policy could not do as it is told.

    Raises:
        ConfigError: names what does not fit.
    """
    if isinstance(world.policy, ChecksStart):
        config = world.config
        world.policy.check(
            PolicyStart(
                levers=config.levers,
                algorithms=world.algorithms,
                train_samples=config.evaluation.train_samples,
            )
        )


def check_ranks(world: World, usable: Mapping[str, TrainParams]) -> None:
    """Refuse adapters that a vLLM which the run starts would not take.

    Args:
        usable: the training parameters by algorithm.

    Raises:
        ConfigError: names the algorithm.
    """
    given, told = world.config.engine.params, _told(world)
    starts = world.config.engine.name == "vllm" and not (given.get("url") or given.get("urls"))
    if not starts or "weights" not in world.config.levers:
        return
    most = given.get("max_lora_rank", RANKS[-1])
    for name, params in usable.items():
        if params.lora_r > most and (not told or name in told):
            raise ConfigError(
                f"The algorithm {name} trains adapters of rank {params.lora_r}, and 'vllm' is to take up to {most}.",
                next_step=f"Leave engine.max_lora_rank out (at most {RANKS[-1]}), or lower algorithms.{name}.lora_r.",
            )


def _check_algorithm(algorithm: Algorithm, given: dict[str, Any]) -> TrainParams:
    params = train_params(given)
    unknown = sorted(set(algorithm.streams) - set(get_args(Stream)))
    if unknown:
        raise TrainError(f"It asks for the stream {unknown[0]!r}; there are {', '.join(get_args(Stream))}.")
    if params.lora_dropout and algorithm.requires.behaviour_logprobs:
        raise ConfigError(
            f"lora_dropout is {params.lora_dropout:g}, and with dropout a probability ratio is not 1 where the policy "
            "has not moved.",
            next_step="Set it to 0, or use an algorithm that imitates or compares pairs.",
        )
    if algorithm.requires.on_policy and params.num_generations < algorithm.requires.group_size:
        raise ConfigError(
            f"num_generations is {params.num_generations}; it needs {algorithm.requires.group_size} samples a group."
        )
    credit_of(algorithm, [], given)
    return params


def check_training(world: World, folder: Path, asked: Mapping[str, TrainParams]) -> None:
    """Refuse training that the base model or what is installed does not allow.

    The embedded base model allows whatever does not name its parts, and is not looked at then: imports take seconds.

    Args:
        folder: of the base model; its configuration is read and no weights.
        asked: the parameters by algorithm.

    Raises:
        ConfigError: TRL is asked for and not there, the trainer cannot compute the model, or the model lacks a target
            of an algorithm's adapter.
    """
    if "trl-grpo" in _told(world) and find_spec("trl") is None:
        raise ConfigError(
            "The policy is told to use trl-grpo, and TRL is not installed.",
            next_step=f"Choose the algorithm grpo, or install it: {install_command('trl')}",
        )
    from bascule.trainers.base_model import DEFAULT_MODEL, IMPORTS

    named = any(p.lora_target_modules is not None or p.lora_target_parameters for p in asked.values())
    if world.config.model == DEFAULT_MODEL and not named:
        return
    import torch

    from bascule.trainers.forward import check_base
    from bascule.trainers.lora import targets

    with IMPORTS:
        from transformers import AutoConfig, AutoModelForCausalLM
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            base = build(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ConfigError(
            f"The model in {folder} cannot be built: {e}.", next_step="Name a causal language model."
        ) from e
    check_base(base)
    for name, params in asked.items():
        try:
            targets(base, params)
        except ConfigError as e:
            raise ConfigError(f"The algorithm {name}: {e.message}", next_step=e.next_step) from e


def check_budget(world: World) -> None:
    """Refuse a budget in dollars without the prices that it needs.

    Raises:
        ConfigError: names the first price that is missing.
    """
    if not bounds_dollars(world.config):
        return
    callers = [x for x in (world.policy, world.author) if isinstance(x, CallsModels)]
    target = paid_target(world.config)
    check_prices(world.config, [*(m for c in callers for m in c.models), *((target,) if target else ())])


def check_splits(world: World) -> None:
    """Refuse a task that a run could not get through.

    Raises:
        ConfigError: a split is empty, a train item has no answer, or a decision would ask for too many shards.
    """
    public, e = world.public, world.config.evaluation
    for split in ("train", "dev", "sealed"):
        if not public.split(split):
            raise ConfigError(
                f"The split {split} of the task {public.name} is empty.", next_step="A run needs all three."
            )
    missing = [x.id for x in public.train if x.id not in public.answers]
    if missing:
        raise ConfigError(
            f"The task {public.name} has no answer for the train item {missing[0]!r}.", next_step="Correct the task."
        )
    sizes = (
        (2 * e.fresh_dev or len(world.positions("dev"))) + e.train_groups,
        2 * (min(e.perturbed, len(world.positions("dev"))) + len(world.positions("regression"))),
        2 * len(world.positions("sealed")),
    )
    shards = max(-(-size // world.config.shard_size) for size in sizes) + 4
    if shards > MAX_BATCH:
        raise ConfigError(
            f"A decision would ask for {shards} shards, and an atomic batch holds {MAX_BATCH} events.",
            next_step="Raise shard_size, or lower the evaluation sizes.",
        )


def check_gate(world: World) -> None:
    """Refuse what the gate is told to look at and the task does not have.

    Raises:
        ConfigError: there is no such second verifier, or dev cannot be asked in another form or has too few examples.
    """
    config, public, e = world.config, world.public, world.config.evaluation
    if config.second is not None:
        world.plugins.registry.verifiers.get(config.second.name)
        if config.second.name == "task" and not isinstance(world.task, SecondOpinion):
            raise ConfigError(
                f"The task {public.name} has no second verifier of its own.",
                next_step="Leave `second` out, or name one of a plugin: `bascule plugins` lists them.",
            )
    if e.perturbed and not all(can_perturb(world.task, public.dev[p]) for p in world.positions("dev")):
        raise ConfigError(
            f"The items of {public.name} cannot be asked in another form: they have no text `question`, and the task "
            "has no rules of its own.",
            next_step="Leave evaluation.perturbed at 0.",
        )
    dev, measured = len(world.positions("dev")), config.max_generations + 1
    if measured * e.fresh_dev > dev:
        raise ConfigError(
            f"Each generation is to have {e.fresh_dev} fresh examples of dev, {measured * e.fresh_dev} with the first "
            f"candidate's, and {public.name} has {dev}.",
            next_step=f"Set evaluation.fresh_dev to at most {dev // measured} (0: the same ones each time), fewer "
            "generations, or, where the task makes its items, task.params.dev.",
        )


def cautions(started: RunStarted) -> list[str]:
    """What a run is told that goes on all the same, a sentence each."""
    gate, asked = started.config.gate, started.config.evaluation.fresh_dev or started.dev
    # All pairs for the candidate are the square root of their number, in standard errors.
    if gate.version > 1 and gate.guard != "none" and asked <= gate.step**2:
        said = (
            f"On {asked} examples of dev no candidate can be {gate.step:g} standard errors better than its parent, as "
            "the gate's guard asks for: nothing will be promoted, unless with --set gate.guard=none."
        )
        return [said]
    return []
