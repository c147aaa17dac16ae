"""Profiles: one TOML file that names everything of a run. It holds names of environment variables, and never a key."""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.loader import Plugins
from bascule.plugins.registry import Kind
from bascule.runtime.cli.configuration import CHOICES, with_model
from bascule.runtime.cli.harness_folder import harness_in
from bascule.runtime.cli.own_tasks import chosen_task
from bascule.runtime.redaction import Redaction
from bascule.runtime.world import merged, plain
from bascule.schemas.errors import BasculeError, ConfigError
from bascule.schemas.run import PluginChoice, RunConfig, parse_config

USUAL_TASK = "arith"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_RELATIVE = ("./", "../")
_STEP = "Correct it in that file; --set KEY=VALUE changes a value without it."


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile that was read and checked.

    Attributes:
        file: where it stands.
        values: of the run's configuration, nested as they are recorded.
    """

    file: Path
    values: dict[str, Any]


def read_profile(file: Path, loaded: Plugins) -> Profile:
    """Read a profile and check what can be checked of it alone: keys, types, ranges, names of plugins and algorithms.

    A plugin stands as its name or as ``{name = ..., params = {...}}``, the first harness as the path of its folder;
    that path, and those that begin with ``./`` or ``../``, are relative to the file's folder.

    Raises:
        ConfigError: there is no such file, it is no TOML, or a value is not usable; names the file and the key.
    """
    with named_file("profile", file):
        check_leaves(values := parsed(file), loaded)
        return Profile(file=file, values=checked(values, file.absolute().parent, loaded))


@contextmanager
def named_file(what: str, file: Path) -> Iterator[None]:
    """Have what is refused of a file's values say which file it is."""
    try:
        yield
    except BasculeError as e:
        message = f"The {what} {file} cannot be used: {e.message}"
        raise ConfigError(message, next_step=e.next_step or _STEP) from e


def check_leaves(values: dict[str, Any], loaded: Plugins) -> None:
    """Refuse what no recorded configuration holds, and what looks like a key.

    Raises:
        ConfigError: naming the path.
    """
    redaction = Redaction.of(loaded.registry)
    for path, key, value in _leaves(values, ""):
        _check_plain(path, value)
        if isinstance(value, str):
            _check_no_key(path, key, value, redaction)


def checked(values: dict[str, Any], folder: Path, loaded: Plugins) -> dict[str, Any]:
    """Values of a run's configuration as they are recorded: plugins with parameters, absolute paths, a harness's files.

    Args:
        folder: that paths are relative to.

    Raises:
        ConfigError: naming the key that is unknown, or whose value is not usable.
        HarnessError: the folder of the harness is not usable.
    """
    found = _chosen(folder, values)
    _check_config(found)
    _check_names(found, loaded)
    return found


def asked_task(named: str | None, regime: str | None, profile: Profile | None) -> dict[str, Any] | None:
    """The task of a run: the one that is named, else the profile's (None: nothing of it is changed), else ``arith``."""
    params = {"regime": regime} if regime is not None else {}
    if named == "":
        raise ConfigError("--task names none.", next_step="`bascule tasks` lists them.")
    if named is None and profile is not None and "task" in profile.values:
        return {"params": params} if params else None
    return chosen_task(named or USUAL_TASK, params)


@contextmanager
def attributed(profile: Profile | None) -> Iterator[None]:
    """Have a configuration that is refused say which profile it is from."""
    try:
        yield
    except ConfigError as e:
        if profile is None:
            raise
        raise ConfigError(f"With the profile {profile.file}: {e.message}", next_step=e.next_step) from e


def _refused(what: str, next_step: str = _STEP) -> ConfigError:
    return ConfigError(what, next_step=next_step)


def parsed(file: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(file.read_bytes().decode())
    except tomllib.TOMLDecodeError as e:
        raise _refused(f"it is no valid TOML: {e}.", "Correct that line.") from e
    except UnicodeDecodeError as e:
        raise _refused(f"it is no UTF-8 text: {e}.", "Save it as UTF-8.") from e
    except RecursionError as e:
        raise _refused("its values are nested too deeply.", "Correct it.") from e
    except OSError as e:
        raise _refused(f"{e.strerror or e}.", "Name a file that you can read; ops/profiles/ holds some.") from e


def _leaves(value: Any, path: str, key: str | None = None) -> Iterator[tuple[str, str | None, Any]]:
    """Dotted path, nearest name and value of everything that is no container, keys of tables included as values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            below = f"{path}.{name}" if path else name
            yield path or name, None, name
            yield from _leaves(inner, below, name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]", key)
    else:
        yield path, key, value


def _check_plain(path: str, value: Any) -> None:
    """Refuse what TOML has and a recorded configuration has not."""
    if isinstance(value, datetime.date | datetime.time):
        raise _refused(f"{path} is a date or a time; no value of a run is one.")
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(f"{path} is {value}, which is no number.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _refused(f"{path} is a number of more than 64 bits.")


def _check_no_key(path: str, key: str | None, value: str, redaction: Redaction) -> None:
    """Refuse a value that looks like a key, which would be recorded; the message does not hold it."""
    step = "Put the key into an environment variable, and name that in key_env."
    if redaction.text(value) != value or (key is not None and redaction.text(value, key) != value):
        # Where a key of a table is the secret, its path would show it.
        where = redaction.text(path)
        raise _refused(f"{where} holds what looks like a key or a password.", step)
    if key is not None and (key == "key_env" or key.endswith("_key_env")) and value and not _VARIABLE.fullmatch(value):
        what = f"{path} is the name of an environment variable: capital letters, digits and underscores; this is none."
        raise _refused(what, step)


def _chosen(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Plugins as recorded, with name and parameters, and paths that do not depend on the working folder."""

    def located(text: Any) -> Any:
        if not (isinstance(text, str) and text.startswith(_RELATIVE)):
            return text
        return str(Path(folder, text).resolve())

    found = dict(values)
    for kind in CHOICES:
        if isinstance(found.get(kind), str):
            found[kind] = _task(located(found[kind])) if kind == "task" else {"name": found[kind]}
        choice = found.get(kind)
        params = choice.get("params") if isinstance(choice, dict) else None
        if isinstance(choice, dict) and isinstance(params, dict) and "path" in params:
            found[kind] = {**choice, "params": {**params, "path": located(params["path"])}}
    if "model" in found:
        found = with_model(found, located(found["model"]))
    if isinstance(found.get("harness"), str):
        found["harness"] = harness_in(Path(folder, found["harness"]))
    return found


def _task(text: str) -> dict[str, Any]:
    try:
        return chosen_task(text, {})
    except ConfigError as e:
        raise _refused(f"task: {e.message}", e.next_step or _STEP) from e


def _check_config(values: dict[str, Any]) -> None:
    """Refuse unknown keys and wrong types, by their dotted paths; what the file leaves out is as usual."""
    usual = plain(RunConfig(task=PluginChoice(name="any")))
    for kind in CHOICES:
        choice = values.get(kind)
        if isinstance(choice, dict) and (odd := sorted(set(choice) - {"name", "params"})):
            what = f"{kind}.{odd[0]} is unknown; parameters of a plugin stand in {kind}.params."
            raise _refused(what, f"{kind} has name and params.")
    try:
        parse_config(merged(usual, values))
    except ConfigError as e:
        # As it comes from msgspec: "Expected `int`, got `str` - at `$.evaluation.dev_examples`".
        raise _refused(e.message.replace("`$.", "`"), e.next_step or _STEP) from e


def _check_names(values: dict[str, Any], loaded: Plugins) -> None:
    """Refuse plugins and algorithms that are not installed, and parameters that an algorithm does not have."""
    registry = loaded.registry
    kinds: dict[str, Kind[Any]] = {
        "task": registry.tasks,
        "engine": registry.engines,
        "policy": registry.policies,
        "author": registry.authors,
    }
    for kind, known in kinds.items():
        name = values.get(kind, {}).get("name")
        if name is not None:
            _look_up(f"{kind}.name", known, name)
    for name, params in values.get("algorithms", {}).items():
        has = sorted(_look_up(f"algorithms.{name}", registry.algorithms, name).defaults())
        odd = sorted(set(params) - set(has))
        if odd:
            raise _refused(f"algorithms.{name}.{odd[0]} is unknown.", f"{name} has {', '.join(has)}.")


def _look_up(key: str, kind: Kind[Any], name: str) -> Any:
    try:
        return kind.get(name)
    except ConfigError as e:
        raise _refused(f"{key}: {e.message}", e.next_step or _STEP) from e
