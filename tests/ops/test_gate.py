"""The simulation of the gate decides as the gate does, and sees harm where there is some."""

from __future__ import annotations

import numpy as np
import pytest

from bascule.schemas.run import GateConfig
from bascule.verifiers.gate import gate
from ops.bench.gate import Outcome, Rule, power, promoted, rules, simulate, verdicts

SMALL = {"runs": 40, "generations": 8, "items": 60}
LADDER = Rule(kind="ladder", step=GateConfig().step, shown=False)


@pytest.mark.parametrize(("rule", "guard"), [(LADDER, "ladder"), (Rule(kind="test"), "none")])
def test_it_promotes_what_the_gate_promotes(rule: Rule, guard: str) -> None:
    items = 40
    config = GateConfig(guard=guard)  # type: ignore[arg-type]
    counts = [(wins, losses) for wins in range(items + 1) for losses in range(items + 1 - wins)]
    wins, losses = (np.array(column) for column in zip(*counts, strict=True))
    found = promoted(rule, wins, losses, items, np.random.default_rng(0))
    for (won, lost), promote in zip(counts, found, strict=True):
        rest = [0.0] * (items - won - lost)
        candidate, parent = [1.0] * won + [0.0] * lost + rest, [0.0] * won + [1.0] * lost + rest
        assert gate(candidate, parent, config=config, seed=0)[0] == promote


def test_thresholdout_without_noise_is_the_ladder() -> None:
    quiet = Rule(kind="thresholdout", step=GateConfig().step, shown=False)
    assert simulate(quiet, "climb", -0.011, **SMALL) == simulate(LADDER, "climb", -0.011, **SMALL)


def test_whatever_scores_higher_is_harmed_and_flattered_and_the_default_hardly() -> None:
    naive = simulate(Rule(kind="naive"), "climb", -0.02, **SMALL)
    guarded = simulate(LADDER, "climb", -0.02, **SMALL)
    assert naive.harm > 0.5
    assert guarded.harm < 0.2
    assert naive.flattery > guarded.flattery + 0.03
    assert simulate(LADDER, "climb", -0.02, **SMALL) == guarded, "the same runs each time"


def test_candidates_that_equal_the_first_harm_nothing() -> None:
    assert simulate(Rule(kind="naive"), "lottery", 0.0, **SMALL).harm == 0


def test_an_author_that_sees_raw_scores_gets_more_promoted() -> None:
    runs = {"runs": 200, "generations": 20, "items": 60}
    hidden, shown = (simulate(Rule(kind="test", shown=s), "combine", 0.0, **runs) for s in (False, True))
    assert shown.promotions > hidden.promotions


def test_power_grows_with_the_gain_and_falls_with_the_step() -> None:
    assert power(LADDER, 0.05) < power(LADDER, 0.10) < power(LADDER, 0.15)
    assert power(LADDER, 0.10) < power(Rule(kind="ladder", step=1.0), 0.10)


def test_the_rules_that_are_compared_have_the_defaults_of_the_gate() -> None:
    assert rules()["default"].step == GateConfig().step
    assert rules()["default"].kind == GateConfig().guard


def test_a_promise_that_is_not_kept_fails() -> None:
    kept = Outcome(harm=0.05, flattery=0.02, promotions=0.1)
    assert not any(line.startswith("FAIL") for line in verdicts(kept, {0.10: 0.6, 0.15: 0.85}))
    broken = Outcome(harm=0.06, flattery=0.03, promotions=0.1)
    assert [line[:4] for line in verdicts(broken, {0.10: 0.5, 0.15: 0.8})] == ["FAIL"] * 4
