"""The tasks rg:<name>: disjoint splits that are the same everywhere, strict scores, and no answer that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.registry import NameTaken, Registry
from bascule.plugins.task import PublicFace
from bascule.plugins.tasks import rg, rg_data
from bascule.plugins.tasks.rg import ReasoningGym, ReasoningGymPrivate
from bascule.plugins.tasks.rg_data import Wanted, make
from bascule.plugins.tasks.rg_vetting import FORMS, REFUSED, harmless
from bascule.plugins.tasks.splits import best_constant
from bascule.runtime.cli.configuration import configure
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
SMALL = {"train": 30, "dev": 12, "sealed": 12}
FACE = """
from bascule.plugins.tasks.rg import ReasoningGym
print(ReasoningGym("isomorphic_strings", {"train": 6, "dev": 3, "sealed": 3}).public())
"""


@pytest.fixture(scope="module")
def public() -> PublicFace:
    return ReasoningGym("chain_sum", SMALL).public()


@pytest.fixture(scope="module")
def private() -> ReasoningGymPrivate:
    return ReasoningGym("chain_sum", SMALL).private()


def test_a_name_with_a_prefix_is_found_pinned_and_owned_by_its_family() -> None:
    loaded = plugins()
    assert loaded.registry.tasks.get("rg:chain_sum")({}).name == "rg:chain_sum"
    pin = loaded.pin("task", "rg:chain_sum")
    assert (pin.name, pin.version) == ("rg:chain_sum", "1")
    assert pin.hash == loaded.pin("task", "arith").hash
    for unknown in ("gr:chain_sum", "rg", "rg-chain_sum"):
        with pytest.raises(ConfigError, match=r"There is no task .*rg:<name>"):
            loaded.registry.tasks.get(unknown)


def test_two_plugins_cannot_have_one_family() -> None:
    registry = Registry()
    registry.task_family("rg", lambda name: lambda params: ReasoningGym(name, params), version="1")
    registry.owner = "other"
    with pytest.raises(NameTaken, match=r"family 'rg:': bascule and other"):
        registry.task_family("rg", lambda name: lambda params: ReasoningGym(name, params), version="1")


def test_splits_come_from_disjoint_seeds_and_share_no_question(public: PublicFace) -> None:
    questions = [{e.input["question"] for e in public.split(s)} for s in SPLITS]
    assert [len(q) for q in questions] == [len(public.split(s)) for s in SPLITS]
    assert sum(map(len, questions)) == len(set.union(*questions))
    assert not {e.group for e in public.train} & {e.group for e in (*public.dev, *public.sealed)}
    assert len({e.id for s in SPLITS for e in public.split(s)}) == sum(map(len, questions))


def test_a_question_that_is_asked_twice_stays_in_one_split_and_another_seed_asks_others() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    sizes = {"train": 200, "dev": 40, "sealed": 40}
    public = ReasoningGym("chain_sum", {**sizes, "options": few, "split_seed": 1}).public()
    assert len(public.train) < 200
    questions = [e.input["question"] for s in SPLITS for e in public.split(s)]
    assert len(set(questions)) == len(questions)
    (seed_0, *_), (seed_1, *_) = (
        make(Wanted(name="chain_sum", options=few, slices=((rg.STRIDE * 3 * s, 40),), texts=True)) for s in (0, 1)
    )
    assert [e["question"] for e in seed_0] != [e["question"] for e in seed_1]
    assert next(e["question"] for e in seed_1) == public.sealed[0].input["question"]


def test_the_items_are_the_same_under_every_hash_seed() -> None:
    """Made in this process, the data set differs from one hash seed to the next."""
    found = [
        subprocess.run(
            [sys.executable, "-P", "-c", FACE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(found[0]) > 10
    assert found[0] == found[1]


def test_truths_pass_and_nothing_else_does(public: PublicFace, private: ReasoningGymPrivate) -> None:
    for e in public.train:
        truth = public.answers[e.id]
        assert private.score("train", e.id, f" {truth}\n") == Scored(reward=1.0, passed=True)
        wrong: list[str | None] = [None, "", " ", f"{truth} {truth}", f"The answer is {truth}", f"{truth}1", "\ud800"]
        for answer in (*wrong, "9" * 5000, "nan", e.input["question"]):
            verdict = private.score("train", e.id, answer)
            assert isinstance(verdict, Scored)
            assert (verdict.reward, verdict.passed) == (0.0, False)
    assert private.score("dev", public.dev[0].id, best_constant(public)) in (
        Scored(reward=0.0, passed=False),
        Scored(reward=1.0, passed=True),
    )
    with pytest.raises(KeyError):
        private.score("dev", public.train[0].id, "1")


def test_points_for_less_than_right_are_none() -> None:
    """The data set's own scorer gives points for a part of a truth."""
    (entries,) = make(Wanted(name="word_sorting", options={}, slices=((0, 4),), texts=False))
    data = rg_data.dataset("word_sorting", {})
    private = object.__new__(ReasoningGymPrivate)
    private._name, private._data, private._longest = "word_sorting", data, 10_000
    private._entries = {"train": {"a": entries[0]}}
    truth = entries[0]["answer"]
    part = ", ".join(sorted(truth.split(", "), reverse=True))
    assert 0 < data.score_answer(part, entries[0]) < 1
    assert private.score("train", "a", part) == Scored(reward=0.0, passed=False)
    assert private.score("train", "a", truth) == Scored(reward=1.0, passed=True)


CODE = [
    "__import__('os').system('true')",
    "().__class__.__base__.__subclasses__()",
    "9**9**9",
    "(9**9)**9",
    "9**99",
    "[0 for a in 'xx' for b in 'xx']",
    "exit()",
    "lambda: 0",
    "1e9",
    "'a' * 9",
    "[" * 60 + "]" * 60,
    "print(1)",
    "x.y",
    "factorial(99999)",
    "10!",
    "\uff11+\uff12",
    "+".join("1" * 500),
    "{}",
    "a=1",
    "x if x else x",
    "(x+y)**9*(x+y)**9*(x+y)**9",
    "x**999",
    "x**9**9",
    "0x10",
    "1//0%2",
]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_no_answer_that_could_be_code_reaches_a_scorer_that_would_run_it(name: str) -> None:
    for text in CODE:
        assert not harmless(name, text), text


@pytest.mark.parametrize("name", sorted(FORMS))
def test_right_answers_of_those_data_sets_are_let_through_and_pass(name: str) -> None:
    (entries,) = make(Wanted(name=name, options={}, slices=((7, 3),), texts=False))
    data = rg_data.dataset(name, {})
    for entry in entries:
        assert harmless(name, entry["answer"])
        assert data.score_answer(entry["answer"], entry) == 1.0


def test_the_list_of_scorers_that_run_answers_is_complete() -> None:
    """Read in the installed source: a data set whose scorer evaluates text is vetted or refused."""
    from pathlib import Path

    import reasoning_gym

    root = Path(reasoning_gym.__file__).parent
    calls = ("eval(answer", "parse_expr(answer", "exec(answer", "sympify(answer", "literal_eval(answer")
    found = {p.stem for p in root.rglob("*.py") if any(c in p.read_text(encoding="utf-8") for c in calls)}
    assert found <= {*FORMS, *REFUSED}


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("composite", {}, "is no task"),
        ("intermediate_integration", {}, "is no task"),
        ("chain_sum", {"train": 0}, "cannot use its parameters"),
        ("chain_sum", {"seed": 1}, "cannot use its parameters"),
        ("no_such_set", SMALL, "has no data set"),
        ("boxnet", SMALL, "have no answer to show"),
    ],
)
def test_what_cannot_be_a_task_is_refused_with_a_reason(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        ReasoningGym(name, params).public()
    assert e.value.next_step


def test_options_that_the_data_set_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not make 'chain_sum' with the options"):
        make(Wanted(name="chain_sum", options={"no_such_option": 1}, slices=((0, 1),), texts=True))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"not installed\. Install it: .*pip install -e .*\[rg\]"):
        make(Wanted(name="chain_sum", options={}, slices=((0, 1),), texts=True))


def test_its_harness_and_defaults_are_valid_and_it_may_not_import_the_package(public: PublicFace) -> None:
    task = ReasoningGym("chain_sum", {})
    assert make_harness(task.harness()).manifest.packages == ()
    assert public.allows.packages == ()
    assert rg.STRIDE > 100_000


def test_each_generation_has_fresh_items_of_dev_unless_its_size_is_set() -> None:
    usual = configure({"task": {"name": "rg:chain_sum"}}, [], plugins())
    assert usual.evaluation.fresh_dev == 100
    assert usual.task.params["dev"] == (usual.max_generations + 1) * 100
    sized = configure({"task": {"name": "rg:chain_sum", "params": {"dev": 40}}}, [], plugins())
    assert (sized.evaluation.fresh_dev, sized.task.params["dev"]) == (0, 40)
