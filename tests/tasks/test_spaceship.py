"""The task spaceship-titanic on the pinned data."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from bascule.plugins.task import Baseline, PublicFace
from bascule.plugins.tasks import sia_data
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.tasks.spaceship import Spaceship, SpaceshipPrivate, question
from bascule.plugins.tasks.spaceship_classical import features
from bascule.plugins.tasks.spaceship_data import DEV_ROWS, split_rows
from bascule.plugins.wheels import fetch_wheel
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
SPENT = ("RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck")


def rows(name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        return list(csv.DictReader(io.StringIO(archive.read(f"sia/tasks/spaceship-titanic/data/{name}").decode())))


@pytest.fixture(scope="module")
def labelled() -> list[dict[str, str]]:
    return rows("public/train.csv")


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    return rows("private/test.csv")


@pytest.fixture(scope="module")
def task() -> Spaceship:
    return Spaceship({})


@pytest.fixture(scope="module")
def public(task: Spaceship) -> PublicFace:
    return task.public()


@pytest.fixture(scope="module")
def private(task: Spaceship) -> SpaceshipPrivate:
    return task.private()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that already has the wheel."""
    wheel = fetch_wheel(*WHEEL)
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.name).symlink_to(wheel)
    return tmp_path


def reward(private: SpaceshipPrivate, baseline: Baseline, split: Split) -> float:
    verdicts = [private.score(split, i, a) for i, a in baseline.answers[split].items()]
    return sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(verdicts)


def test_no_group_straddles_and_the_sizes_are_as_documented(
    public: PublicFace, labelled: list[dict[str, str]], held_out: list[dict[str, str]]
) -> None:
    groups = {s: {e.group for e in public.split(s)} for s in SPLITS}
    assert not groups["train"] & groups["dev"]
    assert not groups["train"] & groups["sealed"]
    assert not groups["dev"] & groups["sealed"]
    shared = {r["PassengerId"][:4] for r in labelled} & {r["PassengerId"][:4] for r in held_out}
    dropped = sum(r["PassengerId"][:4] in shared for r in labelled)
    assert (len(shared), dropped) == (324, 679)
    assert [len(public.split(s)) for s in SPLITS] == [7823 - 679 - DEV_ROWS, DEV_ROWS, 870]
    assert split_rows(labelled, held_out, 0)[1] == 679


def test_sealed_is_the_held_out_file_row_by_row(public: PublicFace, held_out: list[dict[str, str]]) -> None:
    assert [e.id for e in public.sealed] == [r["PassengerId"] for r in held_out]


def test_dev_is_whole_groups_and_follows_its_seed(
    public: PublicFace, labelled: list[dict[str, str]], held_out: list[dict[str, str]]
) -> None:
    sizes = Counter(r["PassengerId"][:4] for r in labelled)
    assert Counter(e.group for e in public.dev) == {g: sizes[g] for g in {e.group for e in public.dev}}
    other, _ = split_rows(labelled, held_out, 1)
    assert len(other["dev"]) == DEV_ROWS
    assert {r["PassengerId"] for r in other["dev"]} != {e.id for e in public.dev}


def test_the_public_face_holds_no_answer_of_dev_or_sealed(own_cache: Path, labelled: list[dict[str, str]]) -> None:
    public = Spaceship({}).public()
    truths = {r["PassengerId"]: r["Transported"] for r in labelled}
    assert public.answers == {e.id: truths[e.id] for e in public.train}
    assert all("Transported" not in e.input["row"] for s in SPLITS for e in public.split(s))
    (folder,) = (own_cache / "tasks").iterdir()
    assert [p.name for p in folder.iterdir()] == ["public"], "the public face opens no private folder, nor makes one"
    for split in ("dev", "sealed"):
        with (folder / "public" / f"{split}.csv").open() as f:
            assert "Transported" not in next(csv.reader(f))


def test_the_truths_are_closed_to_others_and_the_public_face_does_without(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Spaceship({})
    task.private()
    assert (own_cache / "private").stat().st_mode & 0o777 == 0o700
    (truths,) = (own_cache / "private").glob("spaceship-titanic-*.jsonl")
    assert truths.stat().st_mode & 0o077 == 0
    (own_cache / "private").rename(own_cache / "elsewhere")
    assert task.public() == task.public()
    assert not (own_cache / "private").exists(), "the public face neither needs it nor makes it"


def test_a_second_start_reads_the_cache_alone(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Spaceship({}).public()

    def absent(*_: str, **_named: str) -> Path:
        raise ConfigError("no network")

    monkeypatch.setattr(sia_data, "fetch_wheel", absent)
    assert Spaceship({}).public() == first
    with pytest.raises(ConfigError, match="no network"):
        Spaceship({}).private()
    assert not [*(own_cache / "private").rglob(".*"), *(own_cache / "tasks").rglob(".*")]


def test_every_passenger_is_scored_by_their_own_truth(
    public: PublicFace,
    private: SpaceshipPrivate,
    labelled: list[dict[str, str]],
    held_out: list[dict[str, str]],
) -> None:
    truths = {r["PassengerId"]: r["Transported"] for r in (*labelled, *held_out)}
    for split in SPLITS:
        for e in public.split(split):
            wrong = {"True": "False", "False": "True"}[truths[e.id]]
            assert private.score(split, e.id, f" {truths[e.id]}\n") == Scored(reward=1.0, passed=True)
            assert private.score(split, e.id, wrong) == Scored(reward=0.0, passed=False)


@pytest.mark.parametrize("answer", [None, "", "true", "TRUE", "1", "True.", "True False", "The answer is True"])
def test_only_the_exact_words_are_well_formed(
    public: PublicFace, private: SpaceshipPrivate, answer: str | None
) -> None:
    for e in public.dev[:20]:
        assert private.score("dev", e.id, answer) == Scored(reward=0.0, passed=False, well_formed=False)


def test_a_passenger_of_another_split_has_no_verdict(public: PublicFace, private: SpaceshipPrivate) -> None:
    with pytest.raises(KeyError):
        private.score("dev", public.sealed[0].id, "True")


def test_the_baselines_equal_an_independent_count(
    task: Spaceship, public: PublicFace, private: SpaceshipPrivate, held_out: list[dict[str, str]]
) -> None:
    found = {b.name: b for b in task.baselines(public)}
    assert reward(private, found["gradient-boosting"], "sealed") >= 0.81
    assert reward(private, found["gradient-boosting"], "dev") > reward(private, found["cryosleep-rule"], "dev") + 0.05
    true = sum(r["Transported"] == "True" for r in held_out)
    asleep = sum(
        ((r["CryoSleep"] or str(sum(float(r[s] or 0) for s in SPENT) == 0)) == r["Transported"]) for r in held_out
    )
    assert (true, asleep) == (432, 624)
    assert reward(private, found["all-True"], "sealed") == true / 870
    assert reward(private, found["all-False"], "sealed") == (870 - true) / 870
    assert reward(private, found["cryosleep-rule"], "sealed") == asleep / 870
    majority = Counter(public.answers.values())
    constant = found["train-majority"].answers["sealed"][public.sealed[0].id]
    assert majority[constant] == max(majority.values())
    assert reward(private, found["train-majority"], "sealed") == pytest.approx(0.497, abs=5e-4)


def test_a_question_is_a_short_line_without_what_is_unknown_or_usual() -> None:
    row = {
        "PassengerId": "0001_01",
        "HomePlanet": "Earth",
        "CryoSleep": "False",
        "Cabin": "F/12/S",
        "Destination": "TRAPPIST-1e",
        "Age": "24.0",
        "VIP": "False",
        "RoomService": "109.0",
        "FoodCourt": "0.0",
        "ShoppingMall": "",
        "Spa": "549.0",
        "VRDeck": "44.0",
        "Name": "Somebody",
    }
    spent = "RoomService 109, Spa 549, VRDeck 44"
    ask = "Transported (True or False)?"
    assert question(row) == f"CryoSleep False, Deck F, Side S, HomePlanet Earth, Age 24, {spent}. {ask}"
    assert question(dict.fromkeys(row, "")) == ask


def test_its_first_harness_is_valid_and_holds_no_rule(task: Spaceship) -> None:
    harness = make_harness(task.harness())
    assert harness.manifest.params["extract"] == {"choice": ["True", "False"]}
    assert "cryo" not in "".join(harness.files.values()).lower()
    assert parse_config({"task": {"name": task.name}, **task.defaults()}).evaluation.sealed_examples == 0
    assert "MIT" in task.public().licence


def test_the_boosting_baseline_sees_no_answer_and_counts_groups_over_all_splits(public: PublicFace) -> None:
    every = [e.input["row"] for s in SPLITS for e in public.split(s)]
    table = features(every)
    assert len({len(row) for row in table}) == 1
    answered = features([{**row, "Transported": "True"} for row in every[:50]])
    assert repr(answered) == repr(features(every[:50]))
    sizes = Counter(row["PassengerId"][:4] for row in every)
    largest = max(range(len(every)), key=lambda i: sizes[every[i]["PassengerId"][:4]])
    assert float(sizes[every[largest]["PassengerId"][:4]]) in table[largest]


def test_a_harness_may_have_the_packages_of_the_classical_baseline(public: PublicFace) -> None:
    assert {"numpy", "scipy", "scikit-learn"} <= set(public.allows.packages)
    assert public.allows.data
