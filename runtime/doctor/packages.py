"""Versions: of Python, of bascule and of what it imports, against the ranges that bascule is made for."""

from __future__ import annotations

import contextlib
import platform
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bascule.plugins.extras import install_command
from bascule.plugins.loader import described
from bascule.runtime.doctor.endpoints import wanted
from bascule.runtime.doctor.finding import BEGUN, Asked, Finding, Outcome, embeds, failed, learns
from bascule.runtime.engines.presets import preset_of
from bascule.runtime.engines.vllm_server import find_python
from bascule.schemas.errors import ConfigError
from bascule.schemas.run import RunConfig

_ROOT = Path(__file__).resolve().parents[2]
#: Imported to see whether they can be, where the extra that brings them is needed.
_IMPORTED = {
    "torch": ("torch", "transformers", "peft"),
    "claude": ("anthropic",),
    "openai": ("openai",),
    "tuner": ("optuna",),
    "trl": ("trl",),
}
#: Extras that are nobody's need but a developer's.
_HIDDEN = ("dev",)


def declared() -> tuple[str, dict[str, list[Requirement]]]:
    """The range of Python and the requirements by extra (``""``: without any), from the distribution's metadata.

    A checkout's own ``pyproject.toml`` goes before: metadata of an editable install are as old as the install.
    """
    file = _ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        found = {"": project["dependencies"], **project["optional-dependencies"]}
        return project["requires-python"], {k: [Requirement(x) for x in v] for k, v in found.items()}
    known = metadata("bascule")
    extras: dict[str, list[Requirement]] = {"": [], **{e: [] for e in known.get_all("Provides-Extra") or []}}
    for text in known.get_all("Requires-Dist") or []:
        one = Requirement(text)
        needing = [e for e in extras if one.marker is None or one.marker.evaluate({"extra": e})]
        for extra in [""] if "" in needing else needing:
            extras[extra].append(one)
    return known["Requires-Python"], extras


def needed_extras(config: RunConfig) -> set[str]:
    """The extras that a configuration cannot do without."""
    needed = {"torch"} if embeds(config) or learns(config) else set()
    with contextlib.suppress(ConfigError):  # said where the endpoints are looked at
        needed |= {"claude" if one.provider == "anthropic" else "openai" for one in wanted(config)}
    if config.engine.name == "vllm":
        needed.add("vllm" if config.engine.params.get("mode") == "inside" else "openai")
        needed |= {"harmony"} if preset_of(config.model).harmony else set()
    if config.author.name == "tuner":
        needed.add("tuner")
    if config.task.name.startswith("rg:"):
        needed.add("rg")
    if learns(config) and "trl-grpo" in (config.policy.params.get("algorithm"), *config.algorithms):
        needed.add("trl")
    return needed


def check_versions(asked: Asked) -> Iterator[Finding]:
    """What is installed, by the metadata; nothing is imported."""
    python, extras = declared()
    inside = SpecifierSet(python).contains(platform.python_version(), prereleases=True)
    yield Finding(
        about="python",
        outcome="ok" if inside else "fails",
        found=f"{platform.python_version()} at {sys.executable}; {python} is asked for",
        next_step="" if inside else "Make the environment anew with such a Python.",
    )
    yield Finding(about="bascule", outcome="ok", found=version("bascule"))
    needed = {""} | (needed_extras(asked.config) if asked.config is not None else {"torch"})
    for extra, requirements in extras.items():
        if extra not in _HIDDEN:
            yield _extra(extra, requirements, required=extra in needed)
    if asked.config is not None and asked.config.engine.name == "vllm":
        yield from _vllm(asked.config.engine.params)


def _extra(extra: str, requirements: list[Requirement], *, required: bool) -> Finding:
    about = f"packages [{extra}]" if extra else "packages"
    missing, odd, there = [], [], []
    for one in requirements:
        if one.name == "bascule" or (one.marker is not None and not one.marker.evaluate({"extra": extra})):
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            missing.append(one.name)
            continue
        there.append(f"{one.name} {found}")
        if not one.specifier.contains(found, prereleases=True):
            odd.append(f"{one.name} {found} is not within {one.specifier}")
    step = f"Install it: {install_command(extra)}" if extra else "Install bascule anew, with pip."
    if missing:
        outcome: Outcome = "fails" if required else "skipped"
        what = f"not installed: {', '.join(missing)}" + ("" if required else "; this configuration needs none of it")
        return Finding(about=about, outcome=outcome, found="; ".join([what, *odd]), next_step=step)
    if odd:
        return Finding(about=about, outcome="warns", found="; ".join(odd), next_step=step)
    return Finding(about=about, outcome="ok", found=", ".join(there) if extra else f"{len(there)} within their ranges")


def _vllm(params: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether there is a vLLM for an engine that starts its own server."""
    if params.get("url") or params.get("urls") or params.get("mode") == "inside":
        return
    try:
        python = find_python(str(params.get("environment", "")))
    except ConfigError as e:
        yield failed("vllm", e)
        return
    yield Finding(about="vllm", outcome="ok", found=f"is started by {python}")


def check_imports(asked: Asked) -> Iterator[Finding]:
    """Import the packages that the configuration needs and that break most often, one line each."""
    needed = needed_extras(asked.config) if asked.config is not None else {"torch"}
    for extra in sorted(needed & set(_IMPORTED)):
        for name in _IMPORTED[extra]:
            try:
                found = version(name)
            except PackageNotFoundError:
                continue
            # Said before, so that a package that ends this process is known by name.
            yield Finding(about=f"import {name}", outcome="skipped", found=BEGUN)
            try:
                import_module(name)
            except BaseException as error:  # whatever a package raises
                yield Finding(
                    about=f"import {name}",
                    outcome="fails",
                    found=f"{name} {found} cannot be imported: {described(error)}"[:600],
                    next_step=f"Install it anew: {install_command(extra)}",
                )
                continue
            yield Finding(about=f"import {name}", outcome="ok", found=found)
