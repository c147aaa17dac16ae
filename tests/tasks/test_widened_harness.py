"""The widened harness: the reference harness behind it, with the nearest train items and what follows a word."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest

from bascule.plugins.tasks import reference_harness
from bascule.plugins.tasks.harness_files import ANSWERING, WIDENED, can_widen, reference_files, widened
from bascule.schemas.harness import make_harness
from tests.tasks.test_harness import Context, FakeModel

TRAIN = [
    {"id": str(i), "input": {"question": question}, "answer": answer}
    for i, (question, answer) in enumerate(
        [("3 + 4 =", "7"), ("4 + 3 =", "7"), ("19 - 2 =", "17"), ("18 - 2 =", "16"), ("What is the capital?", "x")]
    )
]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as an episode has it: the reference harness is beside it under its other name."""
    monkeypatch.setitem(sys.modules, ANSWERING.removesuffix(".py"), reference_harness)
    spec = importlib.util.spec_from_file_location("widened", WIDENED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(harness: ModuleType, model: FakeModel, question: str = "3 + 5 =", **params: Any) -> str:
    context = Context(params)
    context.prepared = harness.prepare(TRAIN, context)  # type: ignore[attr-defined]
    answer: str = harness.solve({"question": question}, model, None, context)
    return answer


def test_the_nearest_train_items_are_examples_the_most_similar_one_last(harness: ModuleType) -> None:
    model = FakeModel("8")
    assert run(harness, model, form="completion", instruction="none", nearest=2) == "8"
    assert model.asked[0][1] == "4 + 3 = 7\n3 + 4 = 7\n3 + 5 ="
    model = FakeModel("15")
    run(harness, model, "17 - 2 =", nearest=1, shots=[{"question": "1 + 1 =", "answer": "2"}])
    assert [m["content"] for m in model.asked[0][1]][1:] == ["1 + 1 =", "2", "19 - 2 =", "17", "17 - 2 ="]


def test_fewer_items_than_asked_for_are_all_taken_and_none_that_shares_nothing(harness: ModuleType) -> None:
    index = harness.Index(TRAIN)
    assert len(index.nearest("3 + 4 =", 99)) == 5
    assert index.nearest("", 3) is not None
    assert harness.Index([]).nearest("3 + 4 =", 2) == []
    assert index.nearest("3 + 4 =", 1) == [{"question": "3 + 4 =", "answer": "7"}]


def test_numbers_in_arrays_find_the_same_as_plain_arithmetic(harness: ModuleType) -> None:
    import math
    from collections import Counter

    index = harness.Index(TRAIN)
    counts = [Counter(harness.runs(item["input"]["question"])) for item in TRAIN]
    rarity = {r: math.log(6 / (1 + sum(r in c for c in counts))) + 1 for c in counts for r in c}

    def vector(text: str) -> dict[str, float]:
        found = {r: (1 + math.log(n)) * rarity.get(r, 0) for r, n in Counter(harness.runs(text)).items()}
        length = math.sqrt(sum(w * w for w in found.values()))
        return {r: w / length for r, w in found.items()}

    asked = vector("18 + 3 =")
    cosine = [sum(w * asked.get(r, 0.0) for r, w in vector(item["input"]["question"]).items()) for item in TRAIN]
    best = sorted(range(len(TRAIN)), key=lambda i: -cosine[i])[:3]
    expected = [TRAIN[i]["input"]["question"] for i in reversed(best)]
    assert [shot["question"] for shot in index.nearest("18 + 3 =", 3)] == expected


def test_only_what_follows_the_word_counts_and_a_reply_without_it_as_it_stands(harness: ModuleType) -> None:
    said = "3 and 5 make 8.\nANSWER: 8 of course, not 9"
    assert run(harness, FakeModel(said), extract="first_integer", after="answer:") == "8"
    assert run(harness, FakeModel("Answer: 1\nAnswer: 2"), extract="whole", after="answer:") == "2"
    assert run(harness, FakeModel("it is 8"), extract="first_integer", after="answer:") == "8"
    assert run(harness, FakeModel("İstanbul answer: 8"), form="completion", after="answer:") == "8"


def test_votes_and_retries_are_those_of_the_harness_behind_it(harness: ModuleType) -> None:
    model = FakeModel("answer: none", "answer: 4")
    assert run(harness, model, extract="last_integer", after="answer:", retries=1) == "4"
    assert run(harness, FakeModel("answer: 1", "answer: 2", "answer: 2"), votes=3, after="answer:") == "2"


def test_without_its_parameters_it_does_what_the_harness_behind_it_does(harness: ModuleType) -> None:
    one, other = FakeModel("so 8"), FakeModel("so 8")
    assert run(harness, one, extract="last_integer") == "8"
    reference_harness.solve({"question": "3 + 5 ="}, other, None, Context({"extract": "last_integer"}))
    assert one.asked == other.asked


def test_it_is_put_in_front_once_and_imports_nothing_but_the_standard_library_and_that() -> None:
    files = reference_files(name="n", system_prompt="s", params={"form": "chat"})
    once = make_harness(widened(files)).files
    assert once[ANSWERING] == inspect.getsource(reference_harness)
    assert widened(once) == once
    assert can_widen(files)
    assert can_widen(once)
    assert not can_widen({**files, ANSWERING: "X = 1\n"})
    taken = reference_files(name="n", system_prompt="s", params={"form": "chat", "after": "noon"})
    assert not can_widen(taken)
    source = WIDENED.read_text()
    assert "bascule" not in source
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imports) - sys.stdlib_module_names == {"answering", "collections.abc"}
