"""Whatever a plugin's algorithm does, its failure is its own, and nothing that it was given changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bascule.plugins.algorithm import Credit, Group
from bascule.schemas.errors import TrainError
from bascule.trainers.credit import credit_of, figures_of
from tests.plugins.algorithms.samples import group
from tests.trainers.bandit import Given


class Doing(Given):
    """Gives what the test says."""

    def __init__(self, credit: Callable[..., Any], figures: Callable[..., Any] = lambda *_: {}) -> None:
        super().__init__()
        self._credit, self._figures = credit, figures

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        return self._credit(groups, params)  # type: ignore[no-any-return]

    def figures(self, groups: Sequence[Group], credit: Sequence[Credit], params: dict[str, Any]) -> dict[str, float]:
        return self._figures(groups, credit, params)  # type: ignore[no-any-return]


def fail(error: BaseException) -> Any:
    raise error


def spoil(groups: Any, params: Any) -> list[Credit]:
    groups.clear()
    params["learning_rate"] = 1e9
    params["lora_target_modules"].append("lm_head")
    return []


def test_what_an_algorithm_is_given_is_a_copy() -> None:
    groups, params = [group(1.0, 0.0)], {"learning_rate": 1e-4, "lora_target_modules": ["q_proj"]}
    credit = [Credit(trajectory="e-n0", component="policy", advantage=1.0)]
    assert credit_of(Doing(spoil), groups, params) == []
    figures_of(Doing(spoil, lambda g, c, p: c.clear() or dict.fromkeys(spoil(g, p), 0.0)), groups, credit, params)
    assert (len(groups), len(credit)) == (1, 1)
    assert params == {"learning_rate": 1e-4, "lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("credit", "said"),
    [
        (lambda *_: None, "gave a NoneType where a list of Credit was to be"),
        (lambda *_: [1.0], "gave a list where a list of Credit"),
        (lambda *_: 1 / 0, "failed to give credit: ZeroDivisionError"),
        (lambda *_: fail(SystemExit(5)), r"failed to give credit: SystemExit\(5\)"),
        (
            lambda *_: [Credit(trajectory="e-n0", component="pair", advantage=1.0, rejected="e-n0")],
            "prefers the trajectory e-n0 to itself",
        ),
    ],
)
def test_an_algorithm_that_gives_no_credit_is_named(credit: Any, said: str) -> None:
    with pytest.raises(TrainError, match=rf"The algorithm given 1 {said}.* Report it to the authors of .* given"):
        credit_of(Doing(credit), [group(1.0)], {})


@pytest.mark.parametrize("figures", [lambda *_: None, lambda *_: {"x": "y"}, lambda *_: 1 / 0])
def test_an_algorithm_whose_figures_fail_is_named(figures: Any) -> None:
    with pytest.raises(TrainError, match="The algorithm given 1 failed to give its figures"):
        figures_of(Doing(lambda *_: [], figures), [group(1.0)], [], {})
    assert figures_of(Given(), [group(1.0)], [], {}) == {}
