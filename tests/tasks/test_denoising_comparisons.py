"""Recorded figures beside those that are made here, as ``bascule tasks baseline`` shows them."""

from __future__ import annotations

from bascule.plugins.loader import plugins
from bascule.runtime.audit.baselines import score_comparisons
from bascule.runtime.world import World
from bascule.schemas.run import PluginChoice, RunConfig


async def test_magic_as_a_program_on_the_published_split_is_within_the_tolerance_of_its_recorded_figure() -> None:
    # The limit is what a machine ten times slower would need.
    world = World(plugins(), RunConfig(task=PluginChoice(name="denoising", params={"limit": 900})))
    immune, _ = world.task.comparisons()  # type: ignore[attr-defined]
    (found,) = await score_comparisons(world, [immune])
    assert (found.comparison.recorded, found.comparison.tolerance) == (0.2226, 0.002)
    assert found.here.score is not None, found.here.reason
    assert abs(found.here.score - 0.2226) <= 0.002
    assert found.within


async def test_a_task_without_recorded_figures_has_no_comparisons() -> None:
    assert await score_comparisons(World(plugins(), RunConfig(task=PluginChoice(name="arith")))) == []
