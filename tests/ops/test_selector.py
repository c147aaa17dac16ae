"""The benchmark of the policies: its tasks, its tiny model, its figures, and a slice of it that runs in seconds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bascule.plugins.policies.fixed import PRESETS
from bascule.trainers.base_model import load_model
from ops.bench import selector
from ops.bench.selector import POLICIES, Regret, Result, average, regret, standing, verdicts
from ops.bench.selector_model import ALL_ANSWERS, ANSWERS, LENGTH, answer_index, make_model, probabilities, sample
from ops.bench.selector_runs import ALGORITHMS, Played, Size, logged, open_cell
from ops.bench.selector_tasks import (
    LANDSCAPES,
    NEAR,
    PROMPT_KINDS,
    Kind,
    Task,
    draw_parameters,
    expected_best,
    make_task,
    prompts,
    true_value,
    verdict,
)

EVEN = np.full((PROMPT_KINDS, ANSWERS), 1 / ANSWERS)
ARMS = (*ALGORITHMS, *POLICIES)
SMALL = Size(generations=1, iterations=2, batch=32, groups=8, dev=24, regression=8)


def task(kind: Kind) -> Task:
    # An even model likes no token, so that the other prompts' right ones are nearly all of them.
    return make_task(kind, draw_parameters(kind, 1), 3, EVEN)


def test_every_answer_has_its_place() -> None:
    places = [0, 1, 777, ANSWERS - 1]
    assert [answer_index(ALL_ANSWERS[i].tolist()) for i in places] == places


@pytest.mark.parametrize("kind", LANDSCAPES)
def test_a_task_starts_where_its_parameters_say_and_another_draw_says_otherwise(kind: Kind) -> None:
    given, found = draw_parameters(kind, 1), task(kind)
    assert given != draw_parameters(kind, 2)
    if kind != "skewed":
        assert found.values[list(found.kinds)].mean() == pytest.approx(given.start, rel=NEAR)
    assert (make_task(kind, given, 4, EVEN).rewards != found.rewards).any()


def test_rewards_are_what_the_landscapes_are_named_for() -> None:
    dense, skewed, ordinal = task("dense"), task("skewed"), task("ordinal")
    right = next(i for i in range(ANSWERS) if dense.rewards[0, i] == 1)
    found = verdict(dense, (0, 1, 2), ALL_ANSWERS[right].tolist())
    assert (found.reward, found.passed, found.steps) == (1.0, True, (0.25,) * LENGTH)
    part = next(i for i in range(ANSWERS) if 0 < dense.steps[0, i].sum() < 1)  # type: ignore[index]
    found = verdict(dense, (0, 1, 2), ALL_ANSWERS[part].tolist())
    assert (found.reward, found.passed) == (0.0, False)
    logs = np.log(skewed.rewards)
    assert abs(((logs - logs.mean()) ** 3).mean()) < ((skewed.rewards - skewed.rewards.mean()) ** 3).mean()
    assert verdict(skewed, (0, 1, 2), (1, 2, 3, 4)).passed is None
    marks = {float(v): float(r) for v, r in zip(ordinal.values.flat, ordinal.rewards.flat, strict=True)}
    gaps = np.diff([marks[v] for v in sorted(marks)])
    assert (gaps > 0).all()
    assert gaps.max() > 1.5 * gaps.min()


def test_the_prompts_of_a_split_are_in_no_other_and_the_regression_set_has_its_own_kinds() -> None:
    found = task("regressing")
    pairs = [{p[1:] for p in prompts(found, split)} for split in ("train", "dev", "sealed")]
    assert not any(a & b for a, b in itertools.combinations(pairs, 2))
    kinds = {p[0] for p in prompts(found, "regression")}
    assert kinds
    assert not kinds & {p[0] for p in prompts(found, "train")}
    assert prompts(task("cold"), "regression") == []


def test_the_expected_best_is_that_of_all_ways_to_draw() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
    ways = itertools.product(range(3), repeat=2)
    exact = sum(weights[i] * weights[j] * max(values[i], values[j]) for i, j in ways)
    assert expected_best(values, weights, 2) == pytest.approx(exact)
    assert expected_best(values, weights, 1) == pytest.approx(float(values @ weights))


def test_probabilities_are_those_that_answers_are_sampled_with(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, 1))
    asked = [(0, 1, 2), (3, 7, 7)]
    found = probabilities(model, asked)
    assert found.sum(1) == pytest.approx([1.0, 1.0], abs=1e-5)
    answers, logprobs = sample(model, asked, 5)
    for row in range(2):
        assert np.log(found[row, answer_index(answers[row].tolist())]) == pytest.approx(logprobs[row].sum(), abs=1e-4)
    plain = task("terminal")
    both = [found[i] @ plain.values[asked[i][0]] for i in range(2)]
    assert true_value(plain, found, asked) == pytest.approx(np.mean(both))


def test_each_token_of_a_dense_answer_is_a_call_with_its_reward() -> None:
    answers, logprobs = np.array([[1, 2, 3, 4], [5, 6, 7, 0]]), np.full((2, LENGTH), -0.5)
    groups, trajectories = logged(task("dense"), [(0, 1, 2)] * 2, answers, logprobs, 2)
    (first, _) = groups[0].samples
    assert [t.token_ids for t in first.turns] == [(1,), (2,), (3,), (4,)]
    assert all(t.reward in (0.0, 0.25) for t in first.turns)
    assert len(trajectories[first.trajectory].steps) == LENGTH
    groups, trajectories = logged(task("cold"), [(0, 1, 2)] * 2, answers, logprobs, 2)
    assert [(len(s.turns), s.turns[0].reward) for s in groups[0].samples] == [(1, None)] * 2


def test_regret_is_a_share_of_what_the_best_algorithm_gains() -> None:
    assert regret([0.5, 0.7], [0.5, 0.7], [0.1, 0.1]) == Regret(0.0, 0.0, 0.0)
    assert regret([0.5], [0.3], [0.1]).mean == pytest.approx(0.5)
    found = regret([0.5, 0.5, 0.5], [0.5, 0.4, 0.3], [0.0, 0.0, 0.0])
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="gains 0"):
        regret([0.1], [0.1], [0.1])
    mean = average([Regret(0.1, 0.0, 0.2), Regret(0.3, 0.1, 0.5)])
    assert mean.mean == pytest.approx(0.2)
    assert mean.high - mean.mean == pytest.approx(0.05**0.5 / 2)


def result(kind: Kind, seed: int, best: str = "grpo", **values: float) -> Result:
    arms = dict.fromkeys(ARMS, 0.3) | {best: 0.9, **values}
    return Result(
        kind=kind, draw=1, seed=seed, start=0.1, arms={k: Played(value=v, choices=()) for k, v in arms.items()}
    )


def test_the_verdict_fails_where_rules_loses_or_nothing_is_told_apart() -> None:
    def found(**rules: float) -> list[str]:
        best = {"cold": "best_of_n"}
        kinds = {
            kind: standing([result(kind, s, best.get(kind, "grpo"), **{"rules": 0.9, **rules}) for s in (1, 2)])
            for kind in LANDSCAPES
        }
        return verdicts(kinds)

    assert all(line.startswith("ok") for line in found())
    lost = found(rules=0.7)
    assert lost[0].startswith("FAIL mean regret of rules 25%")
    assert [line[:4] for line in found(rules=0.2)] == ["FAIL", "FAIL", "ok b"]
    alike = {kind: standing([result(kind, 1, rules=0.9)]) for kind in LANDSCAPES}
    assert verdicts(alike)[-1] == "FAIL best fixed algorithms: grpo"
    assert standing([result("cold", 1)]).margin == pytest.approx(0.75)
    nothing = Result(
        kind="cold", draw=1, seed=1, start=0.1, arms={name: Played(value=0.1, choices=()) for name in ARMS}
    )
    assert verdicts({"cold": standing([nothing])}) == ["FAIL no algorithm gains anything on cold"]


def test_a_slice_is_the_same_again_and_arms_that_choose_alike_are_one() -> None:
    found = selector.play_all("terminal", 1, 1, SMALL)
    assert found == selector.play_all("terminal", 1, 1, SMALL)
    assert all(found.arms[name] == found.arms[algorithm] for name, algorithm in PRESETS.items())
    for name in ALGORITHMS:
        assert len(found.arms[name].choices) == SMALL.generations
        assert all(choice.startswith(f"{name} ") for choice in found.arms[name].choices)
    assert found.arms["alternate"].choices[0].startswith("harness")
    assert 0 < found.start < 1


def test_every_arm_samples_as_many_trajectories() -> None:
    with open_cell("terminal", 1, 1, SMALL) as cell:
        for info in cell.infos:
            p = info.params
            assert p["steps"] * p["groups"] * p["num_generations"] == SMALL.iterations * SMALL.batch
