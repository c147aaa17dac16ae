"""SIA's providers and profiles, and what of them Bascule has. They are JSON files in ``providers/`` and ``profiles/``.

Only the names of variables that hold keys are read. A key that stands in a file is neither read on nor told.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from bascule.schemas.errors import ConfigError

MAX_BYTES = 1 << 20
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,99}")
_PROVIDER = ("provider_id", "name", "client_kind", "base_url", "api_key_env", "litellm_prefix")
_PROFILE = ("profile_id", "name", "agent_impl", "model", "provider_id", "model_canonical_name", "agent_reference")


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model of SIA is asked."""

    provider_id: str
    name: str = ""
    client_kind: str = ""
    base_url: str | None = None
    api_key_env: str | None = None
    litellm_prefix: str | None = None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """An agent of one's own: a file, or a folder and which of its files is started."""

    source: str
    entrypoint: str | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A model of SIA in a role: with ``agent_impl`` one that writes agents, otherwise one that agents ask."""

    profile_id: str
    name: str = ""
    model: str
    provider_id: str
    agent_impl: str | None = None
    model_canonical_name: str | None = None
    agent_reference: str | Reference | None = None


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one profile.

    Attributes:
        role: ``target``: whom agents ask; ``meta``: who writes them.
        config: of a run, as far as there is a counterpart.
        without: what has none, a sentence each.
        key_variable: the environment variable in which SIA looks for the key.
    """

    profile: str
    file: str
    role: str
    config: dict[str, Any]
    without: tuple[str, ...]
    key_variable: str | None = None


def imported(folder: Path) -> list[Imported]:
    """Every profile of a folder of SIA's, in the order of the files.

    Args:
        folder: holds ``profiles/`` and ``providers/``.

    Raises:
        ConfigError: there are no profiles, or a file is none; names it.
    """
    files = sorted((folder / "profiles").glob("*.json"))
    if not files:
        raise ConfigError(
            f"There are no profiles of SIA in {folder}: it has no profiles/*.json.",
            next_step="Name the folder in which SIA was run, or that holds its profiles/ and providers/.",
        )
    providers = {}
    for file in sorted((folder / "providers").glob("*.json")):
        provider, odd = _read(file, Provider, _PROVIDER)
        providers[provider.provider_id] = (provider, odd)
    return [_profile(folder, file, providers) for file in files]


def _read(file: Path, type_: Any, known: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """A file, and the names of its fields that nothing here knows."""
    try:
        with file.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{file} is over {MAX_BYTES} bytes.", next_step="Remove it; it is no profile.")
        plain = msgspec.json.decode(data, type=dict[str, Any])
        return msgspec.convert(plain, type_), tuple(sorted(set(plain) - set(known)))
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {e.strerror}.", next_step="Correct its permissions.") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        # The message names a field and a type, and quotes no value.
        raise ConfigError(
            f"{file} is no {type_.__name__.lower()} of SIA: {e}.", next_step="Correct or remove it."
        ) from e


def _profile(folder: Path, file: Path, providers: dict[str, tuple[Provider, tuple[str, ...]]]) -> Imported:
    profile, odd = _read(file, Profile, _PROFILE)
    role = "meta" if profile.agent_impl is not None else "target"
    config: dict[str, Any] = {}
    without = [f"the field {name} of {file.name}" for name in odd]
    provider = providers.get(profile.provider_id)
    if role == "meta":
        without.append(
            f"the agent {profile.agent_impl} with the model {profile.model}, which writes agents: choose an author "
            "that is installed (--author; `bascule plugins` lists them)"
        )
    else:
        local = Path(profile.model).expanduser()
        local = local if local.is_absolute() else folder / local
        if local.is_dir():
            config["model"] = str(local.resolve())
        else:
            without.append(
                f"the model {profile.model} at a provider: the run's own engine answers; choose one with --engine and "
                "a model with --model"
            )
        config |= _agent(folder, profile, without)
    if profile.model_canonical_name is not None:
        without.append(f"model_canonical_name {profile.model_canonical_name}")
    return Imported(
        profile=profile.profile_id,
        file=file.name,
        role=role,
        config=config,
        without=(*without, *_provider(profile.provider_id, provider)),
        key_variable=_variable(provider[0].api_key_env) if provider is not None else None,
    )


def _agent(folder: Path, profile: Profile, without: list[str]) -> dict[str, Any]:
    reference = profile.agent_reference
    if reference is None or reference == "default":
        return {}
    if isinstance(reference, str):
        without.append(f"the agent_reference {reference!r}, which is neither default nor a source")
        return {}
    source = Path(reference.source).expanduser()
    source = source if source.is_absolute() else folder / source
    if (source / "requirements.txt").is_file():
        without.append(f"{source.name}/requirements.txt: nothing is installed for agents; packages are the task's")
    entry = {} if reference.entrypoint is None else {"entry": reference.entrypoint}
    return {"task": {"name": "sia-dir", "params": {"agent": str(source.resolve()), **entry}}}


def _provider(identity: str, found: tuple[Provider, tuple[str, ...]] | None) -> list[str]:
    if found is None:
        return [f"the provider {identity}, which is not in providers/"]
    provider, odd = found
    where = f" at {_address(provider.base_url)}" if provider.base_url else ""
    said = [f"the provider {identity} ({provider.client_kind or 'of no kind'}{where})"]
    if provider.api_key_env is not None and _variable(provider.api_key_env) is None:
        said.append(f"api_key_env of the provider {identity}, which is no variable's name and may be a key: not shown")
    return said + [f"the field {name} of the provider {identity}" for name in odd]


def _variable(name: str | None) -> str | None:
    """The name if it is one; what looks otherwise may be the key itself."""
    return name if name is not None and _VARIABLE.fullmatch(name) else None


def _address(url: str) -> str:
    """Without what may be secret in it: user, password, query."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "an address that is none"
