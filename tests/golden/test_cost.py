"""What a run of earlier code cost: what its log holds, and what it lacks."""

from __future__ import annotations

from pathlib import Path

from bascule.runtime.audit.cost import cost_report
from bascule.runtime.exports.reader import open_export
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from tests.golden.test_golden_logs import tar

HERE = Path(__file__).parent


def test_tokens_and_episodes_are_counted_and_what_was_not_measured_is_said() -> None:
    with open_export(tar(HERE / "parity.tar.xz")) as export:
        events = list(export.events())
        state = RunState.of(export.manifest.run, events)
    found = cost_report(state)
    logged = [e.data for e in events if isinstance(e.data, ev.TrajectoryLogged)]
    assert found.total.rollouts == len(logged)
    assert found.total.prompt_tokens == sum(d.prompt_tokens for d in logged)
    assert found.total.output_tokens == sum(d.output_tokens for d in logged)
    updates = [e.data.measured.seconds for e in events if isinstance(e.data, ev.AdapterCheckpointed)]
    (trainer,) = [r for r in found.rows if r.service == "trainer"]
    assert (trainer.part, trainer.seconds, trainer.gpu_seconds) == ("weights", sum(updates), None)
    assert {r.seconds for r in found.rows if r.service in ("rollout", "verifier")} == {None}
    assert found.total.dollars is None
    assert found.budget == ()
    assert len(found.lacks) == 2
    sealed = [r for r in found.rows if r.part == "stop" and r.service == "rollout"]
    assert [r.rollouts for r in sealed] == [sum(d.evaluation.endswith("-sealed") for d in logged)]
    assert found.loop.rollouts == found.total.rollouts - sealed[0].rollouts
