"""What an update is trained from: the recorded trajectories of an evaluation, and their groups."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from bascule.plugins.algorithm import Group, Sample, Turn
from bascule.runtime.log.blobs import Blobs
from bascule.runtime.log.protocol import EventLog
from bascule.runtime.state import Evaluation
from bascule.schemas import subjects
from bascule.schemas.codec import canonical
from bascule.schemas.errors import Corrupt, NotFound, TrainError
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.trajectory import ModelCall, Scored, Trajectory, unpack_floats, unpack_ids


class Records(Protocol):
    """A run's events and blobs."""

    @property
    def run(self) -> str: ...

    @property
    def log(self) -> EventLog: ...

    @property
    def blobs(self) -> Blobs: ...


async def load_trajectories(records: Records, evaluation: Evaluation) -> dict[str, Trajectory]:
    """The recorded trajectories of an evaluation, by id, from the log and its blobs.

    Raises:
        TrainError: one of them is not there any more.
        Corrupt: one of them is not what was recorded.
    """
    name = evaluation.request.evaluation
    found: dict[str, Trajectory] = {}

    async def one(trajectory: str) -> None:
        recorded = await records.log.get(subjects.trajectory_logged(records.run, trajectory))
        if recorded is None or not isinstance(recorded.data, TrajectoryLogged):
            raise TrainError(f"The trajectory {trajectory} is scored but not in the log.", next_step=_VERIFY)
        found[trajectory] = await _body(records, recorded.data)

    ids = [subjects.trajectory_id(name, *key) for key in evaluation.trajectories()]
    for i in range(0, len(ids), 64):
        await asyncio.gather(*(one(t) for t in ids[i : i + 64]))
    return {t: found[t] for t in sorted(found)}


async def _body(records: Records, logged: TrajectoryLogged) -> Trajectory:
    """The steps of a logged trajectory, inline or from its blob."""
    if logged.body is not None:
        return logged.body
    assert logged.blob is not None
    try:
        return msgspec.json.decode(await records.blobs.get(logged.blob), type=Trajectory)
    except NotFound as e:
        raise TrainError(f"The trajectory {logged.trajectory} is gone: {e.message}", next_step=e.next_step) from e
    except Corrupt as e:
        raise Corrupt(f"The trajectory {logged.trajectory} is altered: {e.message}", next_step=e.next_step) from e


def data_digest(trajectories: Mapping[str, Trajectory]) -> str:
    """Digest of what an update was trained from: ids and steps of the trajectories.

    Adapters are left out: their names hold that of the run, and digests of runs are compared.
    """
    h = hashlib.blake2b(digest_size=16)
    for name, trajectory in sorted(trajectories.items()):
        steps = [msgspec.structs.replace(s, adapter=None) if isinstance(s, ModelCall) else s for s in trajectory.steps]
        h.update(name.encode() + b"\0" + canonical(msgspec.structs.replace(trajectory, steps=tuple(steps))))
    return h.hexdigest()


def groups_of(evaluation: Evaluation, trajectories: Mapping[str, Trajectory]) -> list[Group]:
    """The trajectories of an evaluation with their verdicts, by example, as credit assignment sees them.

    Raises:
        TrainError: a verdict has step rewards, and not one for each model call.
    """
    samples: dict[int, list[Sample]] = {}
    for position, sample in sorted(evaluation.trajectories()):
        name = subjects.trajectory_id(evaluation.request.evaluation, position, sample)
        verdict = evaluation.verdicts[position, sample]
        scored = verdict if isinstance(verdict, Scored) else None
        turns = _turns(name, trajectories[name], scored.steps if scored else ())
        samples.setdefault(position, []).append(
            Sample(
                trajectory=name,
                reward=scored.reward if scored else None,
                passed=scored.passed if scored else None,
                tokens=sum(len(t.token_ids) for t in turns),
                turns=turns,
            )
        )
    examples = evaluation.examples
    return [Group(example=examples[p], samples=tuple(s)) for p, s in samples.items()]


def _turns(name: str, trajectory: Trajectory, rewards: Sequence[float]) -> tuple[Turn, ...]:
    """The sampled outputs in the order of time; a call's step reward stands at its last output."""
    calls = [s for s in trajectory.steps if isinstance(s, ModelCall)]
    if rewards and len(rewards) != len(calls):
        raise TrainError(
            f"The verdict on the trajectory {name} has {len(rewards)} step rewards, and its episode made "
            f"{len(calls)} model calls.",
            next_step="The task's verifier is to give one for each call, or none.",
        )
    turns = []
    for number, call in enumerate(calls):
        for output in call.outputs:
            ids, behaviour = unpack_ids(output.token_ids), unpack_floats(output.logprobs)
            known = len(behaviour) == len(ids) and all(map(math.isfinite, behaviour))
            turns.append(
                Turn(
                    token_ids=tuple(ids),
                    behaviour=tuple(behaviour) if known else (),
                    truncated=output.finish_reason == "length",
                    reward=rewards[number] if rewards and output is call.outputs[-1] else None,
                )
            )
    return tuple(turns)


def mean_reward(evaluation: Evaluation) -> float:
    """Of the scored trajectories; 0 if there is none."""
    rewards = [v.reward for v in evaluation.verdicts.values() if isinstance(v, Scored)]
    return sum(rewards) / len(rewards) if rewards else 0.0


_VERIFY = "`bascule verify RUN` says what else is missing."
