"""Finds and loads plugins, each on its own: a broken one is quarantined and listed, never taken along.

A plugin is trusted code in this process. Whatever it raises is held, its end of the process (``os._exit``, a crash of a
library) is not: ``BASCULE_DEBUG=1`` names each plugin before it is imported.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import FrameType

import msgspec
import pluggy
from pluggy import HookImpl

from bascule.plugins import hookspecs
from bascule.plugins.registry import NameTaken, Registry
from bascule.schemas.errors import PluginError
from bascule.schemas.run import PluginPin

GROUP = "bascule.plugins"
SLOW = 5.0
"""Seconds after which a plugin that still loads is named on standard error."""


class LoadedPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """One entry point and what became of it.

    Attributes:
        error: why it is quarantined; None if it is in use.
        provides: what it registered, as ``kind:name``.
        seconds: time to import and register.
    """

    name: str
    distribution: str
    version: str
    hash: str
    seconds: float
    provides: tuple[str, ...] = ()
    error: str | None = None


class Plugins(msgspec.Struct, frozen=True):
    """The result of loading: the registry of what works and the account of everything found."""

    registry: Registry
    loaded: tuple[LoadedPlugin, ...]

    def pin(self, kind: str, name: str, version: str | None = None) -> PluginPin:
        """Version and hash of what provides ``kind:name``, in that version where it is kept."""
        found = next(k for k in self.registry.kinds if k.name == kind)
        found.get(name)
        base = found.base(name)
        owner = found.owners[base]
        plugin = next(p for p in self.loaded if p.error is None and f"{kind}:{base}" in p.provides)
        return PluginPin(
            kind=kind,
            name=name,
            version=version if version is not None and (name, version) in found.earlier else found.versions[base],
            distribution=f"{owner} {plugin.version}",
            hash=plugin.hash,
        )


def _wanted(name: str) -> bool:
    allowed = os.environ.get("BASCULE_PLUGINS")
    return allowed is None or name in {p.strip() for p in allowed.split(",")}


def _entry_points() -> list[tuple[EntryPoint, Distribution]]:
    found: dict[tuple[str, str], tuple[EntryPoint, Distribution]] = {}
    for dist in distributions():
        for entry in dist.entry_points:
            if entry.group == GROUP and _wanted(entry.name):
                # An editable install can be found twice on the path; the same distribution is not a rival.
                found.setdefault((dist.metadata["Name"], entry.name), (entry, dist))
    return sorted(found.values(), key=lambda pair: (pair[0].name, pair[1].metadata["Name"]))


def _code_hash(folder: Path) -> str:
    h = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        data = path.read_bytes()
        h.update(len(data).to_bytes(8, "big") + str(path.relative_to(folder)).encode() + b"\0" + data)
    return h.hexdigest()


def _hash(entry: EntryPoint, module: object) -> str:
    """Hash of the plugin's own code: its package's files, which also covers editable installs."""
    file = getattr(module, "__file__", None)
    if file is None:
        return hashlib.blake2b(entry.value.encode(), digest_size=16).hexdigest()
    path = Path(file)
    if path.name == "__init__.py":
        return _code_hash(path.parent)
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def described(error: BaseException) -> str:
    """Class and text of what a plugin raised, whatever its own ``__str__`` does; can be printed and encoded."""
    try:
        text = str(error)
    except BaseException as e:  # also one that is raised to end the process: its text was only asked for
        return f"{type(error).__name__}, whose own text fails with {type(e).__name__}"
    return f"{type(error).__name__}: {text}".encode(errors="backslashreplace").decode()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the SIGINTs that come meanwhile, which tells a person's from a KeyboardInterrupt that a module raises.

    What handled the signal still does. Outside the main thread, where none arrives, the list stays empty.
    """
    seen: list[int] = []
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        former(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, former)


@contextmanager
def _told(plugin: str, seconds: float) -> Iterator[None]:
    """Says on standard error which plugin it is that takes longer than ``seconds``."""

    def tell(what: str) -> None:
        sys.stderr.write(f"bascule: {what}\n")
        sys.stderr.flush()

    if os.environ.get("BASCULE_DEBUG") == "1":
        tell(f"loading the plugin {plugin}")
    slow = threading.Timer(seconds, tell, [f"the plugin {plugin} is still loading after {seconds:g} s"])
    slow.daemon = True
    slow.start()
    try:
        yield
    finally:
        slow.cancel()
        slow.join()  # no thread is left to whoever forks next


def _hooks(manager: pluggy.PluginManager, module: object) -> list[HookImpl]:
    """The implementations of ``bascule_register`` by a registered module.

    Raises:
        PluginError: there is none, or it is no plain function.
    """
    found = [i for i in manager.hook.bascule_register.get_hookimpls() if i.plugin is module]
    if not found:
        kind = type(getattr(module, "bascule_register", None)).__name__
        has = f"its bascule_register is of type {kind}" if hasattr(module, "bascule_register") else "it has none"
        raise PluginError(f"it needs a function bascule_register(registry) that is marked with @hookimpl; {has}.")
    for i in found:
        if inspect.iscoroutinefunction(i.function) or inspect.isgeneratorfunction(i.function):
            raise PluginError("its bascule_register is a coroutine or a generator; it must be a plain function.")
    return found


def _register(manager: pluggy.PluginManager, registry: Registry, module: object, owner: str) -> tuple[str, ...]:
    before = [{*k.items, *k.families} for k in registry.kinds]
    registry.owner = owner
    if manager.register(module, name=owner) is None:
        raise PluginError("its entry point names None, and not a module.")
    try:
        manager.check_pending()
        for implementation in _hooks(manager, module):
            implementation.function(registry)
    except BaseException:
        manager.unregister(module)
        for kind, names in zip(registry.kinds, before, strict=True):
            for name in {*kind.items, *kind.families} - names:
                kind.items.pop(name, None)
                kind.families.pop(name, None)
                del kind.owners[name], kind.versions[name]
            for key in [k for k in kind.earlier if k[0] not in kind.items]:
                del kind.earlier[key]
        raise
    return tuple(
        f"{kind.name}:{name}"
        for kind, names in zip(registry.kinds, before, strict=True)
        for name in sorted({*kind.items, *kind.families} - names)
    )


def load_plugins() -> Plugins:
    """Load every installed plugin that ``BASCULE_PLUGINS`` (a comma-separated allow-list of names) lets through.

    With ``BASCULE_PLUGINS_STRICT=1`` a plugin that fails to load raises instead of being quarantined.

    Raises:
        PluginError: two plugins claim one name, or strict loading met a failure.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = Registry()
    loaded: list[LoadedPlugin] = []
    owners: dict[str, str] = {}
    for entry, dist in _entry_points():
        name = dist.metadata["Name"]
        owner = f"{name} ({entry.name})"
        if entry.name in owners:
            raise PluginError(
                f"Two distributions provide the plugin {entry.name!r}: {owners[entry.name]} and {name}.",
                next_step="Uninstall one of them.",
            )
        owners[entry.name] = name
        start = time.perf_counter()
        error: str | None = None
        provides: tuple[str, ...] = ()
        code = ""
        try:
            with _interrupts() as interrupts, _told(f"{entry.name!r} of {name}", SLOW):
                module = entry.load()
                api = getattr(module, "bascule_api", hookspecs.API)
                if api != hookspecs.API:
                    raise PluginError(f"it is made for plugin API {api}, and this is API {hookspecs.API}.")
                code = _hash(entry, module)
                provides = _register(manager, registry, module, owner)
        except NameTaken:
            raise
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt) and interrupts:
                raise
            error = described(e)
            if os.environ.get("BASCULE_PLUGINS_STRICT") == "1":
                raise PluginError(
                    f"The plugin {entry.name!r} of {name} does not load: {error}",
                    next_step="Repair or uninstall it, or unset BASCULE_PLUGINS_STRICT.",
                ) from e
        loaded.append(
            LoadedPlugin(
                name=entry.name,
                distribution=name,
                version=dist.version,
                hash=code,
                seconds=time.perf_counter() - start,
                provides=provides,
                error=error,
            )
        )
    return Plugins(registry, tuple(loaded))


@cache
def plugins() -> Plugins:
    """The process's plugins, loaded once."""
    return load_plugins()


@cache
def code_hash() -> str:
    """Hash of the installed ``bascule`` code, as recorded in every event's producer."""
    root = Path(__file__).parent.parent
    h = hashlib.blake2b(digest_size=16)
    for package in ("schemas", "plugins", "trainers", "verifiers", "runtime"):
        h.update(_code_hash(root / package).encode())
    return h.hexdigest()
