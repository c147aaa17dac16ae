"""Suggestions: a function of what is asked, never twice the same, and better than chance."""

from __future__ import annotations

import logging
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import msgspec
import pytest

from bascule.plugins.authors.dimensions import Dimension, Setting
from bascule.plugins.authors.suggesting import Axis, Point, SuggestRequest, axis_of, point_of, setting_of, suggestion
from tests.authors.test_search import PRESENT, SPACE, objective


def searched(
    score: Callable[[Setting], float | None],
    *,
    space: Sequence[Dimension] = SPACE,
    present: Setting = PRESENT,
    seed: int = 1,
    trials: int = 12,
) -> list[tuple[Setting, float | None]]:
    points, found, scores = [point_of(space, present)], [present], [score(present)]
    while len(found) < trials:
        request = SuggestRequest(
            space=tuple(map(axis_of, space)),
            points=tuple(points),
            scores=tuple(scores),
            seed=seed,
            filling=len(found) <= 3,
        )
        point = suggestion(msgspec.convert(msgspec.json.decode(msgspec.json.encode(request)), SuggestRequest))
        if point is None:
            break
        points.append(point)
        found.append(setting_of(space, point))
        scores.append(score(found[-1]))
    return list(zip(found, scores, strict=True))


def best(trials: list[tuple[Setting, float | None]]) -> float:
    return max(s for _, s in trials if s is not None)


def test_no_setting_comes_twice_and_all_lie_within_the_space() -> None:
    trials = searched(objective, trials=30)
    assert len({repr(s) for s, _ in trials}) == 30
    assert all(None not in point_of(SPACE, setting) for setting, _ in trials)


def test_another_process_suggests_the_same_and_another_seed_something_else() -> None:
    script = "from tests.authors.test_suggesting import *\nprint(repr(searched(objective, trials=8)))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == f"{searched(objective, trials=8)!r}\n"
    assert searched(objective, trials=8, seed=2)[1:] != searched(objective, trials=8)[1:]


def test_it_finds_better_settings_than_chance() -> None:
    draw = random.Random(1)
    chance = [max(objective(tuple(d.at(draw.random()) for d in SPACE)) for _ in range(24)) for _ in range(200)]
    found = [best(searched(objective, seed=seed, trials=25)) for seed in range(6)]
    assert math.fsum(found) / 6 > math.fsum(chance) / 200


def test_trials_that_fail_are_left_alone() -> None:
    def fragile(setting: Setting) -> float | None:
        return None if setting[3] == "bayes" else objective(setting)

    trials = searched(fragile, trials=24)
    assert len(trials) == 24
    assert sum(s[3] == "bayes" for s, _ in trials[4:]) <= 6, "by chance a quarter of 20 and more"
    assert len(searched(lambda _: None, trials=8)) == 8, "a search whose trials all fail goes on to its end"


def test_a_small_space_is_searched_to_its_end_and_no_further() -> None:
    space = (Dimension(values=(False, True)), Dimension(low=0.5, high=3.5, integer=True))
    trials = searched(lambda s: float(s == (True, 3)), space=space, present=(False, 1), trials=30)
    assert len(trials) == 6
    assert best(trials) == 1.0
    one = SuggestRequest(space=(Axis(listed=1),), points=((0,),), scores=(1.0,), seed=1)
    assert suggestion(one) is None


def test_a_present_setting_outside_of_the_space_is_left() -> None:
    trials = searched(objective, present=(0, 1000, "count", "bayes", 20.0))
    assert all(0.01 <= s[4] <= 10 for s, _ in trials[1:])


@pytest.mark.parametrize(
    ("dimension", "value", "coordinate"),
    [
        (Dimension(values=("a", "b")), "b", 1),
        (Dimension(values=(None, True, 1, 1.0)), 1.0, 3),
        (Dimension(values=([1, 1], [1, 2])), [1, 2], 1),
        (Dimension(low=1, high=8, integer=True, log=True), 3, 3),
        (Dimension(low=0.01, high=10, log=True), 0.25, 0.25),
        (Dimension(low=0, high=1), 7, None),
        (Dimension(values=("a", "b")), "c", None),
    ],
)
def test_a_value_has_a_place_and_comes_back_from_it(
    dimension: Dimension, value: object, coordinate: float | None
) -> None:
    point: Point = point_of([dimension], (value,))
    assert repr(point) == repr((coordinate,))
    if coordinate is not None:
        assert repr(setting_of([dimension], point)) == repr((value,))


def test_optuna_says_nothing_and_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    import optuna

    level = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searched(objective, trials=8)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert optuna.logging.get_verbosity() == level
    assert logging.getLogger("optuna").isEnabledFor(level)
