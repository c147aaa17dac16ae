"""Figures of experiments: against tables and scipy, exact where they are counted, and what is said of them."""

from __future__ import annotations

import csv
import io
import random
import statistics
from pathlib import Path

import msgspec
import pytest
from scipy import stats

from bascule.runtime.experiments.comparison import ArmPlan, Comparison, RunLine, compare, usual_baselines
from bascule.runtime.experiments.outcome import Outcome, Spending
from bascule.runtime.experiments.output import write_files
from bascule.runtime.experiments.statistics import bootstrap, item_p, over_seeds, paired_t, t_quantile, t_within
from bascule.schemas.budget import BudgetConfig
from bascule.schemas.run import PluginChoice, RunConfig

#: Two-sided 5% points, as printed in every table of Student's t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
SPENT = Spending(rollouts=100, tokens=1000, seconds=10)
ITEMS = 40


@pytest.mark.parametrize(("df", "point"), TABLE.items())
def test_points_of_students_t_are_those_of_the_tables(df: int, point: float) -> None:
    assert t_quantile(0.95, df) == pytest.approx(point, abs=5e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 6, 11, 40])
def test_students_t_is_scipys(df: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.5, 9.0):
        assert t_within(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-13)


def test_the_paired_t_test_and_its_interval_are_scipys() -> None:
    values = [0.12, 0.31, 0.22, 0.05]
    found = over_seeds(values)
    assert found is not None
    wanted = stats.t.interval(0.95, 3, loc=statistics.fmean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted)
    assert paired_t(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_one_seed_says_nothing_of_others() -> None:
    assert over_seeds([0.4]) is None
    assert paired_t([0.4]) is None
    assert paired_t([0.4, 0.4]) is None


def test_the_bootstrap_of_one_seed_is_that_of_the_mean_of_its_items() -> None:
    rng = random.Random(4)
    row = [float(rng.random() < 0.3) for _ in range(400)]
    found = bootstrap([row])
    centre, half = statistics.fmean(row), 1.96 * statistics.pstdev(row) / 20
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=0.006)
    assert bootstrap([row]) == found


def test_the_bootstrap_over_seeds_holds_what_they_differ_by() -> None:
    apart = bootstrap([[0.0] * 20, [1.0] * 20])
    assert (apart.low, apart.high) == (0.0, 1.0)
    alike = bootstrap([[0.5] * 20, [0.5] * 20])
    assert (alike.low, alike.high) == (0.5, 0.5)


@pytest.mark.parametrize("table", [[], [[]], [[1.0, 0.0], [1.0]]])
def test_a_bootstrap_without_the_same_items_for_each_seed_is_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="same items"):
        bootstrap(table)


def test_the_test_over_items_flips_an_items_seeds_together() -> None:
    assert item_p([[1.0, 1.0, 1.0, 1.0, 1.0]]) == 2 / 32
    # Three seeds that agree on each of five items are no fifteen items.
    assert item_p([[1.0, 1.0, 1.0, 1.0, 1.0]] * 3) == 2 / 32
    assert item_p([[1.0, -1.0], [-1.0, 1.0]]) == 1.0


def plan(name: str, *levers: str, votes: int | None = None) -> ArmPlan:
    config = RunConfig(
        task=PluginChoice(name="arith"),
        levers=levers or ("harness",),  # type: ignore[arg-type]
        budget=BudgetConfig(rollouts=500),
    )
    return ArmPlan(name=name, config=config, kind="best-of-n" if votes else "levers", votes=votes)


def outcome(arm: str, seed: int, right: int, *, levers: tuple[str, ...] = ("harness",), items: int = ITEMS) -> Outcome:
    """A run that has the first ``right`` items right, up to one that depends on the seed."""
    after = [float(i < right) for i in range(items)]
    after[-1 - seed % 3] = 1.0
    return Outcome(
        arm=arm,
        seed=seed,
        run=f"e-{arm}-s{seed}",
        dev=(0.1, right / items),
        items=tuple(map(str, range(items))),
        before=tuple(float(i < 4) for i in range(items)),
        after=tuple(after),
        tokens=30.0,
        loop=SPENT,
        levers=dict.fromkeys(levers, SPENT),
        sealed=SPENT,
        algorithms=("grpo",) if "weights" in levers else (),
        promoted=levers,
        code="0",
    )


def table(*outcomes: Outcome, arms: tuple[ArmPlan, ...], seeds: tuple[int, ...] = (1, 2, 3)) -> Comparison:
    done = {(o.arm, o.seed) for o in outcomes}
    runs = [
        RunLine(arm=a.name, seed=s, run=f"e-{a.name}-s{s}", status="completed" if (a.name, s) in done else "failed")
        for s in seeds
        for a in arms
    ]
    return compare(
        name="e",
        description="",
        quick=False,
        seeds=seeds,
        baselines=usual_baselines(arms),
        arms=arms,
        runs=runs,
        outcomes=outcomes,
    )


ARMS = (plan("h", "harness"), plan("w", "weights"), plan("b", "harness", "weights"))
BOTH = ("harness", "weights")


def made(harness: int, weights: int, both: int, seeds: tuple[int, ...] = (1, 2, 3)) -> Comparison:
    runs = []
    for seed in seeds:
        runs.append(outcome("h", seed, harness))
        runs.append(outcome("w", seed, weights, levers=("weights",)))
        runs.append(outcome("b", seed, both, levers=BOTH))
    return table(*runs, arms=ARMS, seeds=seeds)


def test_an_arm_of_both_levers_that_is_better_than_either_is_said_to_be_by_how_much() -> None:
    found = made(10, 15, 30)
    assert found.baselines == ("h", "w")
    assert "both levers beat either alone" in found.sentence
    assert "+0.500" in found.sentence
    assert "+0.375" in found.sentence
    row = found.rows[2]
    assert [d.against for d in row.differences] == ["h", "w"]
    assert row.differences[0].p_items < 0.01
    assert (row.algorithms, row.promotions) == ({"grpo": 3}, {"harness": 3, "weights": 3})
    assert row.bounds == {"rollouts": 500.0}


def test_an_arm_of_both_levers_that_is_not_better_is_said_not_to_be() -> None:
    assert "not told from w alone" in made(10, 30, 30).sentence
    assert "do not beat every single one" in made(10, 30, 30).sentence
    assert "worse than w alone" in made(10, 30, 20).sentence
    assert "beat h alone" in made(10, 30, 20).sentence


def test_differences_are_of_the_seeds_that_both_arms_have() -> None:
    runs = [outcome("h", s, 10) for s in (1, 2, 3)] + [outcome("b", s, 20, levers=BOTH) for s in (1, 2)]
    found = table(*runs, arms=ARMS)
    b = found.rows[2]
    assert (b.completed, b.asked) == (2, 3)
    assert [len(d.estimate.seeds) for d in b.differences] == [2]
    assert "cannot be said yet" in found.sentence
    assert any("4 of 9 runs are not completed" in note for note in found.notes)


def test_what_is_common_to_two_arms_is_not_in_the_interval_of_their_difference() -> None:
    found = made(20, 21, 22)  # two items of forty between them, and half of them right in both
    assert found.rows[0].after is not None
    own, apart = found.rows[0].after.pooled, found.rows[2].differences[0].estimate.pooled
    assert own is not None
    assert apart is not None
    assert apart.high - apart.low < 0.6 * (own.high - own.low)


def test_other_items_are_not_paired() -> None:
    runs = [outcome("h", 1, 10), outcome("b", 1, 20, levers=BOTH, items=30)]
    found = table(*runs, arms=ARMS, seeds=(1,))
    assert found.rows[2].differences == ()
    assert any("for want of a common seed and the same items: h and b" in n or ": b" in n for n in found.notes)


def test_one_seed_has_intervals_over_items_and_says_so() -> None:
    found = made(10, 15, 30, seeds=(1,))
    after = found.rows[0].after
    assert after is not None
    assert after.over_seeds is None
    assert after.pooled is not None
    assert any("one seed" in note and note.endswith(": h, w and b") for note in found.notes)


def test_a_difference_of_one_common_seed_claims_nothing_of_seeds() -> None:
    def made(seeds: tuple[int, ...]) -> Comparison:
        first = [
            outcome(arm, s, 10, levers=levers)
            for s in (1, 2)
            for arm, levers in (("h", ("harness",)), ("w", ("weights",)))
        ]
        return table(*first, *(outcome("b", s, 30, levers=BOTH) for s in seeds), arms=ARMS)

    apart, alike = made((2, 3)), made((1, 2))
    assert apart.sentence.count("over the items of one seed") == 2
    assert alike.sentence.count("over 2 seeds and their items") == 2
    told = "with one seed, intervals are over items only, and say nothing of other seeds: b against h and b against w"
    assert told in apart.notes
    assert any("of different seeds" in note for note in apart.notes)
    assert not any("one seed" in note or "of different seeds" in note for note in alike.notes)
    assert {row.completed for row in apart.rows} == {2}


def test_the_arm_with_the_highest_score_is_told_with_what_its_difference_is_over() -> None:
    arms = (plan("h", "harness"), plan("w", "weights"))
    runs = [outcome("h", 1, 10), outcome("w", 1, 30, levers=("weights",))]
    assert table(*runs, arms=arms, seeds=(1,)).sentence.endswith("against h over the items of one seed.")


def test_the_verifiers_pick_is_told_apart_from_the_score() -> None:
    votes = msgspec.structs.replace(outcome("v", 1, 10), oracle=(1.0,) * ITEMS, levers={})
    found = table(votes, arms=(plan("v", votes=8),), seeds=(1,))
    (row,) = found.rows
    assert row.after is not None
    assert row.oracle is not None
    assert row.before is None
    assert row.levers == ()
    assert row.oracle.mean == 1.0 > row.after.mean
    assert any(note.startswith("pass@n") for note in found.notes)


def test_the_verifiers_pick_is_never_below_what_was_answered() -> None:
    timed = msgspec.structs.replace(outcome("v", 1, 10), oracle=(0.0,) * (ITEMS - 5) + (1.0,) * 5, levers={})
    (row,) = table(timed, arms=(plan("v", votes=8),), seeds=(1,)).rows
    assert row.oracle is not None
    assert row.oracle.mean == 15 / ITEMS


def test_without_a_completed_run_there_is_a_table_that_says_so(tmp_path: Path) -> None:
    found = write_files(table(arms=ARMS), tmp_path)
    assert [row.after for row in found.rows] == [None] * 3
    assert "cannot be said yet" in found.sentence


def test_the_table_is_written_as_json_csv_and_picture(tmp_path: Path) -> None:
    found = write_files(made(10, 15, 30), tmp_path / "out")
    assert [Path(p).name for p in found.files] == ["table.json", "table.csv", "table.png"]
    assert msgspec.json.decode(Path(found.files[0]).read_bytes(), type=Comparison) == found
    lines = list(csv.DictReader(io.StringIO(Path(found.files[1]).read_text())))
    assert [line["arm"] for line in lines] == ["h", "w", "b"]
    assert float(lines[2]["minus_h"]) == pytest.approx(0.5)
    assert float(lines[2]["minus_h_pooled_low"]) > 0
    assert lines[0]["minus_h"] == ""
    assert Path(found.files[2]).read_bytes().startswith(b"\x89PNG")
