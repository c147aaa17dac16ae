"""From credited trajectories to micro-batches of token trees.

Tokens in, tokens out: rows are made of the recorded ids and log-probabilities; text is never tokenised again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bascule.plugins.algorithm import Component, Credit
from bascule.schemas.errors import TrainError
from bascule.schemas.trajectory import ModelCall, Trajectory, unpack_floats, unpack_ids
from bascule.trainers.params import TrainParams
from bascule.trainers.tree import TokenTree, build_tree, pack

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

#: The components in the order of their codes in :attr:`MicroBatch.component`.
COMPONENTS: tuple[Component, ...] = ("policy", "reinforce", "imitation", "pair", "own")
#: Those that compare the policy with the sampler, whose log-probabilities they need.
WITH_RATIO: tuple[Component, ...] = ("policy", "reinforce", "own")


@dataclass(frozen=True)
class Row:
    """One training sequence of a trajectory.

    Attributes:
        tokens: prompt, sampled tokens and, between the turns of a conversation, what the environment said.
        trained: positions in ``tokens`` of the sampled tokens, ascending, none of them 0.
        places: of each of ``trained`` among the trajectory's sampled tokens, in the order of time.
        behaviour: the sampler's log-probability at each of ``trained``; NaN where it was not recorded.
        temperature: that the logits are divided by.
    """

    tokens: tuple[int, ...]
    trained: tuple[int, ...]
    places: tuple[int, ...]
    behaviour: tuple[float, ...]
    temperature: float


@dataclass(frozen=True)
class Share:
    """A trajectory's part in the loss of one optimiser step.

    Attributes:
        trajectory: its id.
        rows: its training sequences, together T sampled tokens.
        component: of the loss.
        advantage: [T] in the order of time; a weight >= 0 for ``imitation`` and ``pair``.
        returns: [T] what the critic is to predict, NaN where nothing.
        weight: of each token in the optimiser step, see :func:`weighed`.
        value_weight: the same in the critic's loss.
    """

    trajectory: str
    rows: tuple[Row, ...]
    component: Component
    advantage: Floats
    returns: Floats
    weight: float = 0.0
    value_weight: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.advantage)


Unit = tuple[Share, ...]  # what a loss couples, and is computed together: one trajectory, or the two of a pair


@dataclass(frozen=True)
class MicroBatch:
    """A tree of rows and, flat over their M sampled tokens, what the losses need.

    Attributes:
        tree: all rows; leaves that only end a row are left out, since nothing is predicted from them.
        read: [U] distinct nodes that a sampled token is predicted from.
        temperature: [U] of the token predicted there; a node read at two temperatures stands twice.
        source: [M] index into ``read`` for each sampled token, ascending.
        target: [M] the token's id.
        behaviour: [M] the sampler's log-probabilities, NaN where unknown.
        advantage: [M].
        returns: [M] NaN where the critic learns nothing.
        weight: [M] share in the optimiser step.
        value_weight: [M] share in the critic's loss.
        component: [M] index into :data:`COMPONENTS`.
        sequence: [M] which of the component's trajectories a token is of, from 0; of pair k they are 2k and 2k + 1.
        trajectory: [M] index into ``trajectories``.
        place: [M] of the token among its trajectory's sampled tokens, in the order of time.
        trajectories: ids.
    """

    tree: TokenTree
    read: Ints
    temperature: Floats
    source: Ints
    target: Ints
    behaviour: Floats
    advantage: Floats
    returns: Floats
    weight: Floats
    value_weight: Floats
    component: Ints
    sequence: Ints
    trajectory: Ints
    place: Ints
    trajectories: tuple[str, ...]


@dataclass
class _Open:
    tokens: list[int]
    temperature: float
    trained: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    behaviour: list[float] = field(default_factory=list)


def trajectory_rows(name: str, trajectory: Trajectory) -> tuple[Row, ...]:
    """The training sequences of one trajectory.

    A turn continues an earlier row where its prompt starts with exactly the tokens that the row holds, so that what
    the environment added is context and not trained; otherwise it starts a new row. Each output of a call is trained
    once.

    Raises:
        TrainError: a prompt is empty.
    """
    rows: list[_Open] = []
    place = 0
    for call in (s for s in trajectory.steps if isinstance(s, ModelCall)):
        prompt = unpack_ids(call.prompt_ids)
        if not prompt:
            raise TrainError(f"Trajectory {name} has a model call with an empty prompt.")
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
            row.places += range(place, place + len(ids))
            row.behaviour += _logprobs(output.logprobs, len(ids))
            row.tokens += ids
            place += len(ids)
    return tuple(
        Row(tuple(r.tokens), tuple(r.trained), tuple(r.places), tuple(r.behaviour), r.temperature)
        for r in rows
        if r.trained
    )


def check_ids(trajectories: Mapping[str, Trajectory], vocabulary: int) -> None:
    """Refuse tokens that the model does not have.

    Args:
        trajectories: by id.
        vocabulary: number of the model's tokens.

    Raises:
        TrainError: an id of a prompt or an output is not among them.
    """
    for name, trajectory in trajectories.items():
        for call in (s for s in trajectory.steps if isinstance(s, ModelCall)):
            for data in (call.prompt_ids, *(o.token_ids for o in call.outputs)):
                ids = np.frombuffer(data, dtype="<i4")
                if foreign := ids[(ids < 0) | (ids >= vocabulary)].tolist():
                    raise TrainError(
                        f"Trajectory {name} has the token id {foreign[0]}, and the base model has {vocabulary} tokens.",
                        next_step="Check that the engine samples from this base model, with its tokenizer.",
                    )


def units_of(credit: Sequence[Credit], trajectories: Mapping[str, Trajectory]) -> list[Unit]:
    """What is trained on, in an order that does not depend on the order given; what has no sampled token is left out.

    Raises:
        TrainError: a credit names a trajectory that is not there, or does not fit it; an advantage is not finite or,
            where it is a weight, negative; a log-probability that the loss needs is missing or not finite.
    """
    units: list[Unit] = []
    for one in sorted(credit, key=lambda c: (c.trajectory, c.component, c.rejected or "")):
        if one.component not in COMPONENTS or (one.rejected is None) == (one.component == "pair"):
            raise TrainError(f"Trajectory {one.trajectory} has a credit of the form {one.component}.")
        names = [one.trajectory] if one.rejected is None else [one.trajectory, one.rejected]
        unit = tuple(_share(name, one, trajectories) for name in names)
        if all(share.tokens for share in unit):
            units.append(unit)
    return units


def probes(trajectories: Mapping[str, Trajectory]) -> list[Unit]:
    """All trajectories, to compute something of every sampled token; they weigh nothing."""
    units: list[Unit] = []
    for name in sorted(trajectories):
        rows = trajectory_rows(name, trajectories[name])
        tokens = sum(len(r.trained) for r in rows)
        if tokens:
            units.append((Share(name, rows, "imitation", np.zeros(tokens), np.full(tokens, np.nan)),))
    return units


def split(units: Sequence[Unit], parts: int, group_of: Mapping[str, str]) -> list[list[Unit]]:
    """Split a pass into at most ``parts`` optimiser steps of about equally many groups.

    Args:
        units: in their order.
        parts: wanted.
        group_of: the group of each trajectory; a group stays in one part.
    """
    names = sorted({group_of[u[0].trajectory] for u in units})
    parts = min(parts, len(names)) or 1
    part_of = {name: i * parts // len(names) for i, name in enumerate(names)}
    return [[u for u in units if part_of[group_of[u[0].trajectory]] == i] for i in range(parts)] if names else []


def weighed(units: Sequence[Unit], params: TrainParams) -> list[Unit]:
    """Give every token its weight in the optimiser step that these units make up.

    Every component has one denominator over all of them: for ``imitation`` the sum of its tokens' advantages (1 if that
    is less), for ``pair`` the number of pairs, for the others what ``loss_type`` says (see :class:`TrainParams`); for
    the critic the number of tokens with a return.
    """
    shares = [s for u in units for s in u]
    tokens: Counter[str] = Counter()
    for s in shares:
        tokens[s.component] += s.tokens
    numbers = Counter(s.component for s in shares)
    imitated = math.fsum(float(s.advantage.sum()) for s in shares if s.component == "imitation")
    learned = sum(int(np.isfinite(s.returns).sum()) for s in shares)

    def weight(s: Share) -> float:
        match s.component, params.loss_type:
            case "imitation", _:
                return 1 / max(imitated, 1.0)
            case "pair", _:
                return 2 / numbers["pair"]
            case _, "grpo":
                return 1 / (s.tokens * numbers[s.component])
            case _, "dr_grpo":
                return 1 / (params.max_completion_length * numbers[s.component])
            case _:
                return 1 / tokens[s.component]

    return [tuple(replace(s, weight=weight(s), value_weight=1 / max(learned, 1)) for s in u) for u in units]


def micro_batches(units: Sequence[Unit], max_nodes: int) -> list[MicroBatch]:
    """Pack units into trees of at most ``max_nodes`` nodes; rows that share a prefix share its nodes.

    A unit is never split, so one that is larger stands alone.
    """
    inputs = [[r.tokens[: r.trained[-1]] for share in unit for r in share.rows] for unit in units]
    return [
        _micro_batch([units[i] for i in chosen], [x for i in chosen for x in inputs[i]])
        for chosen in pack(inputs, max_nodes)
    ]


def sampled_logprobs(units: Sequence[Unit]) -> dict[str, Floats]:
    """[T] the sampler's log-probabilities of each trajectory's tokens, in the order of time; NaN where unknown."""
    found: dict[str, Floats] = {}
    for share in (share for unit in units for share in unit):
        known = found[share.trajectory] = np.full(share.tokens, np.nan)
        for row in share.rows:
            known[list(row.places)] = row.behaviour
    return found


def gathered(values: Mapping[str, Floats], batch: MicroBatch) -> Floats:
    """[M] per-token values of a micro-batch from those of whole trajectories, in the order of time."""
    starts = np.cumsum([0, *(len(values[t]) for t in batch.trajectories[:-1])])
    flat = np.concatenate([values[t] for t in batch.trajectories])
    return np.asarray(flat[starts[batch.trajectory] + batch.place], dtype=np.float64)


def scattered(batches: Sequence[MicroBatch], values: Sequence[Floats]) -> dict[str, Floats]:
    """The inverse of :func:`gathered`: [..., T] values of whole trajectories from [..., M] of micro-batches."""
    lengths: dict[str, int] = {}
    for batch in batches:
        tokens = np.bincount(batch.trajectory, minlength=len(batch.trajectories))
        lengths |= zip(batch.trajectories, tokens.tolist(), strict=True)
    figures = values[0].shape[:-1] if values else ()
    out = {name: np.full((*figures, n), np.nan) for name, n in lengths.items()}
    for batch, flat in zip(batches, values, strict=True):
        for t, name in enumerate(batch.trajectories):
            mine = batch.trajectory == t
            out[name][..., batch.place[mine]] = flat[..., mine]
    return out


def _share(name: str, credit: Credit, trajectories: Mapping[str, Trajectory]) -> Share:
    if name not in trajectories:
        raise TrainError(f"Credit was given to trajectory {name}, which is not in the batch.")
    rows = trajectory_rows(name, trajectories[name])
    tokens = sum(len(r.trained) for r in rows)
    advantage = _stream(name, "advantage", credit.advantage, tokens)
    if not np.isfinite(advantage).all() or (credit.component in ("imitation", "pair") and (advantage < 0).any()):
        raise TrainError(f"Trajectory {name} has the {credit.component} credit {credit.advantage}.")
    if credit.component in WITH_RATIO and any(math.isnan(x) for r in rows for x in r.behaviour):
        raise TrainError(
            f"Trajectory {name} lacks log-probabilities, or has some that are not finite, for {tokens} sampled tokens.",
            next_step="Choose an algorithm that does not require behaviour_logprobs, or an engine that records them.",
        )
    if credit.returns is None:
        returns = np.full(tokens, np.nan)
    else:
        returns = _stream(name, "returns", credit.returns, tokens)
        if not np.isfinite(returns).all():
            raise TrainError(f"Trajectory {name} has returns that are not finite.")
    return Share(name, rows, credit.component, advantage, returns)


def _stream(name: str, what: str, values: float | tuple[float, ...], tokens: int) -> Floats:
    if not isinstance(values, tuple):
        return np.full(tokens, float(values))
    if len(values) != tokens:
        raise TrainError(f"Trajectory {name} has {len(values)} numbers in {what} for {tokens} sampled tokens.")
    return np.asarray(values, dtype=np.float64)


def _logprobs(packed: bytes, count: int) -> list[float]:
    values = unpack_floats(packed)
    return values if len(values) == count and all(map(math.isfinite, values)) else [math.nan] * count


def _rows(units: Sequence[Unit]) -> Iterator[tuple[int, int, Share, Row]]:
    """Every row with its trajectory's place in the micro-batch and in its component."""
    seen: Counter[str] = Counter()
    trajectory = 0
    for unit in units:
        for share in unit:
            for row in share.rows:
                yield trajectory, seen[share.component], share, row
            seen[share.component] += 1
            trajectory += 1


def _micro_batch(units: Sequence[Unit], inputs: Sequence[tuple[int, ...]]) -> MicroBatch:
    tree = build_tree(inputs)
    rows = list(_rows(units))
    counts = [len(r.trained) for *_, r in rows]
    node = np.concatenate([p[np.asarray(r.trained) - 1] for (*_, r), p in zip(rows, tree.paths, strict=True)])
    temperature = np.repeat([r.temperature for *_, r in rows], counts)
    order = np.lexsort((temperature, node))
    pairs, source = np.unique(np.stack([node, temperature])[:, order], axis=1, return_inverse=True)

    def tokens(values: Iterator[Sequence[float] | Ints | Floats]) -> npt.NDArray[Any]:
        return np.concatenate([np.asarray(v) for v in values])[order]

    def repeated(values: Iterator[float]) -> npt.NDArray[Any]:
        return np.repeat(np.asarray(list(values)), counts)[order]

    return MicroBatch(
        tree=tree,
        read=pairs[0].astype(np.int64),
        temperature=pairs[1],
        source=source.astype(np.int64),
        target=tokens(np.asarray(r.tokens)[list(r.trained)] for *_, r in rows),
        behaviour=tokens(r.behaviour for *_, r in rows),
        advantage=tokens(s.advantage[list(r.places)] for _, _, s, r in rows),
        returns=tokens(s.returns[list(r.places)] for _, _, s, r in rows),
        weight=repeated(s.weight for _, _, s, _ in rows),
        value_weight=repeated(s.value_weight for _, _, s, _ in rows),
        component=repeated(COMPONENTS.index(s.component) for _, _, s, _ in rows),
        sequence=repeated(n for _, n, _, _ in rows),
        trajectory=repeated(t for t, *_ in rows),
        place=tokens(np.asarray(r.places) for *_, r in rows),
        trajectories=tuple(share.trajectory for unit in units for share in unit),
    )
