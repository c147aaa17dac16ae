"""The gate's place in the loop: what it asks for before it judges a candidate, and what it is given.

First dev and train. A candidate that dev would promote is then asked dev in another form, and the regression set, as
far as the run and its task have them; only then is it promoted, so that what is rejected anyway costs no more. Whatever
has become the parent was measured on these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bascule.runtime.services.proposals import dev_positions, evaluated
from bascule.runtime.state import RunState
from bascule.runtime.world import World, seed_of, seeded
from bascule.schemas import subjects
from bascule.schemas.envelope import Draft
from bascule.schemas.events import CandidatePromoted, CandidateRejected, GateFigures
from bascule.verifiers.checks import Rewards
from bascule.verifiers.gate import gate, gate_version, reported_score

PERTURBED, REGRESSION = "perturbed", "regression"


def judge(state: RunState, world: World, generation: int, cause: str) -> list[Draft]:
    """The gate's verdict, once all evaluations of the generation are completed, whichever came last.

    Returns:
        Or the requests for what else it takes to promote; or nothing, while something is not completed or the verdict
        is there.
    """
    step = state.steps.get(generation)
    if step is None or step.candidate is None or step.gate is not None:
        return []
    case = _Case(state, world, generation, state.best)
    if not case.completed([case.dev, f"{case.name}-train", *([case.parents_dev] if case.parent is not None else [])]):
        return []
    promote, figures = case.judged([])
    if promote:
        parts = case.parts()
        missing = [draft for part in parts for draft in case.missing(part, cause)]
        if missing or not case.completed([name for part in parts for name, _ in case.both(part)]):
            return missing
        promote, figures = case.judged(parts)
    return [case.verdict(promote, figures, cause)]


@dataclass(frozen=True)
class _Case:
    """A candidate before the gate, and the parent that it is held against; None for the first one."""

    state: RunState
    world: World
    generation: int
    parent: int | None

    @property
    def name(self) -> str:
        return f"g{self.generation:02d}"

    @property
    def dev(self) -> str:
        return f"{self.name}-dev"

    @property
    def parents_dev(self) -> str:
        """The parent's evaluation over the same examples of dev."""
        return f"{self.name}-parent" if self.fresh else f"g{self.parent:02d}-dev"

    @property
    def fresh(self) -> bool:
        """Whether each generation has examples of dev to itself."""
        return bool(self.world.config.evaluation.fresh_dev)

    def completed(self, names: Sequence[str]) -> bool:
        found = [self.state.evaluations.get(name) for name in names]
        return all(e is not None and e.completed is not None for e in found)

    def rewards(self, name: str, *, second: bool = False) -> list[float | None]:
        return [r[0] for r in self.state.evaluations[name].rewards(second=second).values()]

    def cost(self, name: str) -> float:
        """Tokens a rollout."""
        completed = self.state.evaluations[name].completed
        assert completed is not None
        return completed.landscape.prompt_tokens + completed.landscape.output_tokens

    def parts(self) -> list[str]:
        """What else is measured of a candidate that dev would promote."""
        config = self.world.config
        if config.gate.version == 1:
            return []
        perturbed = [PERTURBED] if config.evaluation.perturbed else []
        return [*perturbed, *([REGRESSION] if self.world.public.regression else [])]

    def both(self, part: str) -> list[tuple[str, int]]:
        """The evaluations of a part by name, and whose they are: the candidate's, and its parent's."""
        own = (f"{self.name}-{part}", self.generation)
        if self.parent is None:
            return [own]
        apart = self.fresh and part == PERTURBED
        return [own, (f"{self.name}-parent-{part}" if apart else f"g{self.parent:02d}-{part}", self.parent)]

    def missing(self, part: str, cause: str) -> list[Draft]:
        """Requests for what of a part was never asked for."""
        positions: Sequence[int] = self.world.positions("regression")
        if part == PERTURBED:
            whole = dev_positions(self.world, self.generation)
            drawn = seeded(self.world.config.seed, "perturbed", whole.start)
            positions = sorted(drawn.sample(whole, min(self.world.config.evaluation.perturbed, len(whole))))
        return [
            draft
            for name, whose in self.both(part)
            if name not in self.state.evaluations
            for draft in evaluated(
                self.state,
                self.world,
                self.state.candidate(whose),
                evaluation=name,
                generation=self.generation,
                split="regression" if part == REGRESSION else "dev",
                positions=positions,
                cause=cause,
                perturbed=part == PERTURBED,
            )
        ]

    def judged(self, parts: Sequence[str]) -> tuple[bool, GateFigures]:
        """What the gate makes of dev, and of those parts."""
        config = self.world.config
        seed = seed_of(config.seed, "gate", self.generation)
        if self.parent is None:
            return gate(self.rewards(self.dev), None, config=config.gate, seed=seed)
        measured: dict[str, tuple[Rewards, Rewards]] = {}
        for part in parts:
            mine, theirs = (self.rewards(name) for name, _ in self.both(part))
            measured[part] = (mine, theirs)
        if config.second is not None:
            measured["second"] = (
                self.rewards(self.dev, second=True),
                self.rewards(self.parents_dev, second=True),
            )
        before = self.state.step(self.parent).gate
        return gate(
            self.rewards(self.dev),
            self.rewards(self.parents_dev),
            config=config.gate,
            seed=seed,
            # On fresh examples the parent's score is as good as new.
            reported=None if before is None or self.fresh else reported_score(before.figures),
            costs=(self.cost(self.dev), self.cost(self.parents_dev)),
            **measured,
        )

    def verdict(self, promote: bool, figures: GateFigures, cause: str) -> Draft:
        before = None if self.parent is None else self.rewards(self.parents_dev)
        version = gate_version(self.rewards(self.dev), before, self.world.config.gate)
        data: CandidatePromoted | CandidateRejected
        if promote:
            data = CandidatePromoted(
                generation=self.generation, over=self.parent, figures=figures, gate_version=version
            )
        else:
            assert self.parent is not None
            data = CandidateRejected(
                generation=self.generation, over=self.parent, figures=figures, gate_version=version
            )
        subject = subjects.candidate_gate(self.state.run, self.generation)
        return Draft(subject=subject, step=self.generation, cause=cause, data=data)
