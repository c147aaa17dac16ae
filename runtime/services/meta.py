"""meta: turns a run's start into its first harness: the one that was given, or the task's reference code."""

from __future__ import annotations

from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.services import proposals
from bascule.runtime.state import RunState
from bascule.runtime.world import World
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft, Recorded
from bascule.schemas.errors import HarnessError
from bascule.schemas.events import HarnessProposed, RunFailed, RunStarted
from bascule.schemas.harness import make_harness

NAME = "meta"


def decide(state: RunState, event: Recorded, world: World) -> list[Draft]:
    """RunStarted: the first harness, the first candidate and its episodes."""
    if not isinstance(event.data, RunStarted):
        return []
    cause = event.envelope.id

    given = event.data.config.harness

    def failed(why: object) -> list[Draft]:
        whose = "that was given" if given else f"of the task {world.task.name}"
        data = RunFailed(service=NAME, reason=f"The first harness {whose} is not usable. {why}")
        return [Draft(subject=subjects.run_end(state.run), step=0, cause=cause, data=data)]

    try:
        harness = make_harness(world.redaction.value(given or world.task.harness()))
    except HarnessError as e:
        return failed(e)
    if (refused := refusal(harness.manifest, world.public)) is not None:
        return failed(refused)
    author = "given" if given else "reference"
    proposed = HarnessProposed(generation=0, digest=harness.digest, files=harness.files, author=author, edit=author)
    return [
        Draft(subject=subjects.harness_outcome(state.run, 0), step=0, cause=cause, data=proposed),
        *proposals.candidate(
            state,
            world,
            generation=0,
            harness=harness.digest,
            adapter=None,
            parent=None,
            lever=None,
            algorithm=None,
            cause=cause,
        ),
    ]
