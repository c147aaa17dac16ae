"""The author ``operators``: edits that make valid harnesses, chosen by recorded trials on items that none quotes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest

from bascule.plugins.authors import bascule_register
from bascule.plugins.authors.edit_table import AFTER, BRIEF, OPERATORS, STEPS
from bascule.plugins.authors.edits import edited, material_of
from bascule.plugins.authors.operators import ORDERS, Operators, make, tried_on
from bascule.plugins.authors.trials import outcome, rewards
from bascule.plugins.policy import (
    NO_EDIT,
    TRIAL,
    AuthorInput,
    CallTool,
    Generation,
    HarnessEdit,
    NoEdit,
    TrainEvidence,
    TrialRequest,
    TrialResult,
)
from bascule.plugins.registry import Registry
from bascule.plugins.task import Allows, Example, PublicFace
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.harness_files import reference_files
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import ToolCalled
from bascule.schemas.harness import Harness, make_harness

AUTHOR = make({})
PUBLIC = Arith({}).public()
Score = Callable[[Harness, Example], float | None]


def reference(**params: Any) -> Harness:
    return make_harness(reference_files(name="h", system_prompt="Answer.", params={"form": "chat", **params}))


def generation(n: int, edit: str | None, outcome: Literal["promoted", "rejected"]) -> Generation:
    return Generation(
        generation=n, parent=0, lever="harness" if edit else None, algorithm=None, edit=edit, outcome=outcome
    )


def asked(harness: Harness | None = None, public: PublicFace = PUBLIC, **given: Any) -> AuthorInput:
    values: dict[str, Any] = {
        "generation": 1,
        "seed": 1,
        "description": public.description,
        "max_answer_tokens": public.max_answer_tokens,
        "harness": harness or make_harness(Arith({}).harness()),
        "history": (generation(0, None, "promoted"),),
        "best": 0,
        "tried": (),
        "train": public.train,
        "answers": public.answers,
        "evidence": (),
    }
    return AuthorInput(**values | given)


def test_a_trial_whose_result_was_withheld_counts_nothing() -> None:
    withheld = ToolCalled(session="s", ordinal=0, name=TRIAL, arguments={}, result="[restricted:0123456789ab]")
    assert rewards(withheld, 2) == (0.0, 0.0)
    score, why = outcome(withheld)
    assert score is None
    assert "quotes an item" in why


def searched(given: AuthorInput, score: Score, author: Operators = AUTHOR) -> tuple[Any, list[TrialRequest]]:
    """Step to the end, as the service does, from what is recorded."""
    results: list[ToolCalled] = []
    requests = []
    while isinstance(call := author.step(given, results), CallTool):
        assert call.name == TRIAL
        request = msgspec.convert(call.arguments, TrialRequest)
        requests.append(request)
        files = {k: v for k, v in {**given.harness.files, **request.files}.items() if v is not None}
        harness = make_harness(files)
        rewards = tuple(score(harness, given.train[p]) for p in request.positions)
        said = TrialResult(score=0.0, n=len(rewards), rewards=rewards)
        results.append(
            ToolCalled(
                session="s",
                ordinal=len(results),
                name=call.name,
                arguments=call.arguments,
                result=msgspec.json.encode(said).decode(),
            )
        )
    return call, requests


def shots_count(harness: Harness, _: Example) -> float:
    """More examples are better, in lines more than in turns."""
    params = harness.manifest.params
    return len(params.get("shots", ())) / 20 + 0.1 * (params["form"] == "completion")


def made(name: str, harness: Harness | None = None, **given: Any) -> Harness:
    full = asked(harness, **given)
    files = edited(full.harness, OPERATORS[name], material_of(full))
    assert files is not None, name
    return make_harness(files)


def test_the_edit_with_the_best_trials_is_proposed() -> None:
    edit, requests = searched(asked(), shots_count)
    assert isinstance(edit, HarnessEdit)
    assert edit.edit == "completion-16"
    assert len(make_harness(edit.files).manifest.params["shots"]) == 16
    assert requests[0].files == {}, "the promoted harness is tried as well"


def test_a_round_asks_all_that_are_left_the_same_items_and_the_next_one_others() -> None:
    _, requests = searched(asked(), shots_count)
    rounds: dict[tuple[int, ...], int] = {}
    for request in requests:
        rounds[request.positions] = rounds.get(request.positions, 0) + 1
    assert list(rounds.values()) == [13, 7, 4, 3]
    assert [len(positions) for positions in rounds] == [9, 17, 30, 40]
    assert len({p for positions in rounds for p in positions}) == 96, "no item is asked twice"
    assert sum(len(r.positions) for r in requests) <= 480


def test_trials_cost_no_more_than_they_may() -> None:
    _, requests = searched(asked(), shots_count, make({"episodes": 60, "candidates": 4}))
    assert sum(len(r.positions) for r in requests) <= 60
    assert len({str(r.files) for r in requests}) == 5


def test_equal_scores_leave_the_order_of_before() -> None:
    better: Score = lambda harness, _: float(harness.files != asked().harness.files)  # noqa: E731
    edit, _ = searched(asked(), better)
    assert isinstance(edit, HarnessEdit)
    assert edit.edit == "completion-8"


def test_what_is_better_by_no_more_than_noise_is_no_edit_and_the_figures_say_so() -> None:
    draw = random.Random(3)
    lucky: Score = lambda harness, _: float(draw.random() < 0.5)  # noqa: E731
    edit, _ = searched(asked(), lucky, make({"noise": 3.0}))
    assert isinstance(edit, NoEdit)
    for part in ("None of 12 edits", "on 96 train items", "standard error"):
        assert part in edit.reason
    worse: Score = lambda harness, _: float(harness.files == asked().harness.files)  # noqa: E731
    assert isinstance(searched(asked(), worse)[0], NoEdit)
    same: Score = lambda *_: 0.5  # noqa: E731
    assert isinstance(searched(asked(), same, make({"noise": 0}))[0], NoEdit), "equal is not better"


def test_an_edit_that_cannot_be_tried_is_out() -> None:
    def fragile(harness: Harness, _: Example) -> float | None:
        return None if harness.manifest.params["form"] == "completion" else shots_count(harness, _)

    edit, _ = searched(asked(), fragile)
    assert isinstance(edit, HarnessEdit)
    assert edit.edit == "chat-shots-8"
    given = asked()
    call = AUTHOR.step(given, ())
    assert isinstance(call, CallTool)
    failed = ToolCalled(session="s", ordinal=0, name=call.name, arguments=call.arguments, error="no")
    assert isinstance(AUTHOR.step(given, [failed]), CallTool)


def test_no_edit_is_tried_on_what_it_quotes_or_what_is_in_a_group_with_it() -> None:
    groups = {e.input["question"]: e.group for e in PUBLIC.train}
    evidence = tuple(
        TrainEvidence(example=e, truth=PUBLIC.answers[e.id], answer=PUBLIC.answers[e.id], error=None, reward=1.0)
        for e in PUBLIC.train[:40]
    )
    first, _ = searched(asked(), shots_count)
    for harness in (None, make_harness(first.files)):
        for seed in range(5):
            given = asked(harness, seed=seed, evidence=evidence)
            _, requests = searched(given, shots_count, make({"candidates": 40}))
            tried = {PUBLIC.train[p].group for r in requests for p in r.positions}
            for request in requests:
                manifest = make_harness({**given.harness.files, **request.files}).manifest  # type: ignore[dict-item]
                quoted = {groups[shot["question"]] for shot in manifest.params.get("shots", ())}
                assert not quoted & tried
            assert len(tried) > 40


def test_what_is_decided_follows_from_what_is_recorded_and_another_seed_asks_other_items() -> None:
    assert searched(asked(), shots_count) == searched(asked(), shots_count)
    one, other = (searched(asked(seed=seed), shots_count)[1] for seed in (1, 2))
    assert one[0].positions != other[0].positions


def test_without_the_right_to_quote_no_trial_and_no_edit_holds_a_train_item() -> None:
    harness = reference(shots=[{"question": "1 + 1 =", "answer": "2"}])
    texts = [e.input["question"] for e in PUBLIC.train]
    for change in ({"allows": Allows(data=False)}, {"restricted": True}):
        given = asked(harness, **change)
        edit, requests = searched(given, lambda h, _: float(h.files != harness.files), make({"candidates": 64}))
        assert isinstance(edit, HarnessEdit)
        assert len({str(r.files) for r in requests}) > 6
        for files in (edit.files, *(r.files for r in requests)):
            manifest = make_harness({**harness.files, **files}).manifest  # type: ignore[dict-item]
            assert manifest.data == "none"
            assert manifest.params["shots"] == harness.manifest.params["shots"]
            assert not any(text in (files.get("system_prompt.md") or "") for text in texts)


def test_it_goes_on_until_nothing_is_left_and_says_how_much_that_is() -> None:
    harness = reference(extract="last_integer")
    tried: tuple[str, ...] = ()
    better: Score = lambda h, _: float(h.files != harness.files)  # noqa: E731
    while isinstance(edit := searched(asked(harness, tried=tried), better)[0], HarnessEdit):
        assert AUTHOR.edits_left(harness, tried) > 0
        assert edit.edit not in tried
        tried += (edit.edit,)
    assert len(tried) > 15
    assert isinstance(edit, NoEdit)
    assert AUTHOR.edits_left(harness, (*tried, NO_EDIT)) == 0
    assert AUTHOR.edits_left(harness, (NO_EDIT,)) == 0, "a search found nothing better"


def test_a_failed_family_comes_behind_the_others() -> None:
    better: Score = lambda h, _: float(h.files != asked().harness.files)  # noqa: E731
    history = (generation(0, None, "promoted"), generation(1, "completion-8", "rejected"))
    edit, _ = searched(asked(history=history, tried=("completion-8",)), better)
    assert isinstance(edit, HarnessEdit)
    assert OPERATORS[edit.edit].family == "nearest"


def test_without_train_items_the_first_edit_is_proposed_untried() -> None:
    edit, requests = searched(asked(train=(), answers={}), shots_count)
    assert isinstance(edit, HarnessEdit)
    assert requests == []


def test_without_episodes_for_trials_every_edit_is_proposed_untried() -> None:
    author = make({"episodes": 0})
    tried: tuple[str, ...] = ()
    seen: set[tuple[tuple[str, str], ...]] = set()
    while isinstance(edit := author.step(asked(tried=tried), ()), HarnessEdit):
        files = tuple(sorted(edit.files.items()))
        assert files not in seen
        seen.add(files)
        tried = (*tried, edit.edit)
    assert tried[:2] == ("completion-8", "completion-16")
    assert len(seen) > 12


def test_a_harness_that_reads_no_parameters_is_left_alone() -> None:
    files = {"harness.py": "def solve(*_): ...", "manifest.json": '{"name": "own"}', "system_prompt.md": ""}
    own = make_harness(files)
    assert isinstance(AUTHOR.step(asked(own), ()), NoEdit)
    assert AUTHOR.edits_left(own, ()) == 0


@pytest.mark.parametrize("shots", [4, ["two"], [{"input": "1 + 1"}]])
def test_parameters_of_another_authors_that_look_like_ours_are_left_alone(shots: Any) -> None:
    manifest = {"name": "other", "params": {"form": "chat", "shots": shots}}
    files = {"harness.py": "def solve(*_): ...", "manifest.json": json.dumps(manifest), "system_prompt.md": ""}
    other = make_harness(files)
    assert AUTHOR.edits_left(other, ()) == 0
    assert isinstance(AUTHOR.step(asked(other), ()), NoEdit)


@pytest.mark.parametrize(
    "params",
    [
        {"extract": "last_integer"},
        {"extract": {"choice": ["True", "False"]}, "votes": 5},
        {"form": "completion", "shots": [{"question": "q", "answer": "a"}], "extract": "whole"},
        {"form": "completion", "retries": 9, "instruction": "question"},
        {},
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_gives_a_valid_other_harness_or_does_not_apply(name: str, params: dict[str, Any]) -> None:
    harness = reference(**params)
    given = asked(harness)
    files = edited(harness, OPERATORS[name], material_of(given))
    assert harness.manifest.params == {"form": "chat", **params}, "the old harness stays as it is"
    if files is not None:
        changed = make_harness(files)
        assert changed.digest != harness.digest
        found = changed.manifest.params
        assert found.get("votes", 1) * (found.get("retries", 0) + 1) <= changed.manifest.max_model_calls
        again = edited(changed, OPERATORS[name], material_of(asked(changed)))
        assert again is None or OPERATORS[name].shots is not None or again != files


def test_own_successes_are_right_answers_of_the_harness_itself() -> None:
    found = [
        TrainEvidence(example=e, truth="7", answer=answer, error=None, reward=reward)
        for e, answer, reward in zip(
            PUBLIC.train, ("seven", "wrong", None, "8", "odd"), (1.0, 0.0, 1.0, 1.0, None), strict=False
        )
    ]
    shots = made("own-8", evidence=tuple(found)).manifest.params["shots"]
    questions = [e.input["question"] for e in PUBLIC.train[:5]]
    assert {(s["question"], s["answer"]) for s in shots} == {(questions[0], "seven"), (questions[3], "8")}
    assert edited(asked().harness, OPERATORS["own-8"], material_of(asked())) is None, "there is none"


def test_the_nearest_are_found_in_what_prepare_is_given() -> None:
    harness = reference(shots=[{"question": "1 + 1 =", "answer": "2"}])
    changed = made("completion-nearest-8", harness)
    assert (changed.manifest.isolation, changed.manifest.data) == ("batch", "train")
    assert (changed.manifest.params["nearest"], changed.manifest.params["shots"]) == (8, [])
    assert changed.files["answering.py"] == harness.files["harness.py"]
    twice = made("extract-after", made("nearest-4", harness))
    assert twice.files["answering.py"] == harness.files["harness.py"], "it is put in front once"
    own = make_harness({**harness.files, "answering.py": "X = 1\n"})
    assert edited(own, OPERATORS["nearest-4"], material_of(asked(own))) is None


def test_steps_need_room_and_go_with_no_brief_answer() -> None:
    assert edited(asked().harness, OPERATORS["steps"], material_of(asked())) is None, "4 tokens are no room"
    brief = made("brief")
    assert brief.files["system_prompt.md"].count(BRIEF) == 1
    steps = made("steps", brief, max_answer_tokens=64)
    assert BRIEF not in steps.files["system_prompt.md"]
    assert STEPS in steps.files["system_prompt.md"]
    assert (steps.manifest.params["after"], steps.manifest.params["max_tokens"]) == (AFTER, 256)


def test_prompts_say_what_the_answers_are() -> None:
    assert "integer in digits" in made("form-told").files["system_prompt.md"]
    assert made("described").files["system_prompt.md"] == f"{PUBLIC.description}\n"
    train = tuple(Example(id=str(i), group=str(i), input={"question": f"item {i}"}) for i in range(20))
    answers = {e.id: "left" if int(e.id) % 3 else "right" for e in train}
    told = made("form-told", train=train, answers=answers)
    assert "one of these, and nothing else: left, right." in told.files["system_prompt.md"]
    assert made("extract-choice", train=train, answers=answers).manifest.params["extract"] == {
        "choice": ["left", "right"]
    }
    looks = made("looks").files["system_prompt.md"]
    assert sum(answer in looks.split("these: ")[1].rstrip(".\n").split("; ") for answer in PUBLIC.answers.values()) > 3


def test_half_of_the_groups_are_left_to_quote_those_with_evidence_first() -> None:
    evidence = tuple(
        TrainEvidence(example=e, truth="", answer=None, error=None, reward=None) for e in PUBLIC.train[:30]
    )
    positions = tried_on(asked(evidence=evidence), 1000)
    every = {e.group for e in PUBLIC.train}
    tried = {PUBLIC.train[p].group for p in positions}
    assert len(tried) == (len(every) + 1) // 2
    assert not tried & {e.example.group for e in evidence}


def test_every_order_names_every_family() -> None:
    families = {o.family for o in OPERATORS.values()}
    assert all(set(order) == families and len(order) == len(families) for order in ORDERS.values())


@pytest.mark.parametrize("params", [{"speed": 1}, {"episodes": -1}, {"candidates": 65}, {"noise": -1}])
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="operators"):
        make(params)


def test_it_is_registered_with_the_version_before() -> None:
    registry = Registry()
    bascule_register(registry)
    assert registry.authors.get("operators")({}).version == "2"
    assert registry.authors.get("operators", "1")({}).version == "1"
