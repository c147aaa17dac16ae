"""Looks at the sealed split: counted for the same data, and for no others."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bascule.plugins.loader import plugins
from bascule.runtime.audit.looks import looks, same_data
from bascule.runtime.cli.configuration import configure, preflight
from bascule.schemas import subjects
from bascule.schemas.events import AblationRequested, RunCompleted, SealedReport
from bascule.schemas.landscape import Interval
from bascule.schemas.run import PluginChoice
from tests.runtime.conftest import SMALL
from tests.runtime.sample import log_of, new_event

ENDED = RunCompleted(
    best=0,
    generations=1,
    reason="budget",
    sealed=SealedReport(
        before=0.5,
        before_interval=Interval(0.4, 0.6),
        after=0.5,
        after_interval=Interval(0.4, 0.6),
        wins=0,
        losses=0,
        p=1.0,
        n=20,
        test="mcnemar",
    ),
)
FRUIT, STARS = ({"path": f"/tasks/{name}.py", "sha256": digit * 64} for name, digit in (("fruit", "1"), ("stars", "2")))


def task(name: str, **params: Any) -> PluginChoice:
    return PluginChoice(name=name, params=params)


async def test_looks_at_one_file_are_none_at_another() -> None:
    small = preflight(configure(SMALL, [], plugins()), plugins())
    runs = {
        "one": task("own", **FRUIT),
        "two": task("own", **STARS),
        "three": task("own", **{**FRUIT, "sha256": "3" * 64}),
        "four": task("arith"),
    }
    events = []
    for run, chosen in runs.items():
        started = replace(small, config=replace(small.config, task=chosen))
        events.append(new_event("cli", subjects.run_started(run), started))
    events += [new_event("verifier", subjects.run_end(run), ENDED) for run in ("one", "two", "four")]
    ablation = AblationRequested(name="a1", arm="no-adapter", generation=1)
    events.append(new_event("cli", subjects.ablation_requested("one", "a1"), ablation))
    log = await log_of(events)
    assert await looks(log.read, runs["one"]) == {"one": 2, "three": 0}
    assert await looks(log.read, runs["two"]) == {"two": 1}
    assert await looks(log.read, runs["four"]) == {"four": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (task("arith"), task("arith"), True),
        (task("arith"), task("rooms"), False),
        (task("lawbench", regime="llm_only"), task("lawbench", regime="retrieval"), True),
        (task("own", **FRUIT), task("own", **STARS), False),
        (task("own", **FRUIT), task("sia-dir", **FRUIT), False),
        (task("own", **FRUIT), task("own", **{**FRUIT, "path": "/elsewhere/fruit.py"}), True),
        (task("own", **FRUIT), task("own", **{**FRUIT, "sha256": "3" * 64}), True),
        (task("sia-dir", path="/a", repeats=2), task("sia-dir", path="/a"), True),
        (task("sia-dir", path="/a"), task("sia-dir", path="/b"), False),
        (task("denoising"), task("denoising", h5ad="/a.h5ad"), False),
        (task("denoising", h5ad="/a.h5ad"), task("denoising", h5ad="/b.h5ad"), False),
    ],
)
def test_data_are_the_same_by_name_and_file_whatever_the_rules(
    one: PluginChoice, other: PluginChoice, same: bool
) -> None:
    assert same_data(one, other) is same
    assert same_data(other, one) is same
