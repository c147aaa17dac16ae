"""The tool ``read_trajectory``: a recorded episode on train as text, for a policy or an author that thinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from bascule.plugins.policy import Performed
from bascule.schemas import subjects
from bascule.schemas.errors import ConfigError, NotFound
from bascule.schemas.events import TrajectoryLogged, TrajectoryScored
from bascule.schemas.trajectory import ModelCall, Note, Scored, Trajectory, Verdict
from bascule.schemas.trajectory import Step as EpisodeStep

if TYPE_CHECKING:
    from bascule.runtime.runner import View

#: Characters that are told of one episode.
MOST = 16_000


async def read_trajectory(view: View, arguments: dict[str, Any]) -> Performed:
    """Make the call ``read_trajectory``; what must not be read, or is not there, is the call's error.

    Only episodes on train are told of: what an episode on dev or sealed did would tell of its items.

    Raises:
        BasculeError: the blob that an event names is not there or damaged.
    """
    name = arguments.get("trajectory")
    evaluation = view.state.evaluations.get(name.rsplit("-", 2)[0]) if isinstance(name, str) else None
    if not isinstance(name, str) or evaluation is None or evaluation.request.split != "train":
        return _refused(f"There is no trajectory {name!r} on train.")
    if view.world.public.restricted:
        return _refused("The items of this task must not be published, so its trajectories are not shown.")
    try:
        there = await view.log.get(subjects.trajectory_logged(view.run, name))
        verdict = await view.log.get(subjects.trajectory_scored(view.run, name))
    except ConfigError:  # no name of a trajectory
        there = verdict = None
    if there is None or not isinstance(there.data, TrajectoryLogged):
        return _refused(f"There is no trajectory {name!r} on train.")
    logged = there.data
    body = logged.body
    if body is None and logged.blob is not None:
        try:
            body = msgspec.json.decode(await view.blobs.get(logged.blob), type=Trajectory)
        except NotFound:
            return _refused(f"What {name!r} did is not kept any more.")
    scored = verdict.data.verdict if verdict is not None and isinstance(verdict.data, TrajectoryScored) else None
    question = view.world.public.train[logged.position].input
    return Performed(answer={"result": told(question, body or Trajectory(answer=logged.answer), scored)})


def told(question: dict[str, Any], episode: Trajectory, verdict: Verdict | None) -> str:
    """An episode as text, at most ``MOST`` characters: its middle is left out where it is longer."""
    lines = [f"example: {msgspec.json.encode(question).decode()}", *(_line(step) for step in episode.steps)]
    if episode.error is not None:
        lines.append(f"error ({episode.error.kind}): {episode.error.message}")
    lines.append(f"answer: {episode.answer!r}")
    if isinstance(verdict, Scored):
        lines.append(f"reward: {verdict.reward:g}" + ("" if verdict.well_formed else ", not well formed"))
    elif verdict is not None:
        lines.append(f"no verdict: {verdict.reason}")
    text = "\n".join(lines)
    if len(text) <= MOST:
        return text
    half = MOST // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _line(step: EpisodeStep) -> str:
    match step:
        case ModelCall():
            return "\n".join(f"model ({o.finish_reason}): {o.text!r}" for o in step.outputs)
        case Note():
            return f"note: {step.text}"
        case _:
            return f"tool {step.name}({step.arguments}): {step.error or step.result}"


def _refused(why: str) -> Performed:
    return Performed(answer={"error": why})
