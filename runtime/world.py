"""What decisions look up beside the state: the plugins and the task's public face, as pinned when the run started."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, TypeVar

import msgspec

from bascule.plugins.algorithm import Algorithm
from bascule.plugins.loader import Plugins, code_hash
from bascule.plugins.policy import AlgorithmInfo, Author, Policy
from bascule.plugins.task import PublicFace, Ranks, Task
from bascule.runtime.redaction import Redaction
from bascule.runtime.restricted import withholding
from bascule.schemas.codec import canonical
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import RunStarted, Split
from bascule.schemas.run import PluginPin, RunConfig

T = TypeVar("T")


def seeded(*parts: object) -> random.Random:
    """A generator that depends on ``parts`` alone, the same in every process."""
    text = "\0".join(str(p) for p in parts)
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))  # noqa: S311


def seed_of(*parts: object) -> int:
    """A 31-bit seed that depends on ``parts`` alone."""
    return seeded(*parts).getrandbits(31)


class World:
    """The plugins that one run uses.

    Args:
        pinned: what a recorded run is pinned to, None for a new one. An algorithm that was installed later is no option
            of its decisions, and where its version of a plugin is kept, that one decides.
    """

    def __init__(self, plugins: Plugins, config: RunConfig, pinned: Sequence[PluginPin] | None = None) -> None:
        self.plugins = plugins
        self.config = config
        self._versions = None if pinned is None else {(p.kind, p.name): p.version for p in pinned}

    def _version(self, kind: str, name: str) -> str | None:
        return self._versions.get((kind, name)) if self._versions else None

    @cached_property
    def task(self) -> Task:
        return self.plugins.registry.tasks.get(self.config.task.name)(self.config.task.params)

    @cached_property
    def public(self) -> PublicFace:
        return self.task.public()

    @cached_property
    def ordinal(self) -> bool:
        """Whether the task says that its rewards are ranks."""
        return isinstance(self.task, Ranks) and self.task.ordinal

    @cached_property
    def redaction(self) -> Redaction:
        """What keeps secrets out of what the run records."""
        return Redaction.of(self.plugins.registry)

    @cached_property
    def withholding(self) -> Redaction | None:
        """What keeps the items of a restricted task out of events; None for any other task."""
        return withholding(self.public)

    def recorded(self, data: T) -> T:
        """Data of an event as it is recorded: no items of a restricted task, no secrets."""
        return self.redaction.value(data if self.withholding is None else self.withholding.value(data))

    @cached_property
    def policy(self) -> Policy:
        choice = self.config.policy
        return self.plugins.registry.policies.get(choice.name, self._version("policy", choice.name))(choice.params)

    @cached_property
    def author(self) -> Author:
        choice = self.config.author
        return self.plugins.registry.authors.get(choice.name, self._version("author", choice.name))(choice.params)

    def algorithm(self, name: str) -> Algorithm:
        """An algorithm, in the version that the run is pinned to where that is kept.

        Raises:
            ConfigError: there is none of that name.
        """
        return self.plugins.registry.algorithms.get(name, self._version("algorithm", name))

    @cached_property
    def algorithms(self) -> tuple[AlgorithmInfo, ...]:
        """Installed algorithms with the parameters that this run gives them."""
        installed = self.plugins.registry.algorithms.items
        pinned = None if self._versions is None else [name for kind, name in self._versions if kind == "algorithm"]
        found = {name: self.algorithm(name) for name in (installed if pinned is None else pinned)}
        unknown = sorted(set(self.config.algorithms) - set(found))
        if unknown:
            raise ConfigError(f"There is no algorithm {unknown[0]!r}.", next_step=f"Known: {', '.join(sorted(found))}.")
        infos = []
        for name in sorted(found):
            defaults, given = found[name].defaults(), self.config.algorithms.get(name, {})
            odd = sorted(set(given) - set(defaults))
            if odd:
                raise ConfigError(
                    f"The algorithm {name} has no parameter {odd[0]!r}.",
                    next_step=f"Known: {', '.join(sorted(defaults))}.",
                )
            infos.append(
                AlgorithmInfo(
                    name=name,
                    version=found[name].version,
                    requires=found[name].requires,
                    params={**defaults, **given},
                )
            )
        return tuple(infos)

    def positions(self, split: Split) -> range:
        """The positions of a split that this run uses."""
        limits = {
            "train": 0,
            "dev": self.config.evaluation.dev_examples,
            "sealed": self.config.evaluation.sealed_examples,
            "regression": self.config.evaluation.regression,
        }
        n = len(self.public.split(split))
        return range(min(n, limits[split]) if limits[split] else n)

    def pins(self) -> tuple[PluginPin, ...]:
        """Version and hash of every plugin that the run uses, and of bascule itself, which makes the decisions."""
        c = self.config
        wanted = [
            ("task", c.task.name),
            ("policy", c.policy.name),
            ("author", c.author.name),
            ("engine", c.engine.name),
        ]
        wanted += [("algorithm", a.name) for a in self.algorithms]
        if c.second is not None:
            wanted.append(("verifier", c.second.name))
        provided = sorted(p for plugin in self.plugins.loaded for p in plugin.provides)
        wanted += [("redactor", p.partition(":")[2]) for p in provided if p.startswith("redactor:")]
        bascule = PluginPin(
            kind="runtime", name="bascule", version=version("bascule"), distribution="bascule", hash=code_hash()
        )
        return (*(self.plugins.pin(kind, name, self._version(kind, name)) for kind, name in wanted), bascule)


def task_digest(public: PublicFace) -> str:
    """Digest of a public face: specification, train items and questions."""
    return hashlib.blake2b(canonical(public), digest_size=16).hexdigest()


def world_of(plugins: Plugins, started: RunStarted) -> World:
    """The world of a recorded run.

    Raises:
        ConfigError: the task's public face is not the one that the run recorded.
    """
    world = World(plugins, started.config, started.plugins)
    found = task_digest(world.public)
    if found != started.task_digest:
        raise ConfigError(
            f"The task {started.config.task.name} has changed since the run started "
            f"(public face {found}, recorded {started.task_digest}).",
            next_step="Install the version of the task that the run recorded.",
        )
    return world


def changed_pins(plugins: Plugins, started: RunStarted) -> tuple[str, ...]:
    """What is installed otherwise than the run is pinned to, a line each."""
    installed = {(p.kind, p.name): p for p in world_of(plugins, started).pins()}
    lines = []
    for pin in started.plugins:
        now = installed.get((pin.kind, pin.name))
        if now is None:
            lines.append(f"{pin.kind} {pin.name} is not used any more")
        elif (now.version, now.distribution, now.hash) != (pin.version, pin.distribution, pin.hash):
            lines.append(f"{pin.kind} {pin.name}: {_pinned(pin)} when the run was pinned, {_pinned(now)} now")
    return tuple(lines)


def _pinned(pin: PluginPin) -> str:
    return f"version {pin.version} of {pin.distribution} ({pin.hash[:8]})"


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, nested dictionaries merged."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def plain(value: Any) -> Any:
    """A recorded value as plain JSON types."""
    return json.loads(msgspec.json.encode(value))
