"""What people are shown of a reward landscape."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bascule.runtime.audit.explain import Explainer
from bascule.runtime.audit.report import report
from bascule.runtime.cli.landscapes import bars, landscape_lines
from bascule.runtime.cli.show import show_explanation, show_report
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.log.protocol import NewEvent
from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.landscape import Interval, MeasuredEvaluation, Spread
from bascule.schemas.trajectory import Sampling, Scored
from bascule.verifiers.landscape import SampleFigures, landscape
from tests.runtime.sample import RUN, log_of, new_event, sample

LAND = landscape(
    [
        [SampleFigures(verdict=Scored(reward=r, steps=(r, 0.0)), prompt_tokens=40, output_tokens=n) for n in range(4)]
        for r in (0.0, 0.0, 0.5, 2.0)
    ]
)


def test_a_histogram_shows_where_nothing_is_and_where_hardly_anything_is() -> None:
    assert bars((1000, 0, 1, 500)) == "█·▁▄"
    assert bars(()) == ""
    assert bars((0, 0)) == "··"


def test_the_figures_stand_with_their_intervals() -> None:
    land = msgspec.structs.replace(LAND, ess=0.9, kl_to_base=0.4, regression_drop=0.02)
    text = "\n".join(landscape_lines(land, Spread(0.25, 0.5)))
    for part in (
        "rewards █·▄······▄ from 0 to 2 (16 samples): mean 0.625 [", "rewards other than 0 0.500 [",
        "informative of 4 groups 0.000 [0.000, ", "(0.25 of 32 are not 0) 1.000 [", "42 tokens (95% at most 43)",
        "0.25 s (95% at most 0.5)", "effective samples 0.90", "KL to the base 0.400", "regression set 0.020",
    ):  # fmt: skip
        assert part in text


def test_of_an_earlier_landscape_is_shown_what_it_has() -> None:
    (line,) = landscape_lines(landscape([[SampleFigures(verdict=Scored(reward=1.0))]], version=1), None)
    assert line == "success 1.000; informative of 1 groups 0.000"


async def run_with_landscape(folder: Path) -> MemoryLog:
    """The sample run, whose first candidate was measured over train and promoted before the lever was chosen."""
    asked = ev.EpisodesRequested(
        evaluation="g00-train", purpose="landscape", generation=0, split="train", shard=0, shards=1, positions=(0,),
        examples=("a",), samples=4, sampling=Sampling(), seed=1, harness="h",
    )  # fmt: skip
    done = ev.EvaluationCompleted(
        evaluation="g00-train", purpose="landscape", generation=0, split="train", landscape=LAND,
        measured=MeasuredEvaluation(seconds=3.0, rollout=Spread(0.25, 0.5)),
    )  # fmt: skip
    figures = ev.GateFigures(test="first", score=0.5, score_interval=Interval(0.4, 0.6))
    extra = [
        ("verifier", subjects.episodes_requested(RUN, "g00-train", 0), asked),
        ("verifier", subjects.evaluation_completed(RUN, "g00-train"), done),
        (
            "verifier",
            subjects.candidate_gate(RUN, 0),
            ev.CandidatePromoted(generation=0, over=None, figures=figures, gate_version="1"),
        ),
    ]
    events: list[NewEvent] = await sample(FileBlobs(folder))
    return await log_of([events[0], *(new_event(*e) for e in extra), *events[1:]])


@pytest.mark.parametrize("width", [100, 160])
async def test_a_choice_is_explained_with_the_landscape_that_it_was_made_on(tmp_path: Path, width: int) -> None:
    log = await run_with_landscape(tmp_path / "blobs")
    explainer = Explainer(RUN, "1")
    async for event in log.read(f"bascule.{RUN}.>"):
        explainer.add(event)
    found = explainer.result()
    assert found.seen is not None
    assert found.seen.landscape == LAND
    console = Console(record=True, width=width, file=(tmp_path / "shown").open("w"))
    show_explanation(found, console)
    shown = console.export_text()
    assert "the landscape over train of generation 0:" in shown
    assert "rewards █·▄······▄ from 0 to 2" in shown


async def test_a_report_has_each_generations_landscape_and_shows_the_best_ones(tmp_path: Path) -> None:
    log = await run_with_landscape(tmp_path / "blobs")
    found = report([e async for e in log.read(f"bascule.{RUN}.>")])
    assert found.generations[0].landscape == LAND
    assert found.generations[0].rollout == Spread(0.25, 0.5)
    assert found.generations[1].landscape is None
    console = Console(record=True, width=140, file=(tmp_path / "shown").open("w"))
    show_report(found, console)
    shown = console.export_text()
    assert "train, under the candidate of generation 0:" in shown
    assert "a rollout took 42 tokens" in shown
