"""The task arith: splits that do not straddle, exact scores, honest baselines."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from bascule.plugins.registry import Registry
from bascule.plugins.task import PublicFace
from bascule.plugins.tasks import bascule_register
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.splits import best_constant
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")


@pytest.fixture(scope="module", params=[0, 1, 12345])
def task(request: pytest.FixtureRequest) -> Arith:
    return Arith({"split_seed": request.param})


@pytest.fixture(scope="module")
def public(task: Arith) -> PublicFace:
    return task.public()


def value(question: str) -> str:
    """What a question asks for, worked out apart from the task."""
    left, sign, right, equals = question.split()
    assert equals == "="
    assert {int(left), int(right)} <= set(range(21))
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


def test_all_462_groups_are_there_and_none_straddles(public: PublicFace) -> None:
    groups = {split: {e.group for e in public.split(split)} for split in SPLITS}
    assert [len(groups[s]) for s in SPLITS] == [162, 150, 150]
    assert len(set.union(*groups.values())) == 462
    pairs = {s: {frozenset(e.input["question"].split()[:3]) for e in public.split(s)} for s in SPLITS}
    assert not pairs["train"] & pairs["dev"]
    assert not pairs["train"] & pairs["sealed"]
    assert not pairs["dev"] & pairs["sealed"]


def test_dev_and_sealed_have_one_item_per_group_and_train_has_all(public: PublicFace) -> None:
    assert len(public.dev) == len(public.sealed) == 150
    commuted = sum(len(set(e.input["question"].split()[::2])) == 2 for e in public.train if "+" in e.input["question"])
    singles = {e.group for e in public.train if "+" in e.input["question"]}
    doubles = sum(len(set(g.split("-")[1:])) == 1 for g in singles)
    assert commuted == 2 * (len(singles) - doubles)
    assert len({e.id for s in SPLITS for e in public.split(s)}) == len(public.train) + 300


@pytest.mark.parametrize("split", ["dev", "sealed"])
def test_sums_and_differences_are_balanced(public: PublicFace, split: Split) -> None:
    signs = Counter(e.input["question"].split()[1] for e in public.split(split))
    assert signs == {"+": 75, "-": 75}


def test_a_split_follows_its_seed() -> None:
    assert Arith({}).public() == Arith({"split_seed": 0}).public()
    assert Arith({}).public().dev != Arith({"split_seed": 1}).public().dev


def test_the_public_face_answers_train_only(public: PublicFace) -> None:
    assert public.answers == {e.id: value(e.input["question"]) for e in public.train}
    for e in (*public.dev, *public.sealed):
        assert set(e.input) == {"question"}
        assert msgspec.to_builtins(e) == {"id": e.id, "group": e.group, "input": {"question": e.input["question"]}}


def test_no_difference_is_negative_and_every_answer_fits(public: PublicFace) -> None:
    answers = [value(e.input["question"]) for s in SPLITS for e in public.split(s)]
    assert min(int(a) for a in answers) == 0
    assert max(map(len, answers)) <= public.max_answer_tokens


def test_every_item_of_every_split_is_scored_by_its_own_truth(task: Arith, public: PublicFace) -> None:
    private = task.private()
    for split in SPLITS:
        for e in public.split(split):
            truth = value(e.input["question"])
            assert private.score(split, e.id, f" {truth}\n") == Scored(reward=1.0, passed=True)
            assert private.score(split, e.id, str(int(truth) + 1)) == Scored(reward=0.0, passed=False)


@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [
        *((text, False) for text in (None, "", "seven", "0.0", "+0", "0 0", "0.", "\u0660", "= 0")),
        *((text, True) for text in ("00", "-0", "1")),
    ],
)
def test_only_the_exact_decimal_form_passes(answer: str | None, well_formed: bool) -> None:
    verdict = Arith({}).private().score("dev", "sub-11-11", answer)
    assert verdict == Scored(reward=0.0, passed=False, well_formed=well_formed)


def test_an_example_of_another_split_has_no_verdict() -> None:
    with pytest.raises(KeyError):
        Arith({}).private().score("train", "sub-11-11", "0")


def test_the_baselines_give_what_they_say(task: Arith, public: PublicFace) -> None:
    counts = Counter(value(e.input["question"]) for e in public.train)
    constant, zero = task.baselines(public)
    assert counts[best_constant(public)] == max(counts.values())
    assert {a for answers in constant.answers.values() for a in answers.values()} == {best_constant(public)}
    assert {a for answers in zero.answers.values() for a in answers.values()} == {"0"}
    for baseline in (constant, zero):
        assert {s: list(a) for s, a in baseline.answers.items()} == {s: [e.id for e in public.split(s)] for s in SPLITS}


def test_no_constant_comes_near_a_harness_that_calculates(public: PublicFace) -> None:
    for split in SPLITS:
        counts = Counter(value(e.input["question"]) for e in public.split(split))
        assert max(counts.values()) / len(public.split(split)) < 0.1


def test_its_harness_and_defaults_are_valid_and_it_registers() -> None:
    registry = Registry()
    bascule_register(registry)
    task = registry.tasks.get("arith")({})
    assert make_harness(task.harness()).manifest.params["form"] == "chat"
    assert parse_config({"task": {"name": "arith"}, **task.defaults()}).task.name == "arith"


@pytest.mark.parametrize("params", [{"seed": 1}, {"split_seed": "1"}, {"split_seed": True}, {"split_seed": -1}])
def test_a_wrong_parameter_is_refused(params: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Arith(params)
