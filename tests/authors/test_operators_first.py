"""The author ``operators`` in version 1: deterministic, never twice, a valid harness, only train items in its shots."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import msgspec
import pytest

from bascule.plugins.authors import bascule_register
from bascule.plugins.authors.edit_table import BRIEF, of_version
from bascule.plugins.authors.edits import untried
from bascule.plugins.authors.operators_first import ORDERS, OperatorsFirst
from bascule.plugins.authors.shots import choose_shots, shape
from bascule.plugins.policy import NO_EDIT, AuthorInput, Generation, HarnessEdit, NoEdit
from bascule.plugins.registry import Registry
from bascule.plugins.task import Allows, Example, PublicFace
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.harness_files import reference_files
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.landscape import Interval, RewardLandscape

AUTHOR = OperatorsFirst({})
OPERATORS = {o.name: o for o in of_version("1")}
PUBLIC = Arith({}).public()


def land(success: float, format_failures: float = 0.0) -> RewardLandscape:
    return RewardLandscape(
        groups=32,
        samples=256,
        unscored=0,
        score=success,
        score_interval=Interval(0.0, 1.0),
        mean=success,
        variance=0.1,
        skew=0.0,
        success_rate=success,
        pass_rates=(32, 0, 0, 0, 0, 0),
        informative=0.5,
        format_failures=format_failures,
        errors=0.0,
        prompt_tokens=20.0,
        output_tokens=5.0,
        distinct_rewards=2,
    )


def generation(
    n: int, edit: str | None, outcome: Literal["promoted", "rejected"], train: RewardLandscape | None = None
) -> Generation:
    lever: Literal["harness"] | None = "harness" if edit else None
    return Generation(generation=n, parent=0, lever=lever, algorithm=None, edit=edit, outcome=outcome, train=train)


def asked(
    harness: Harness | None = None,
    history: tuple[Generation, ...] = (),
    tried: tuple[str, ...] = (),
    seed: int = 1,
    public: PublicFace = PUBLIC,
    best: int = 0,
) -> AuthorInput:
    return AuthorInput(
        generation=len(history),
        seed=seed,
        description=public.description,
        max_answer_tokens=public.max_answer_tokens,
        harness=harness or make_harness(Arith({}).harness()),
        history=history or (generation(0, None, "promoted", land(0.1)),),
        best=best,
        tried=tried,
        train=public.train,
        answers=public.answers,
        evidence=(),
    )


def step(given: AuthorInput) -> HarnessEdit:
    edit = AUTHOR.step(given, ())
    assert isinstance(edit, HarnessEdit)
    return edit


def reference(**params: Any) -> Harness:
    return make_harness(reference_files(name="h", system_prompt="Answer.", params={"form": "chat", **params}))


def test_a_low_scoring_chat_harness_becomes_a_few_shot_completion_first() -> None:
    edit = step(asked())
    params = make_harness(edit.files).manifest.params
    assert edit.edit == "completion-8"
    assert (params["form"], params["stop"], params["instruction"]) == ("completion", ["\n"], "none")
    assert params["max_tokens"] == PUBLIC.max_answer_tokens
    assert params["extract"] == "last_integer", "what an edit does not touch stays"
    assert len(params["shots"]) == 8


def test_that_holds_without_a_landscape_and_with_many_format_failures_too() -> None:
    assert step(asked(history=(generation(0, None, "promoted"),))).edit == "completion-8"
    assert step(asked(history=(generation(0, None, "promoted", land(0.1, 0.9)),))).edit == "completion-8"


def test_many_format_failures_of_a_better_harness_are_met_by_extraction_and_retry() -> None:
    history = (generation(0, None, "promoted", land(0.6, 0.3)),)
    tried: list[str] = []
    for _ in range(3):
        tried.append(step(asked(reference(extract="last_integer"), history, tuple(tried))).edit)
    assert tried == ["extract-first", "brief", "retry-2"]


def test_a_failed_edit_puts_its_family_behind_the_others() -> None:
    start = generation(0, None, "promoted", land(0.1))
    history = (start, generation(1, "completion-8", "rejected"))
    assert step(asked(history=history, tried=("completion-8",))).edit == "chat-shots-4"


def test_it_walks_through_every_edit_once_and_then_has_none() -> None:
    harness = make_harness(Arith({}).harness())
    history: tuple[Generation, ...] = (generation(0, None, "promoted", land(0.1)),)
    tried: tuple[str, ...] = ()
    seen = {harness.digest}
    for left in range(AUTHOR.edits_left(harness, ()), 0, -1):
        assert AUTHOR.edits_left(harness, tried) == left
        edit = step(asked(harness, history, tried))
        made = make_harness(edit.files)
        assert made.digest not in seen, f"{edit.edit} repeats an earlier harness"
        seen.add(made.digest)
        assert edit.edit not in tried
        tried += (edit.edit,)
        history += (generation(len(history), edit.edit, "rejected"),)
    assert isinstance(AUTHOR.step(asked(harness, history, tried), ()), NoEdit)
    assert AUTHOR.edits_left(harness, tried) == 0


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
    tried = tuple(set(OPERATORS) - {name})
    edit = AUTHOR.step(asked(harness, tried=tried), ())
    assert isinstance(edit, HarnessEdit) == (AUTHOR.edits_left(harness, tried) == 1)
    if isinstance(edit, HarnessEdit):
        made = make_harness(edit.files)
        assert made.digest != harness.digest
        changed = made.manifest.params
        assert changed.get("votes", 1) * (changed.get("retries", 0) + 1) <= made.manifest.max_model_calls
        assert harness.manifest.params == {"form": "chat", **params}, "the old harness stays as it is"


def test_shots_are_train_items_with_their_answers_and_leave_out_dev_and_sealed() -> None:
    known = {(e.input["question"], PUBLIC.answers[e.id]) for e in PUBLIC.train}
    hidden = {e.input["question"] for e in (*PUBLIC.dev, *PUBLIC.sealed)}
    for seed in range(20):
        shots = make_harness(step(asked(seed=seed)).files).manifest.params["shots"]
        assert {(s["question"], s["answer"]) for s in shots} <= known
        assert not {s["question"] for s in shots} & hidden


def test_the_same_input_gives_the_same_edit_and_another_seed_other_shots() -> None:
    assert step(asked()) == step(asked())
    backwards = msgspec.structs.replace(PUBLIC, train=PUBLIC.train[::-1])
    assert step(asked(public=backwards)) == step(asked())
    assert step(asked(seed=2)).files != step(asked()).files


def test_a_reshuffle_keeps_the_number_of_shots_and_changes_them() -> None:
    completion = make_harness(step(asked()).files)
    edit = step(asked(completion, (generation(1, "completion-8", "promoted", land(0.4)),), ("completion-16",)))
    old, new = completion.manifest.params["shots"], make_harness(edit.files).manifest.params["shots"]
    assert edit.edit == "reshuffle-1"
    assert len(new) == len(old) == 8
    assert new != old


def test_brief_is_asked_for_once() -> None:
    tried = tuple(set(OPERATORS) - {"brief"})
    made = make_harness(step(asked(tried=tried)).files)
    assert made.files["system_prompt.md"].count(BRIEF) == 1
    assert isinstance(AUTHOR.step(asked(made, tried=tried), ()), NoEdit)


def test_a_harness_that_reads_no_parameters_is_left_alone() -> None:
    files = {"harness.py": "def solve(*_): ...", "manifest.json": '{"name": "own"}', "system_prompt.md": ""}
    own = make_harness(files)
    assert isinstance(AUTHOR.step(asked(own), ()), NoEdit)
    assert AUTHOR.edits_left(own, ()) == 0


def test_every_order_names_every_family() -> None:
    families = {o.family for o in OPERATORS.values()}
    assert all(set(order) == families and len(order) == len(families) for order in ORDERS.values())


def test_shots_are_balanced_over_the_shapes_of_the_questions() -> None:
    for seed in range(10):
        shots = choose_shots(PUBLIC.train, PUBLIC.answers, 8, salt=str(seed))
        assert Counter(shape(s["question"]) for s in shots) == {"# + # =": 4, "# - # =": 4}
        assert len({s["answer"] for s in shots}) == 8, "of many answers none comes twice"


def test_shots_are_balanced_over_few_answers() -> None:
    train = [Example(id=str(i), group=str(i // 2), input={"question": f"item {'x' * i}"}) for i in range(60)]
    answers = {e.id: "True" if int(e.id) < 6 else "False" for e in train}
    shots = choose_shots(train, answers, 8, salt="")
    assert Counter(s["answer"] for s in shots) == {"True": 4, "False": 4}
    orders = {tuple(s["answer"] for s in choose_shots(train, answers, 8, salt=str(i))) for i in range(20)}
    assert len(orders) > 10, "the order of the answers is no pattern"


def test_fewer_items_than_shots_are_all_taken() -> None:
    shots = choose_shots(PUBLIC.train[:3], PUBLIC.answers, 8, salt="")
    assert {s["question"] for s in shots} == {e.input["question"] for e in PUBLIC.train[:3]}
    assert choose_shots([], {}, 8, salt="") == []


def test_it_registers_and_has_no_parameters() -> None:
    registry = Registry()
    bascule_register(registry)
    assert registry.authors.get("operators", "1")({}).version == "1"
    with pytest.raises(ConfigError, match="speed"):
        OperatorsFirst({"speed": 1})


def test_without_the_right_to_quote_train_items_no_edit_holds_any() -> None:
    harness = reference(shots=[{"question": "1 + 1 =", "answer": "2"}])
    for change in ({"allows": Allows(data=False)}, {"restricted": True}):
        given = msgspec.structs.replace(asked(harness), **change)
        seen = []
        while isinstance(edit := AUTHOR.step(given, ()), HarnessEdit):
            assert make_harness(edit.files).manifest.params["shots"] == harness.manifest.params["shots"]
            seen.append(edit.edit)
            given = msgspec.structs.replace(given, tried=tuple(seen))
        assert set(seen) == {name for name, o in OPERATORS.items() if not o.quotes} & {
            o.name for o in untried(harness, (), OPERATORS.values())
        }
        assert len(seen) > 3
        assert isinstance(edit, NoEdit)
        assert "no train items" in edit.reason
        assert AUTHOR.edits_left(harness, (*seen, NO_EDIT)) == 0


def test_after_a_rollback_the_parents_own_landscape_says_what_comes_first() -> None:
    history = (generation(0, None, "promoted", land(0.1)), generation(1, "brief", "promoted", land(0.9)))
    assert step(asked(history=history, best=1)).edit != step(asked(history=history, best=0)).edit
