"""Baselines: computed once for what they depend on, and never 0 where there is no verdict."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from bascule.plugins.loader import load_plugins
from bascule.runtime.audit import baselines
from bascule.runtime.audit.baselines import baselines_once, remembered_baselines, score_baselines
from bascule.runtime.audit.report import BaselineRow, draw, report
from bascule.runtime.cli.show import show_report
from bascule.runtime.log.blobs import FileBlobs
from bascule.runtime.log.memory import MemoryLog
from bascule.runtime.world import World
from bascule.schemas.run import EvaluationConfig, PluginChoice, RunConfig
from tests.plugin_site import install_plugin
from tests.runtime.sample import RUN, log_of, sample


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that gets a line each time that the baselines of the task ``blabbing`` are computed."""
    site = tmp_path / "site"
    install_plugin(site, "blabbing", Path(__file__).with_name("blabbing.py").read_text())
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "counter"


def world(counter: Path, sealed: int = 10) -> World:
    task = PluginChoice(name="blabbing", params={"counter": str(counter)})
    return World(
        load_plugins(), RunConfig(task=task, evaluation=EvaluationConfig(dev_examples=8, sealed_examples=sealed))
    )


def computed(counter: Path) -> int:
    return len(counter.read_text().splitlines()) if counter.exists() else 0


async def test_a_baseline_is_computed_once_for_what_it_depends_on(
    counter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remembered_baselines(world(counter), ("sealed",)) is None
    found = await baselines_once(world(counter), ("sealed",))
    assert computed(counter) == 1
    assert found.keys() == {"zero", "nothing"}
    assert found["nothing"] == {}, "it says nothing of this split"
    zero = found["zero"]["sealed"]
    assert (zero.n, zero.unscored) == (10, 0)
    assert await baselines_once(world(counter), ("sealed",)) == found
    assert computed(counter) == 1
    assert remembered_baselines(world(counter), ("sealed",)) == found

    assert remembered_baselines(world(counter, sealed=9), ("sealed",)) is None
    assert remembered_baselines(world(counter), ("dev",)) is None
    assert remembered_baselines(world(counter.with_name("other")), ("sealed",)) is None, "other parameters"
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "code_hash", lambda: "changed")
        assert remembered_baselines(world(counter), ("sealed",)) is None
    for library in ("scikit-learn", "torch"):
        other = {**baselines.installed(), library: "99"}
        with monkeypatch.context() as patch:
            patch.setattr(baselines, "version", other.__getitem__)
            assert remembered_baselines(world(counter), ("sealed",)) is None, f"another {library}"
    assert remembered_baselines(world(counter), ("sealed",)) == found


def test_the_libraries_that_a_baseline_may_compute_with_are_known_by_version() -> None:
    found = baselines.installed(("pytest", "no-such-distribution"))
    assert found["numpy"] == version("numpy")
    assert found["pytest"] == version("pytest")
    assert found["no-such-distribution"] == ""


async def test_what_has_no_verdict_is_said_and_not_taken_for_the_last_word(counter: Path) -> None:
    found = await score_baselines(world(counter), ("dev",))
    zero = found["zero"]["dev"]
    public = world(counter).public
    asked = [e.input["question"] for e in public.dev[4:8]]
    right = sum(eval(question.removesuffix("=")) == 0 for question in asked)
    assert (zero.score, zero.n, zero.unscored) == (right / 8, 8, 4), "of all examples of the split"
    assert "is not bcanary-" in zero.reason, "the reason of the first"
    nothing = found["nothing"]["dev"]
    assert (nothing.score, nothing.unscored) == (0.0, 4)
    assert remembered_baselines(world(counter), ("dev",)) == found
    await baselines_once(world(counter), ("dev",))
    assert computed(counter) == 2, "another machine, or another day, may have what was missing"


async def test_memory_that_is_damaged_is_no_memory(counter: Path, tmp_path: Path) -> None:
    await baselines_once(world(counter), ("sealed",))
    (kept,) = (tmp_path / "cache" / "baselines").iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])
    assert remembered_baselines(world(counter), ("sealed",)) is None


async def test_a_report_shows_which_baseline_has_no_score(tmp_path: Path) -> None:
    log: MemoryLog = await log_of(await sample(FileBlobs(tmp_path / "blobs")))
    rows = [
        BaselineRow(name="kernel", sealed=None, unscored=3, reason="no [GPU] here"),
        BaselineRow(name="constant", sealed=0.25),
    ]
    found = report([e async for e in log.read(f"bascule.{RUN}.>")], rows)
    console = Console(record=True, width=140, file=(tmp_path / "shown").open("w"))
    show_report(found, console)
    shown = console.export_text()
    assert "kernel unscored, constant 0.250" in shown
    assert "kernel: 3 examples unscored: no [GPU] here" in shown
    draw(found, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0


async def test_a_picture_takes_any_edit_and_any_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen = []
    saved = Figure.savefig

    def noted(self: Figure, *args: Any, **options: Any) -> None:
        seen.append(self.axes[0].get_ylim())
        saved(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    log: MemoryLog = await log_of(await sample(FileBlobs(tmp_path / "blobs")))
    found = report([e async for e in log.read(f"bascule.{RUN}.>")], [])
    first, *others = found.generations
    odd = msgspec.structs.replace(first, dev=1.4, dev_interval=None, algorithm=None, edit=r"Use $\boxed{}$ form")
    draw(msgspec.structs.replace(found, generations=(odd, *others)), tmp_path / "report.png")
    ((bottom, top),) = seen
    assert bottom <= 0
    assert top > 1.4
