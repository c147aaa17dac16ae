"""What one run of an arm came to, folded from its events."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from bascule.runtime.services.budgets import spent
from bascule.runtime.spending import total
from bascule.runtime.state import RunState
from bascule.schemas import events as ev
from bascule.schemas.envelope import Recorded
from bascule.schemas.trajectory import Scored


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """Episodes, trials included; tokens, theirs and of the policy's and author's calls; seconds of services' work."""

    rollouts: float
    tokens: float
    seconds: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A completed run.

    Attributes:
        dev: of the first harness and of the best candidate.
        items: examples of the sealed split.
        before, after: reward of each item under the first harness and under the best candidate; 0 without a verdict.
        tokens: that an item takes under the best candidate.
        loop: what budgets are held against; ``levers`` is its part of each lever, ``sealed`` what came after the stop.
        algorithms: of the generations that pulled the weights.
        promoted: levers of the promoted candidates after the first.
        code: hash of the Bascule that the run is pinned to.
        oracle: reward of each item if the best of its samples were known, where that was asked for.
    """

    arm: str
    seed: int
    run: str
    dev: tuple[float, float]
    items: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    tokens: float
    loop: Spending
    levers: dict[str, Spending]
    sealed: Spending
    algorithms: tuple[str, ...]
    promoted: tuple[str, ...]
    code: str
    oracle: tuple[float, ...] | None = None


class Folder:
    """Folds a run's events, one by one, into its outcome.

    Attributes:
        logged: trajectories of the sealed split under the best candidate, by position, once the run is completed.
    """

    def __init__(self, run: str) -> None:
        self.state = RunState(run=run)
        self._logged: dict[tuple[str, int], ev.TrajectoryLogged] = {}
        self._rewards: dict[tuple[str, int], float] = {}

    def add(self, event: Recorded) -> None:
        """Take the run's next event."""
        self.state.apply(event)
        data = event.data
        if not (isinstance(data, ev.TrajectoryLogged | ev.TrajectoryScored) and data.evaluation.endswith("-sealed")):
            return
        key = data.evaluation, data.position
        if isinstance(data, ev.TrajectoryLogged):
            self._logged.setdefault(key, data)
        else:
            self._rewards.setdefault(key, data.verdict.reward if isinstance(data.verdict, Scored) else 0.0)

    @property
    def logged(self) -> dict[int, ev.TrajectoryLogged]:
        assert isinstance(self.state.end, ev.RunCompleted)
        name = f"g{self.state.end.best:02d}-sealed"
        return {position: data for (of, position), data in sorted(self._logged.items()) if of == name}

    def outcome(self, arm: str, oracle: Mapping[int, float] | None = None) -> Outcome:
        """The outcome of the run, which is completed.

        Args:
            oracle: the best reward among an item's samples, by position.
        """
        state, end = self.state, self.state.end
        assert isinstance(end, ev.RunCompleted)
        assert state.started is not None
        logged = self.logged
        history = {g.generation: g for g in state.history()}
        dev = [figures.score if (figures := history[g].gate) is not None else 0.0 for g in (0, end.best)]
        weights = [s.lever for s in state.steps.values() if s.lever is not None and s.lever.lever == "weights"]
        after_stop = total(s for (_, part, _), s in state.spending.items() if part == "stop")
        return Outcome(
            arm=arm,
            seed=state.config.seed,
            run=state.run,
            dev=(dev[0], dev[1]),
            items=tuple(data.example for data in logged.values()),
            before=self._of("g00-sealed", logged),
            after=self._of(f"g{end.best:02d}-sealed", logged),
            tokens=sum(d.prompt_tokens + d.output_tokens for d in logged.values()) / max(1, len(logged)),
            loop=_spending(spent(state)),
            levers={lever: _spending(spent(state, lever)) for lever in state.config.levers},
            sealed=Spending(rollouts=after_stop.rollouts, tokens=after_stop.tokens, seconds=after_stop.seconds),
            algorithms=tuple(lever.algorithm for lever in weights if lever.algorithm is not None),
            promoted=tuple(
                g.lever for n, g in sorted(history.items()) if n and g.outcome == "promoted" and g.lever is not None
            ),
            code=next((p.hash for p in state.started.plugins if (p.kind, p.name) == ("runtime", "bascule")), ""),
            oracle=None if oracle is None else tuple(oracle.get(position, 0.0) for position in logged),
        )

    def _of(self, evaluation: str, logged: Mapping[int, ev.TrajectoryLogged]) -> tuple[float, ...]:
        return tuple(self._rewards.get((evaluation, position), 0.0) for position in logged)


def _spending(figures: Mapping[str, float]) -> Spending:
    return Spending(rollouts=figures["rollouts"], tokens=figures["tokens"], seconds=figures["seconds"])
