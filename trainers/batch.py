"""From recorded trajectories to micro-batches of token trees.

Tokens in, tokens out: rows are made of the recorded ids and log-probabilities; text is never tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from bascule.plugins.algorithm import Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import ModelCall, Trajectory, unpack_floats, unpack_ids
from bascule.trainers.tree import TokenTree, build_tree, pack

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One training sequence.

    Attributes:
        trajectory: id of the trajectory it comes from.
        tokens: prompt, sampled tokens and, between the turns of a conversation, what the environment said.
        trained: positions in ``tokens`` of the sampled tokens, ascending, none of them 0.
        behaviour: the sampler's log-probability at each of ``trained``; NaN where it was not recorded.
        temperature: that the logits are divided by.
        component: loss component.
        advantage: of every trained token.
    """

    trajectory: str
    tokens: tuple[int, ...]
    trained: tuple[int, ...]
    behaviour: tuple[float, ...]
    temperature: float
    component: Literal["policy", "imitation"]
    advantage: float


@dataclass(frozen=True)
class MicroBatch:
    """A tree of rows and, flat over their trained tokens, what the losses need.

    Attributes:
        tree: all rows; leaves that only end a row are left out, since nothing is predicted from them.
        read: [U] distinct nodes that a trained token is predicted from.
        temperature: [U] of the token predicted there; a node read at two temperatures stands twice.
        source: [M] index into ``read`` for each trained token, ascending.
        target: [M] the token's id.
        behaviour: [M] the sampler's log-probabilities, NaN where unknown.
        advantage: [M].
        policy: [M] true where the component is ``policy``, false where it is ``imitation``.
    """

    tree: TokenTree
    read: Ints
    temperature: Floats
    source: Ints
    target: Ints
    behaviour: Floats
    advantage: Floats
    policy: Bools


@dataclass
class _Open:
    tokens: list[int]
    temperature: float
    trained: list[int] = field(default_factory=list)
    behaviour: list[float] = field(default_factory=list)


def trajectory_rows(credit: Credit, trajectory: Trajectory) -> list[Row]:
    """The training sequences of one trajectory.

    A turn continues an earlier row where its prompt starts with exactly the tokens that the row holds, so that what
    the environment added is context and not trained; otherwise it starts a new row. Each output of a call is trained
    once.

    Raises:
        TrainError: a policy credit meets a call without log-probabilities, a log-probability is not finite, or a
            prompt is empty.
    """
    rows: list[_Open] = []
    for call in (s for s in trajectory.steps if isinstance(s, ModelCall)):
        prompt = unpack_ids(call.prompt_ids)
        if not prompt:
            raise TrainError(f"Trajectory {credit.trajectory} has a model call with an empty prompt.")
        temperature = call.sampling.temperature or 1.0  # greedy calls record log-probabilities at temperature 1
        parents = [
            r for r in rows if r.temperature == temperature and prompt[: len(r.tokens)] == r.tokens and r.trained
        ]
        parent = max(parents, key=lambda r: len(r.tokens), default=None)
        for output in call.outputs:
            ids = unpack_ids(output.token_ids)
            row, parent = parent, None
            if row is None:
                rows.append(row := _Open(list(prompt), temperature))
            else:
                row.tokens += prompt[len(row.tokens) :]
            row.trained += range(len(row.tokens), len(row.tokens) + len(ids))
            row.behaviour += _logprobs(credit, output.logprobs, len(ids))
            row.tokens += ids
    return [
        Row(
            trajectory=credit.trajectory,
            tokens=tuple(r.tokens),
            trained=tuple(r.trained),
            behaviour=tuple(r.behaviour),
            temperature=r.temperature,
            component=credit.component,
            advantage=credit.advantage,
        )
        for r in rows
        if r.trained
    ]


def batch_rows(credit: Sequence[Credit], trajectories: Mapping[str, Trajectory]) -> list[Row]:
    """Rows of all credited trajectories, in an order that does not depend on the order given.

    Raises:
        TrainError: a credit names a trajectory that is not there, its advantage is not finite or, for imitation, is
            negative; or as :func:`trajectory_rows`.
    """
    rows: list[Row] = []
    for one in sorted(credit, key=lambda c: (c.trajectory, c.component)):
        if one.trajectory not in trajectories:
            raise TrainError(f"Credit was given to trajectory {one.trajectory}, which is not in the batch.")
        if not math.isfinite(one.advantage) or (one.component == "imitation" and one.advantage < 0):
            raise TrainError(f"Trajectory {one.trajectory} has the {one.component} credit {one.advantage}.")
        rows += trajectory_rows(one, trajectories[one.trajectory])
    return rows


def denominators(rows: Sequence[Row]) -> tuple[float, float]:
    """Global denominators: the number of policy tokens, and the sum of the weights of imitation tokens."""
    policy = sum(len(r.trained) for r in rows if r.component == "policy")
    imitation = sum(len(r.trained) * r.advantage for r in rows if r.component == "imitation")
    return float(policy), float(imitation)


def micro_batches(rows: Sequence[Row], max_nodes: int) -> list[MicroBatch]:
    """Pack rows into trees of at most ``max_nodes`` nodes; rows that share a prefix share its nodes."""
    rows = [r for r in rows if r.trained]
    inputs = [r.tokens[: r.trained[-1]] for r in rows]
    return [_micro_batch([rows[i] for i in chosen], [inputs[i] for i in chosen]) for chosen in pack(inputs, max_nodes)]


def _micro_batch(rows: Sequence[Row], inputs: Sequence[tuple[int, ...]]) -> MicroBatch:
    tree = build_tree(inputs)
    counts = [len(r.trained) for r in rows]
    node = np.concatenate([path[np.asarray(r.trained) - 1] for r, path in zip(rows, tree.paths, strict=True)])
    temperature = np.repeat([r.temperature for r in rows], counts)
    order = np.lexsort((temperature, node))
    pairs, source = np.unique(np.stack([node, temperature])[:, order], axis=1, return_inverse=True)
    return MicroBatch(
        tree=tree,
        read=pairs[0].astype(np.int64),
        temperature=pairs[1],
        source=source.astype(np.int64),
        target=np.concatenate([np.asarray(r.tokens, dtype=np.int64)[list(r.trained)] for r in rows])[order],
        behaviour=np.concatenate([np.asarray(r.behaviour, dtype=np.float64) for r in rows])[order],
        advantage=np.repeat(np.asarray([r.advantage for r in rows], dtype=np.float64), counts)[order],
        policy=np.repeat([r.component == "policy" for r in rows], counts)[order],
    )


def _logprobs(credit: Credit, packed: bytes, count: int) -> list[float]:
    values = unpack_floats(packed)
    if len(values) == count and all(map(math.isfinite, values)):
        return values
    if credit.component == "imitation":  # imitation has no ratio, so samples of any origin will do
        return [math.nan] * count
    raise TrainError(
        f"Trajectory {credit.trajectory} has {len(values)} log-probabilities, or some that are not finite, for {count} "
        "sampled tokens.",
        next_step="Choose an algorithm that does not require behaviour_logprobs, or an engine that records them.",
    )
