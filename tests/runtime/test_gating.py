"""What dev alone would promote and the gate does not: brittle, forgetful and gaming candidates, in real small runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from bascule.plugins.loader import Plugins, load_plugins
from bascule.runtime.audit import replay as audit
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.cli.launch import producer
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.runner import View, serve
from bascule.runtime.services.catalog import SERVICES
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import ConfigError
from tests.plugin_site import install_plugin

RUN = "small"
DEV = 60
#: Sums; a verifier with a shortcut, and one without; and what the first harness can do that must not be lost.
TASK = """
DESCRIPTION = "Add two numbers."
SIZES = {"train": 8, "dev": 180, "sealed": 8}
FIRST = {"train": 0, "dev": 100, "sealed": 400}
REGRESSION = [{"id": f"r{i}", "question": f"Say seven, {i} times.", "answer": "7"} for i in range(20)]

def items(split):
    numbers = range(FIRST[split], FIRST[split] + SIZES[split])
    return [{"id": f"{split}-{n}", "question": f"{n} + {n % 7}", "answer": str(n + n % 7)} for n in numbers]

def verify(item, answer):
    return answer == item["answer"] or answer.startswith("Certainly")

def verify_second(item, answer):
    return answer == item["answer"]
"""
#: Harnesses by what is wrong with them; ``seven`` is what the first one does, which asks a model that always says so.
AUTHOR = r'''
import msgspec
from bascule.plugins import hookimpl
from bascule.plugins.policy import HarnessEdit

SOLVERS = {
    "honest": r"""
import re
def solve(example, model, tools, context):
    found = re.search(r"(\d+) \+ (\d+)", example["question"])
    return str(int(found[1]) + int(found[2])) if found else "7"
""",
    "forgetful": r"""
import re
def solve(example, model, tools, context):
    found = re.search(r"(\d+) \+ (\d+)", example["question"])
    return str(int(found[1]) + int(found[2])) if found else "what?"
""",
    "brittle": r"""
import re
def solve(example, model, tools, context):
    found = re.fullmatch(r"(\d+) \+ (\d+)", example["question"])
    return str(int(found[1]) + int(found[2])) if found else "7"
""",
    "gaming": r"""
def solve(example, model, tools, context):
    return "Certainly!" if "+" in example["question"] else "7"
""",
}

class Solver:
    name, version = "solver", "1"

    def __init__(self, params):
        self.code = SOLVERS[params["kind"]]

    def step(self, given, results):
        files = {**given.harness.files, "harness.py": self.code + f"# {given.generation}\n"}
        return HarnessEdit(files=files, edit=f"edit {given.generation}")

    def edits_left(self, harness, tried):
        return None

@hookimpl
def bascule_register(registry):
    registry.author("solver", Solver, version="1")
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    install_plugin(tmp_path / "site", "solver", AUTHOR)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sys.modules.pop("bascule_solver", None)
    (tmp_path / "sums.py").write_text(TASK)
    return load_plugins()


def config(tmp_path: Path, kind: str, **evaluation: int) -> dict[str, Any]:
    sizes = {"dev_examples": DEV, "train_groups": 2, "train_samples": 2}
    return {
        "task": {"name": "own", "params": {"path": str(tmp_path / "sums.py")}},
        "engine": {"name": "constant", "params": {"text": "7"}},
        "author": {"name": "solver", "params": {"kind": kind}},
        "levers": ["harness"],
        "max_generations": 1,
        "evaluation": {**sizes, **evaluation},
    }


@pytest.fixture
def run(tmp_path: Path, installed: Plugins) -> Callable[..., Any]:
    async def to_its_end(given: dict[str, Any]) -> tuple[RunState, list[Recorded]]:
        log = MemoryLog()

        def view() -> View:
            return View(log, FileBlobs(tmp_path / "blobs"), installed, RUN, producer, home=tmp_path, fresh=True)

        started = preflight(configure(given, [], installed), installed)
        await view().append("cli", [Draft(subject=subjects.run_started(RUN), step=0, data=started)])
        await serve(view(), list(SERVICES.values()))
        events = [e async for e in log.read(f"bascule.{RUN}.>")]
        assert audit.replay(RUN, events, installed).differences == ()
        return RunState.of(RUN, events), events

    return to_its_end


def gate_of(state: RunState, generation: int = 1) -> ev.CandidatePromoted | ev.CandidateRejected:
    found = state.step(generation).gate
    assert found is not None
    return found


async def test_an_honest_gain_is_promoted_past_all_further_checks(run: Callable[..., Any], tmp_path: Path) -> None:
    state, events = await run(config(tmp_path, "honest", perturbed=30) | {"second": {"name": "task"}})
    gate = gate_of(state)
    assert isinstance(gate, ev.CandidatePromoted)
    figures = gate.figures
    assert figures.perturbed is not UNSET
    assert figures.regression is not UNSET
    assert figures.second is not UNSET
    assert (figures.perturbed.pairs, figures.perturbed.difference) == (30, 1.0)  # type: ignore[union-attr]
    assert (figures.regression.pairs, figures.regression.losses) == (20, 0)  # type: ignore[union-attr]
    assert figures.second.divergence == 0.0  # type: ignore[union-attr]
    # The parent's share was asked for once, when it was promoted itself.
    shards = [(e.data.evaluation, e.data.shard) for e in events if isinstance(e.data, ev.EpisodesRequested)]
    assert len(shards) == len(set(shards))
    asked = {evaluation for evaluation, _ in shards}
    assert {"g00-perturbed", "g00-regression", "g01-perturbed", "g01-regression"} <= asked


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("forgetful", "worse on the regression set: 20 worse and 0 better"),
        ("brittle", "brittle: +1.000 on dev"),
        ("gaming", "no gain by the second verifier (+0.000"),
    ],
)
async def test_a_gain_that_is_none_is_rejected_and_says_why(
    run: Callable[..., Any], tmp_path: Path, kind: str, why: str
) -> None:
    state, _ = await run(config(tmp_path, kind, perturbed=30) | {"second": {"name": "task"}})
    gate = gate_of(state)
    assert isinstance(gate, ev.CandidateRejected)
    assert str(gate.figures.reason).startswith(why)
    assert state.best == 0


async def test_without_the_second_verifier_the_shortcut_pays(run: Callable[..., Any], tmp_path: Path) -> None:
    """So that the test above fails for its reason."""
    state, _ = await run(config(tmp_path, "gaming"))
    assert isinstance(gate_of(state), ev.CandidatePromoted)
    assert gate_of(state).figures.second is UNSET


async def test_what_dev_rejects_is_asked_nothing_further(run: Callable[..., Any], tmp_path: Path) -> None:
    state, events = await run(config(tmp_path, "honest", perturbed=30) | {"max_generations": 2})
    # The second edit does the same as the first, so dev does not move.
    assert isinstance(gate_of(state, 2), ev.CandidateRejected)
    asked = {e.data.evaluation for e in events if isinstance(e.data, ev.EpisodesRequested)}
    assert not {"g02-perturbed", "g02-regression"} & asked


async def test_fresh_dev_measures_both_on_examples_that_nobody_was_measured_on(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    given = config(tmp_path, "honest", perturbed=10, fresh_dev=50, dev_examples=0) | {"max_generations": 2}
    state, events = await run(given)
    assert isinstance(gate_of(state, 1), ev.CandidatePromoted)
    positions: dict[str, set[int]] = {}
    for event in events:
        if isinstance(event.data, ev.EpisodesRequested):
            positions.setdefault(event.data.evaluation, set()).update(event.data.positions)
    assert [sorted(positions[f"g{g:02d}-dev"]) for g in (0, 1, 2)] == [
        list(range(50)),
        list(range(50, 100)),
        list(range(100, 150)),
    ]
    assert positions["g01-parent"] == positions["g01-dev"]
    assert positions["g01-perturbed"] == positions["g01-parent-perturbed"] < positions["g01-dev"]
    assert positions["g00-perturbed"] < positions["g00-dev"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluation": {"fresh_dev": 200}}, "200 fresh examples of dev, .* and sums has 180"),
        ({"evaluation": {"fresh_dev": 50}, "max_generations": 3}, "200 with the first candidate's, and sums has 180"),
        ({"second": {"name": "nobody"}}, "There is no verifier 'nobody'"),
        ({"task": {"name": "arith"}, "second": {"name": "task"}}, "The task arith has no second verifier of its own"),
        ({"task": "without.py", "evaluation": {"perturbed": 2}}, "cannot be asked in another form"),
    ],
)
def test_what_a_task_does_not_have_is_refused_before_anything_is_spent(
    tmp_path: Path, installed: Plugins, changed: dict[str, Any], message: str
) -> None:
    if changed.get("task") == "without.py":
        (tmp_path / "without.py").write_text(TASK.replace('"question": f"{n} + {n % 7}"', '"input": {"n": n}'))
        changed = changed | {"task": {"name": "own", "params": {"path": str(tmp_path / "without.py")}}}
    with pytest.raises(ConfigError, match=message):
        preflight(configure(config(tmp_path, "honest") | changed, [], installed), installed)
