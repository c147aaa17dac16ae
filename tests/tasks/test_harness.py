"""The reference harness against a model that replies what it is told to."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest

from bascule.plugins.tasks import reference_harness
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.reference_harness import extract, solve
from bascule.schemas.harness import make_harness

SHOTS = [{"question": "1 + 1 =", "answer": "2"}, {"question": "5 - 3 =", "answer": "2"}]


class Completion(NamedTuple):
    text: str
    finish_reason: str = "stop"


class FakeModel:
    """Gives prepared replies in order and remembers what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[str, Any, dict[str, Any]]] = []

    def chat(self, messages: list[dict[str, str]], **options: Any) -> list[Completion]:
        return self._answer("chat", messages, options)

    def complete(self, prompt: str, **options: Any) -> list[Completion]:
        return self._answer("complete", prompt, options)

    def _answer(self, kind: str, prompt: Any, options: dict[str, Any]) -> list[Completion]:
        self.asked.append((kind, prompt, options))
        return [Completion(self.replies.pop(0)) for _ in range(options["n"])]


class Context:
    def __init__(self, params: dict[str, Any], system_prompt: str = "Be brief.\n") -> None:
        self.params = params
        self.system_prompt = system_prompt
        self.seed = 0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(model: FakeModel, question: str = "3 + 4 =", **params: Any) -> str:
    return solve({"question": question}, model, None, Context(params))


def test_a_plain_chat_asks_once_and_leaves_sampling_to_the_run() -> None:
    model = FakeModel("The answer is 7.")
    assert run(model, extract="last_integer", max_tokens=9) == "7"
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4 ="}
    assert model.asked == [
        ("chat", [system, user], {"n": 1, "max_tokens": 9, "stop": (), "temperature": None}),
    ]


def test_chat_shots_are_earlier_turns() -> None:
    model = FakeModel("7")
    run(model, shots=SHOTS, instruction="none")
    roles = [(m["role"], m["content"]) for m in model.asked[0][1]]
    assert roles == [
        ("user", "1 + 1 ="),
        ("assistant", "2"),
        ("user", "5 - 3 ="),
        ("assistant", "2"),
        ("user", "3 + 4 ="),
    ]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("none", "1 + 1 = 2\n5 - 3 = 2\n3 + 4 ="),
        ("first", "Be brief.\n1 + 1 = 2\n5 - 3 = 2\n3 + 4 ="),
        ("question", "1 + 1 = 2\n5 - 3 = 2\nBe brief.\n3 + 4 ="),
    ],
)
def test_a_completion_is_lines_that_end_with_the_question(instruction: str, expected: str) -> None:
    model = FakeModel(" 7")
    assert run(model, form="completion", shots=SHOTS, instruction=instruction, stop=["\n"]) == "7"
    kind, prompt, options = model.asked[0]
    assert (kind, prompt, options["stop"]) == ("complete", expected, ("\n",))


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_the_question_asked_is_never_among_its_own_shots(form: str) -> None:
    model = FakeModel("2")
    run(model, question="1 + 1 =", form=form, shots=SHOTS, instruction="none")
    assert str(model.asked[0][1]).count("1 + 1 =") == 1
    assert "5 - 3 =" in str(model.asked[0][1])


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("3 + 4 = 7", "last_integer", "7"),
        ("3 + 4 = 7", "first_integer", "3"),
        ("it is -5, or 3-4", "last_integer", "4"),
        ("it is -5.", "last_integer", "-5"),
        ("007 and -0", "first_integer", "7"),
        ("007 and -0", "last_integer", "0"),
        ("7.0", "last_integer", "7"),
        ("about 7.5", "last_integer", None),
        ("...7", "last_integer", "7"),
        ("1" * 5000, "last_integer", "1" * 5000),
        ("no number", "last_integer", None),
        ("\n  7 \nbecause", "first_line", "7"),
        ("so\n 7 \n", "last_line", "7"),
        (" a\nb ", "whole", "a\nb"),
        (" \n", "whole", None),
        ("I say TRUE, not false", {"choice": ["True", "False"]}, "True"),
        ("I say true, not false", {"last_choice": ["True", "False"]}, "False"),
        ("Untrue or falsehood", {"choice": ["True", "False"]}, None),
        ("a b c", {"choice": ["a", "a b"]}, "a b"),
        ("C++ it is", {"choice": ["C", "C++"]}, "C++"),
    ],
)
def test_extraction(text: str, how: Any, answer: str | None) -> None:
    assert extract(text, how) == answer


def test_an_unparsable_reply_is_asked_again_with_sampling_and_noted() -> None:
    model = FakeModel("hm", "well", "7")
    context = Context({"extract": "last_integer", "retries": 2})
    assert solve({"question": "3 + 4 ="}, model, None, context) == "7"
    assert [options["temperature"] for _, _, options in model.asked] == [None, 1.0, 1.0]
    assert len(context.notes) == 2


def test_a_reply_that_stays_unparsable_is_answered_as_it_stands() -> None:
    assert run(FakeModel("hm", " dunno\n"), extract="last_integer", retries=1) == "dunno"
    assert run(FakeModel(""), extract="last_integer") == ""


def test_votes_are_one_call_and_the_majority_counts() -> None:
    model = FakeModel("7", "8", "so 8", "none", "7", "it is 8")
    assert run(model, extract="last_integer", votes=6, temperature=0.5) == "8"
    assert [(o["n"], o["temperature"]) for _, _, o in model.asked] == [(6, 0.5)]
    assert run(FakeModel("9", "8"), extract="last_integer", votes=2) == "9", "the first of equals"


def test_it_imports_nothing_but_the_standard_library() -> None:
    source = inspect.getsource(reference_harness)
    assert "bascule" not in source
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import re", "from collections import Counter", "from typing import Any"]


def test_its_files_are_a_harness_whose_bytes_follow_from_the_parameters() -> None:
    one = make_harness(reference_files(name="n", system_prompt="s", params={"form": "chat", "votes": 2}))
    other = make_harness(reference_files(name="n", system_prompt=" s\n", params={"votes": 2, "form": "chat"}))
    assert one.digest == other.digest
    assert one.manifest.params == {"form": "chat", "votes": 2}
