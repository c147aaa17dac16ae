"""The items of a reasoning-gym data set, made in a process of their own with a fixed hash seed.

Seven data sets of reasoning-gym 0.1.25 (``codeio``, ``isomorphic_strings``, ``word_ladder`` and others) iterate over
sets of strings, and so differ from process to process; under one hash seed they do not.

Run as ``python -P -m bascule.plugins.tasks.rg_data``: :class:`Wanted` as JSON on standard input, and on standard output
a pickled list of entries (``question``, ``answer``, ``metadata``), or of the two texts alone. The pickle comes from our
own program, so reading it is safe.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import lru_cache
from typing import Any

import msgspec

from bascule.plugins.extras import install_command
from bascule.schemas.errors import ConfigError

_ERROR = 3
_SECONDS = 1800


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to make.

    Attributes:
        slices: seed and size of each of the data sets; item i of one is made from ``seed + i``.
        texts: questions and answers alone, without what the scorer needs.
    """

    name: str
    options: dict[str, Any]
    slices: tuple[tuple[int, int], ...]
    texts: bool


def entries(wanted: Wanted) -> list[list[dict[str, Any]]]:
    """The entries of each slice; not to be changed.

    Raises:
        ConfigError: reasoning-gym is not installed, has no such data set, or cannot make it with these options.
    """
    return _entries(wanted.name, msgspec.json.encode(wanted))


@lru_cache(maxsize=8)
def _entries(name: str, wanted: bytes) -> list[list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bascule.plugins.tasks.rg_data"],
        input=wanted,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode == _ERROR:
        raise msgspec.json.decode(done.stdout, type=_Failure).error()
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(
            f"The items of rg:{name} cannot be made: {' '.join(last) or f'exit code {done.returncode}'}.",
            next_step="Choose another data set of reasoning-gym.",
        )
    found: list[list[dict[str, Any]]] = pickle.loads(done.stdout)  # noqa: S301
    return found


class _Failure(msgspec.Struct):
    message: str
    next_step: str

    def error(self) -> ConfigError:
        return ConfigError(self.message, next_step=self.next_step)


def dataset(name: str, options: dict[str, Any], *, seed: int = 0, size: int = 1) -> Any:
    """The data set, from reasoning-gym.

    Raises:
        ConfigError: it is not installed, has no such data set, or refuses the options.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as e:
        raise ConfigError(
            "The package reasoning-gym is not installed.", next_step=f"Install it: {install_command('rg')}"
        ) from e
    if name not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no data set {name!r}.", next_step=f"It has {', '.join(sorted(DATASETS))}."
        )
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except Exception as e:
        text = " ".join(str(e).split())
        raise ConfigError(
            f"reasoning-gym does not make {name!r} with the options {options}: {type(e).__name__}: {text[:300]}.",
            next_step="Correct the parameter options of the task.",
        ) from e


def make(wanted: Wanted) -> list[list[dict[str, Any]]]:
    """The entries of each slice, in this process."""
    made = []
    for seed, size in wanted.slices:
        data = dataset(wanted.name, wanted.options, seed=seed, size=size)
        every = [data[i] for i in range(size)]
        made.append([{k: e[k] for k in ("question", "answer")} for e in every] if wanted.texts else every)
    return made


def main() -> None:
    # What a data set prints goes nowhere: standard output is the answer.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        data = pickle.dumps(make(msgspec.json.decode(sys.stdin.buffer.read(), type=Wanted)))
    except ConfigError as e:
        answer.write(msgspec.json.encode(_Failure(e.message, e.next_step or "")))
        answer.close()
        sys.exit(_ERROR)
    answer.write(data)
    answer.close()


if __name__ == "__main__":
    main()
