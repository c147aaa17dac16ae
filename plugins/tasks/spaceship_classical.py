"""The classical baseline of spaceship-titanic: gradient boosting on a passenger's record, group, cabin and spending."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from bascule.plugins.extras import install_command
from bascule.plugins.task import Example, PublicFace
from bascule.plugins.tasks.sia_data import Row
from bascule.plugins.tasks.spaceship_data import group_of
from bascule.schemas.errors import ConfigError

SPENDING = ("RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck")
NAMES = {
    "HomePlanet": ("Earth", "Europa", "Mars"),
    "CryoSleep": ("False", "True"),
    "VIP": ("False", "True"),
    "Destination": ("TRAPPIST-1e", "55 Cancri e", "PSO J318.5-22"),
}
DECKS = "ABCDEFGT"
UNKNOWN = math.nan


def features(rows: Sequence[Row]) -> list[list[float]]:
    """A row of numbers for each passenger; unknown ones are NaN.

    Room service, spa and VR deck are also summed alone: those who slept or were transported used them little.
    Group, cabin and family sizes are counted over ``rows``, so give all passengers that are known at once.
    """
    groups = Counter(map(group_of, rows))
    cabins = Counter(row["Cabin"] for row in rows)
    families = Counter(row["Name"].rpartition(" ")[2] for row in rows)
    out = []
    for row in rows:
        spent = [_number(row[name]) for name in SPENDING]
        known = [s for s in spent if not math.isnan(s)]
        deck, number, side = (row["Cabin"] or "//").split("/")
        family = row["Name"].rpartition(" ")[2]
        out.append(
            [
                *(_code(row[name], values) for name, values in NAMES.items()),
                _number(row["Age"]),
                *(math.log1p(s) for s in spent),
                math.log1p(sum(known)),
                float(not any(known)),
                math.log1p(sum(s for s in (spent[0], *spent[3:]) if not math.isnan(s))),
                _code(deck, tuple(DECKS)),
                _number(number),
                _code(side, ("P", "S")),
                float(groups[group_of(row)]),
                float(row["PassengerId"].partition("_")[2]),
                float(group_of(row)),
                float(cabins[row["Cabin"]]) if row["Cabin"] else UNKNOWN,
                float(families[family]) if family else UNKNOWN,
            ]
        )
    return out


def boosted(public: PublicFace) -> dict[str, str]:
    """Answers by passenger id, of scikit-learn's histogram gradient boosting with its defaults, fitted on train.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise ConfigError(
            "The classical baseline of spaceship-titanic needs scikit-learn.",
            next_step=f"Install it: {install_command('tasks')}",
        )
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    every: list[Example] = [*public.train, *public.dev, *public.sealed]
    table = np.array(features([e.input["row"] for e in every]))
    labels = np.array([public.answers[e.id] == "True" for e in public.train])
    # One thread: sums in another order would be other sums, and the figure is to be the same everywhere.
    with threadpool_limits(1):
        machine = HistGradientBoostingClassifier(random_state=0).fit(table[: len(labels)], labels)
        found = machine.predict(table)
    return {e.id: str(bool(transported)) for e, transported in zip(every, found, strict=True)}


def _number(text: str) -> float:
    return float(text) if text else UNKNOWN


def _code(text: str, values: Sequence[str]) -> float:
    return float(values.index(text)) if text in values else UNKNOWN
