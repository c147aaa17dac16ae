"""The author ``tuner``: every trial is a recorded call, what is better becomes the edit, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from bascule.plugins.authors import bascule_register
from bascule.plugins.authors.parameters import parameters
from bascule.plugins.authors.search import settings
from bascule.plugins.authors.suggesting import SUGGEST
from bascule.plugins.authors.trials import fold
from bascule.plugins.authors.tuner import PREFIX, Tuner, make
from bascule.plugins.policy import (
    NO_EDIT,
    TRIAL,
    AuthorInput,
    CallTool,
    ChecksReady,
    Generation,
    HarnessEdit,
    NoEdit,
    TrialRequest,
    TrialResult,
)
from bascule.plugins.registry import Registry
from bascule.plugins.task import Example
from bascule.plugins.tasks.harness_files import literal, manifest_text
from bascule.schemas.errors import ConfigError, ModelError
from bascule.schemas.events import ToolCalled
from bascule.schemas.harness import Harness, HarnessManifest, Tunable, make_harness

CODE = """PARAMS = {
    "depth": 1,  # how deep
    "kind": "plain",
}
TUNABLE = {"depth": {"low": 1, "high": 9, "integer": True}, "kind": {"values": ["plain", "fine"]}}
"""
TRAIN = tuple(Example(id=f"t{i}", group=f"g{i // 2}", input={"question": f"{i}?"}) for i in range(30))
SOLVE = "def solve(example, model, tools, context):\n    return ''\n"


def harness(code: str | None = CODE, **manifest: Any) -> Harness:
    files = {
        "harness.py": SOLVE,
        "system_prompt.md": "Answer.\n",
        "manifest.json": manifest_text(HarnessManifest(name="h", **manifest)),
    }
    return make_harness(files | ({"model.py": code} if code is not None else {}))


WITH_BOTH = harness(params={"C": 1.0, "name": "x"}, tunable={"C": Tunable(low=0.01, high=10, log=True)})


def asked(given: Harness = WITH_BOTH, *, seed: int = 1, history: tuple[Generation, ...] = ()) -> AuthorInput:
    return AuthorInput(
        generation=1 + len(history),
        seed=seed,
        description="",
        max_answer_tokens=4,
        harness=given,
        history=history,
        best=0,
        tried=(),
        train=TRAIN,
        answers={},
        evidence=(),
    )


def score(files: dict[str, str]) -> float:
    """Best at depth 6, kind fine and C near 2."""
    found = literal(files["model.py"], "PARAMS")
    value = 0.2 + 0.3 * (found["kind"] == "fine") - 0.04 * abs(found["depth"] - 6)
    given = json.loads(files["manifest.json"])["params"].get("C", 2.0)
    return value - 0.05 * abs(given - 2.0)


def result(ordinal: int, call: CallTool, said: TrialResult | None, error: str | None = None) -> ToolCalled:
    text = None if said is None else msgspec.json.encode(said).decode()
    return ToolCalled(session="s", ordinal=ordinal, name=call.name, arguments=call.arguments, result=text, error=error)


def suggested(author: Tuner, ordinal: int, call: CallTool) -> ToolCalled:
    performed = asyncio.run(author.perform(call))
    return ToolCalled(
        session="s", ordinal=ordinal, name=call.name, arguments=call.arguments, result=performed.answer["result"]
    )


def of_score(value: float, n: int = 10) -> TrialResult:
    return TrialResult(score=value, n=n, rewards=(value,) * n)


def tuned(
    author: Tuner, given: AuthorInput, trial: Callable[[dict[str, str]], TrialResult | None]
) -> tuple[HarnessEdit | NoEdit, list[TrialRequest]]:
    """Step to the end, as the service does; each call is made of what is recorded of the earlier ones."""
    results: list[ToolCalled] = []
    requests = []
    while isinstance(call := author.step(given, results), CallTool):
        assert call.arguments == json.loads(json.dumps(call.arguments)), "as it is recorded"
        if call.name == SUGGEST:
            results.append(suggested(author, len(results), call))
            continue
        assert call.name == TRIAL
        request = msgspec.convert(call.arguments, TrialRequest)
        requests.append(request)
        files = {k: v for k, v in {**given.harness.files, **request.files}.items() if v is not None}
        said = trial(files)
        results.append(result(len(results), call, said, None if said else "no trial"))
        results = [msgspec.json.decode(msgspec.json.encode(r), type=ToolCalled) for r in results]
    assert isinstance(call, HarnessEdit | NoEdit)
    return call, requests


def test_the_best_trial_becomes_the_edit_and_its_name_says_what_is_other() -> None:
    edit, requests = tuned(make({}), asked(), lambda files: of_score(score(files)))
    assert isinstance(edit, HarnessEdit)
    assert requests[0].files == {}, "the first trial is of the harness as it is"
    scores = [score({**WITH_BOTH.files, **{k: v for k, v in r.files.items() if v}}) for r in requests]
    assert score(edit.files) == max(scores) > scores[0] + 0.3
    new = make_harness(edit.files)
    found = literal(new.files["model.py"], "PARAMS")
    assert edit.edit.startswith(f"{PREFIX}1: C 1 to ")
    assert f"depth 1 to {found['depth']}, kind plain to fine" in edit.edit
    assert new.manifest.params["name"] == "x", "what is not tunable stays"
    assert "# how deep" in new.files["model.py"]
    assert new.files["harness.py"] == SOLVE


def test_all_trials_of_a_generation_ask_the_same_items_and_only_changed_files() -> None:
    author = make({"trials": 5, "positions": 12, "samples": 2})
    _, requests = tuned(author, asked(), lambda files: of_score(score(files)))
    assert len(requests) == 5
    assert {r.positions for r in requests} == {requests[0].positions}
    assert len(requests[0].positions) == 12
    assert {r.samples for r in requests} == {2}
    assert {name for r in requests for name in r.files} == {"manifest.json", "model.py"}


def test_the_items_are_of_different_groups_as_long_as_there_are_any() -> None:
    assert len({TRAIN[p].group for p in fold(TRAIN, 15, salt="1")}) == 15
    assert fold(TRAIN, 99, salt="1") == tuple(range(30))
    assert fold(TRAIN, 15, salt="1") != fold(TRAIN, 15, salt="2")


def test_the_next_call_follows_from_the_recorded_results_alone() -> None:
    first, one = tuned(make({}), asked(), lambda files: of_score(score(files)))
    second, two = tuned(make({}), asked(), lambda files: of_score(score(files)))
    assert (first, one) == (second, two)
    assert tuned(make({}), asked(seed=2), lambda files: of_score(score(files)))[1] != one
    assert tuned(make({"seed": 3}), asked(), lambda files: of_score(score(files)))[1] != one


def test_nothing_better_is_no_edit_with_the_figures() -> None:
    edit, requests = tuned(make({"trials": 4}), asked(), lambda files: of_score(0.5 if len(files) else 0.0))
    assert isinstance(edit, NoEdit)
    assert len(requests) == 4
    for part in ("4 trials on 30 train items", "(0.5)", "the others had 0.5 with"):
        assert part in edit.reason


def test_trials_that_failed_are_worst_and_do_not_stop_the_search() -> None:
    crash = TrialResult(score=0.0, n=10, errors=10, message="ValueError: no", rewards=(0.0,) * 10)

    def fragile(files: dict[str, str]) -> TrialResult | None:
        found = literal(files["model.py"], "PARAMS")
        if found["kind"] == "plain":
            return crash if found["depth"] < 5 else None
        return of_score(score(files) - 1.0)

    edit, requests = tuned(make({}), asked(), fragile)
    assert len(requests) == 8
    assert isinstance(edit, HarnessEdit), "anything that works is better than what fails, below 0 too"
    assert "kind plain to fine" in edit.edit


def test_if_every_trial_fails_the_reason_is_given() -> None:
    parse = TrialResult(score=0.0, n=10, errors=10, message="manifest.json is not valid")
    edit, requests = tuned(make({"trials": 3}), asked(), lambda _: parse)
    assert isinstance(edit, NoEdit)
    assert len(requests) == 3
    assert "manifest.json is not valid" in edit.reason
    unscored = TrialResult(score=0.0, n=2, unscored=2, message="there is no GPU", rewards=(None, None))
    edit, _ = tuned(make({"trials": 3}), asked(), lambda _: unscored)
    assert isinstance(edit, NoEdit)
    assert "there is no GPU" in edit.reason


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (harness(None), "nothing tunable"),
        (harness("# TUNABLE = {}\nTEXT = 'TUNABLE = {}'\n"), "nothing tunable"),
        (harness(None, tunable={"C": Tunable(low=0, high=1)}), "gives it no value"),
        (harness(None, params={"C": 1}, tunable={"C": Tunable(low=2, high=1)}), "from 2 to 1"),
        (harness("TUNABLE = {'a': {'low': 0, 'high': 1}}\n"), "PARAMS"),
        (harness("PARAMS = [1]\nTUNABLE = {'a': {'low': 0, 'high': 1}}\n"), "no dictionary"),
        (harness("PARAMS = {'a': 1}\nTUNABLE = {'a': {'lowest': 0}}\n"), "lowest"),
        (harness("PARAMS = {'a': 1}\nTUNABLE = {'a': {}}\n"), "without values"),
        (harness("PARAMS = dict(a=1)\nTUNABLE = {'a': {'values': [1, 2]}}\n"), "no literal"),
    ],
)
def test_a_harness_that_declares_nothing_usable_costs_no_trial(given: Harness, says: str) -> None:
    edit = make({}).step(asked(given), ())
    assert isinstance(edit, NoEdit)
    assert says in edit.reason
    assert make({}).edits_left(given, ()) == 0


def test_one_search_is_left_for_a_harness_until_it_came_to_nothing() -> None:
    author = make({})
    assert author.edits_left(WITH_BOTH, ()) == 1
    assert author.edits_left(WITH_BOTH, ("tune-1: C 1 to 2",)) == 0
    assert author.edits_left(WITH_BOTH, (NO_EDIT,)) == 0


def test_a_second_search_goes_on_from_the_promoted_parameters() -> None:
    first, _ = tuned(make({"trials": 3}), asked(), lambda files: of_score(score(files)))
    assert isinstance(first, HarnessEdit)
    done = Generation(generation=1, parent=0, lever="harness", algorithm=None, edit=first.edit, outcome="promoted")
    given = asked(make_harness(first.files), seed=2, history=(done,))
    second, requests = tuned(make({"trials": 12}), given, lambda files: of_score(score(files)))
    assert requests[0].files == {}
    assert isinstance(second, HarnessEdit)
    assert second.edit.startswith(f"{PREFIX}2: ")
    assert score(second.files) > score(first.files)


def test_parameters_of_two_files_and_the_manifest_may_have_one_name() -> None:
    files = {**WITH_BOTH.files, "other.py": "PARAMS = {'C': 5, 'depth': 2}\nTUNABLE = {'C': {'values': [5, 6]}}\n"}
    given = make_harness(files)
    assert [(p.file, p.name) for p in parameters(given)] == [
        ("manifest.json", "C"), ("model.py", "depth"), ("model.py", "kind"), ("other.py", "C"),
    ]  # fmt: skip
    _, requests = tuned(make({}), asked(given), lambda files: of_score(score(files)))
    others = [literal(r.files["other.py"] or "", "PARAMS") for r in requests if "other.py" in r.files]
    assert others
    assert all(o == {"C": 6, "depth": 2} for o in others)


def test_a_text_that_no_event_can_hold_is_no_part_of_an_edits_name() -> None:
    given = harness("PARAMS = {'a': 'x'}\nTUNABLE = {'a': {'values': ['x', '\\ud800']}}\n")
    edit, _ = tuned(make({}), asked(given), lambda files: of_score(float("ud800" in files["model.py"].split("\n")[0])))
    assert isinstance(edit, HarnessEdit)
    assert len(msgspec.json.encode(edit)) > 0


@pytest.mark.parametrize("params", [{"trials": 1}, {"trials": 65}, {"positions": 0}, {"trails": 4}, {"samples": "2"}])
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tuner"):
        make(params)


def test_it_is_registered() -> None:
    registry = Registry()
    bascule_register(registry)
    author = registry.authors.get("tuner")({"trials": 3})
    assert isinstance(author, Tuner)
    assert (author.params.trials, author.version) == (3, "2")
    assert registry.authors.get("tuner", "1")({}).version == "1"


def test_a_call_carries_what_the_promoted_harness_has_not() -> None:
    """What is asked stays far below the size of an event, however large the harness."""
    given = make_harness({**WITH_BOTH.files, "table.md": "x" * 60_000})
    _, requests = tuned(make({"trials": 3}), asked(given), lambda _: of_score(0.1))
    assert max(len(msgspec.json.encode(request)) for request in requests) < 2000


def recorded(author: Tuner, given: AuthorInput) -> tuple[HarnessEdit | NoEdit, list[ToolCalled]]:
    """A whole search with the results that are recorded of it."""
    results: list[ToolCalled] = []
    while isinstance(call := author.step(given, results), CallTool):
        if call.name == SUGGEST:
            results.append(suggested(author, len(results), call))
            continue
        files = {**given.harness.files, **{k: v for k, v in call.arguments["files"].items() if v is not None}}
        results.append(result(len(results), call, of_score(score(files))))
    assert isinstance(call, HarnessEdit | NoEdit)
    return call, results


def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)


def test_what_is_recorded_is_decided_again_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    edit, results = recorded(make({}), asked())
    assert [r.name for r in results] == [TRIAL, *[SUGGEST, TRIAL] * 7]
    without_optuna(monkeypatch)
    for n, made in enumerate(results):
        call = make({}).step(asked(), results[:n])
        assert isinstance(call, CallTool)
        assert (call.name, call.arguments) == (made.name, made.arguments)
    assert make({}).step(asked(), results) == edit


def test_a_replay_follows_the_recorded_suggestion_and_not_what_optuna_would_say_now() -> None:
    _, results = recorded(make({"trials": 3}), asked())
    other = msgspec.structs.replace(results[1], result="[0.5, 7, 1]")
    call = make({"trials": 3}).step(asked(), [results[0], other])
    assert isinstance(call, CallTool)
    found = literal(call.arguments["files"]["model.py"], "PARAMS")
    assert found == {"depth": 7, "kind": "fine"}


def test_where_optuna_is_missing_it_is_said_before_anything_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    make({}).ready()
    without_optuna(monkeypatch)
    author = make({})
    assert isinstance(author, ChecksReady)
    with pytest.raises(ModelError, match=r"Optuna.*pip install.*tuner"):
        author.ready()
    make({}, "1").ready()


def test_a_space_with_nothing_left_ends_the_search() -> None:
    given = harness("PARAMS = {'a': 1}\nTUNABLE = {'a': {'values': [1, 2, 3]}}\n")
    edit, requests = tuned(make({}), asked(given), lambda files: of_score(literal(files["model.py"], "PARAMS")["a"]))
    assert len(requests) == 3
    assert isinstance(edit, HarnessEdit)
    assert edit.edit == "tune-1: a 1 to 3"


def test_version_1_asks_for_trials_alone_and_searches_as_it_did() -> None:
    edit, results = recorded(make({}, "1"), asked())
    assert [r.name for r in results] == [TRIAL] * 8
    tunable = parameters(WITH_BOTH)
    scores = [r.score for r in (msgspec.json.decode(r.result or "", type=TrialResult) for r in results)]
    expected = settings([p.dimension for p in tunable], (1.0, 1, "plain"), scores, seed=1, trials=8, first=3)
    tried = [{**WITH_BOTH.files, **r.arguments["files"]} for r in results]
    found = [(json.loads(f["manifest.json"])["params"]["C"], *literal(f["model.py"], "PARAMS").values()) for f in tried]
    assert found == expected
    assert isinstance(edit, HarnessEdit)
