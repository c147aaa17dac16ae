"""Experiments as TOML files: what all arms share, what ``--quick`` lays over it, and what each arm sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bascule.plugins.loader import Plugins
from bascule.runtime.cli.configuration import configure, layered, preflight
from bascule.runtime.cli.profiles import USUAL_TASK, check_leaves, checked, named_file, parsed, read_profile
from bascule.runtime.experiments.comparison import ArmPlan, usual_baselines
from bascule.runtime.experiments.votes import MOST, votes_of, voting
from bascule.runtime.world import World, merged
from bascule.schemas import subjects
from bascule.schemas.budget import Bounds
from bascule.schemas.errors import BasculeError, ConfigError
from bascule.schemas.events import RunStarted
from bascule.schemas.run import RunConfig

TABLES = ("experiment", "run", "quick", "arms")
#: What an arm may not set: by these the arms would not be comparable. Seeds are the experiment's.
SHARED = ("budget", "evaluation", "seed", "task")
#: What makes no sense in an arm that pulls nothing.
_PULLING = ("levers", "policy", "author", "algorithms", "max_generations")
_STEP = "Correct it in that file."
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[experiment]``.

    Attributes:
        name: its runs are called ``<name>-<arm>-s<seed>``.
        baselines: arms that each other one is held against; the first one of each lever alone if it is empty.
    """

    name: str
    seeds: Annotated[tuple[Seed, ...], msgspec.Meta(min_length=1)] = (1, 2, 3)
    description: str = ""
    baselines: tuple[str, ...] = ()


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """An experiment that was read and checked.

    Attributes:
        name: as its runs begin; with ``--quick`` it ends in ``-quick``.
        started: how the runs of each arm start, by its name, save for their seed.
    """

    name: str
    description: str
    quick: bool
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    arms: tuple[ArmPlan, ...]
    started: dict[str, RunStarted]

    def run(self, arm: str, seed: int) -> str:
        """The name of a run."""
        return run_name(self.name, arm, seed)


def read_experiment(
    file: Path, loaded: Plugins, *, quick: bool = False, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Experiment:
    """Read an experiment and check all of it, before anything is recorded or spent.

    Args:
        quick: lay the file's table ``[quick]`` over what all arms share.
        only: the arms to make; all of them if it is empty.
        seeds: instead of the file's.

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be used; names file and key.
    """
    with named_file("experiment", file):
        check_leaves(tables := _tables(file), loaded)
        return _read(tables, file.absolute().parent, loaded, quick=quick, only=only, seeds=seeds)


def _tables(file: Path) -> dict[str, Any]:
    try:
        return parsed(file)
    except ConfigError as e:
        if isinstance(e.__cause__, OSError):
            raise ConfigError(e.message, next_step="Name a file that you can read; ops/experiments/ holds some.") from e
        raise


def _read(
    tables: dict[str, Any], folder: Path, loaded: Plugins, *, quick: bool, only: Sequence[str], seeds: Sequence[int]
) -> Experiment:
    _known("", tables, TABLES)
    for name in TABLES:
        if not isinstance(tables.get(name, {}), dict):
            raise ConfigError(f"{name} is no table.", next_step=f"Write [{name}].")
    head = _head(tables.get("experiment", {}))
    over = dict(tables.get("quick", {}))
    if quick and not over:
        raise ConfigError(
            "it has no values in a table [quick], so --quick would make everything in full.",
            next_step="Write one, for example [quick.budget] with rollouts = 1000, or leave --quick out.",
        )
    quick_seeds = over.pop("seeds", None)
    if quick and quick_seeds is not None:
        head = _head({**tables["experiment"], "seeds": quick_seeds})
    given = _arms(tables.get("arms", {}))
    chosen = _chosen(given, only)
    with _inside("run"):
        base = _shared(dict(tables.get("run", {})), folder, loaded)
    with _inside("quick"):
        overlay = _values(over, folder, loaded, refused=("profile", "seed", "harness"))
    if quick:
        base = layered(base, overlay)
    for name in head.baselines:
        if name not in given:
            raise _no_arm(name, given, "experiment.baselines")
    name, asked = head.name + ("-quick" if quick else ""), _distinct(seeds or head.seeds)
    for arm in chosen:
        for seed in asked:
            _check_name(run_name(name, arm, seed))
    arms, started = [], {}
    for arm in chosen:
        with _inside(f"arms.{arm}"):
            plan, started[arm] = _arm(arm, given[arm], base, folder, loaded)
        arms.append(plan)
    return Experiment(
        name=name,
        description=head.description,
        quick=quick,
        seeds=asked,
        baselines=tuple(n for n in head.baselines if n in chosen) if head.baselines else usual_baselines(arms),
        arms=tuple(arms),
        started=started,
    )


def run_name(experiment: str, arm: str, seed: int) -> str:
    """What a run of an experiment is called."""
    return f"{experiment}-{arm}-s{seed}"


def _head(table: dict[str, Any]) -> Head:
    _known("experiment", table, Head.__struct_fields__)
    if "name" not in table:
        raise ConfigError("experiment.name is missing.", next_step="Its runs are called after it.")
    try:
        return msgspec.convert(table, Head)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{e}.".replace("`$.", "`experiment."), next_step=_STEP) from e


def _arms(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not table:
        raise ConfigError("there are no arms.", next_step="Write a table [arms.NAME] for each.")
    for name, arm in table.items():
        if not isinstance(arm, dict):
            raise ConfigError(f"arms.{name} is no table.", next_step=f"Write [arms.{name}].")
    return table


def _chosen(arms: Mapping[str, Any], only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in arms:
            raise _no_arm(name, arms, "--only")
    return [name for name in arms if not only or name in only]


def _no_arm(name: str, arms: Mapping[str, Any], where: str) -> ConfigError:
    return ConfigError(f"{where} names {name!r}, which is no arm.", next_step=f"Arms: {', '.join(arms)}.")


def _distinct(seeds: Sequence[int]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"a seed is there twice: {', '.join(map(str, seeds))}.", next_step="Name each seed once; a run has one."
        )
    return tuple(seeds)


def _check_name(run: str) -> None:
    try:
        subjects.token(run)
    except BasculeError as e:
        raise ConfigError(
            f"{run!r} cannot be the name of a run: {e.message}",
            next_step="Name experiment and arms with small letters, digits, - and _, and shortly.",
        ) from e


def _shared(table: dict[str, Any], folder: Path, loaded: Plugins) -> dict[str, Any]:
    """What all arms share: the profile's values, and those of the table over them."""
    profile = table.pop("profile", None)
    if profile is not None and not isinstance(profile, str):
        raise ConfigError("profile is no path.", next_step="Give the path of a TOML file.")
    found = dict(read_profile(Path(folder, profile), loaded).values) if profile is not None else {}
    found.pop("seed", None)
    found = layered(found, _values(table, folder, loaded, refused=("seed",)))
    return merged({"task": {"name": USUAL_TASK}}, found)


def _values(table: dict[str, Any], folder: Path, loaded: Plugins, *, refused: Sequence[str]) -> dict[str, Any]:
    known = [name for name in RunConfig.__struct_fields__ if name not in refused]
    _known("", table, known)
    return checked(table, folder, loaded)


def _known(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    odd = sorted(set(table) - set(known))
    if odd:
        path = f"{where}.{odd[0]}" if where else odd[0]
        raise ConfigError(f"{path} is unknown or does not belong there.", next_step=f"There are {', '.join(known)}.")


def _arm(
    name: str, table: dict[str, Any], base: dict[str, Any], folder: Path, loaded: Plugins
) -> tuple[ArmPlan, RunStarted]:
    table = dict(table)
    kind, n = table.pop("kind", "levers"), table.pop("n", None)
    if kind not in ("levers", "best-of-n"):
        raise ConfigError(f"kind is {kind!r}.", next_step='It is "levers", the usual one, or "best-of-n".')
    voted = kind == "best-of-n"
    if n is not None and (not voted or isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST):
        raise ConfigError(f"n is {n!r}.", next_step=f"An arm of kind best-of-n has an n from 1 to {MOST}, others none.")
    values = _values(table, folder, loaded, refused=(*SHARED, *(_PULLING if voted else ())))
    if voted:
        # Whoever chooses and writes elsewhere has nothing to do here, and asks for nothing.
        base = {key: value for key, value in base.items() if key not in _PULLING}
    config = configure(layered(base, values), [], loaded)
    if not any(getattr(config.budget, bound) is not None for bound in Bounds.__struct_fields__):
        raise ConfigError(
            "run.budget bounds nothing, and arms are compared at one budget.",
            next_step="Give one, for example [run.budget] with rollouts = 10000.",
        )
    votes = None
    if voted:
        world = World(loaded, config)
        votes = votes_of(config, len(world.positions("sealed")), n)
        config = voting(config, world.task.harness(), votes)
    return ArmPlan(name=name, config=config, kind="best-of-n" if voted else "levers", votes=votes), preflight(
        config, loaded
    )


@contextmanager
def _inside(where: str) -> Iterator[None]:
    """Have what is refused say which table it stands in."""
    try:
        yield
    except BasculeError as e:
        raise ConfigError(f"[{where}] {e.message}", next_step=e.next_step or _STEP) from e
