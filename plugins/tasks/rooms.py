"""Rooms: a world that is explored turn by turn with five tools, of which only some are to be had in each place.

Each episode has its own state, in the runtime: a harness sees what its calls tell. Which feats were done is judged by
the scorer, which plays the recorded calls again in a copy of its own. A family of worlds shares a map, and is in one
split; its variants have other starts, doors and places. A constant does nothing: the first feat takes going somewhere
and then taking something.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.task import Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.harness_files import manifest_text
from bascule.plugins.tasks.rooms_players import explorer, wanderer
from bascule.plugins.tasks.rooms_world import (
    FEATS,
    MOST_CALLS,
    TOOLS,
    NotPossible,
    State,
    World,
    act,
    line,
    make_world,
    solution,
    told,
)
from bascule.plugins.tasks.splits import rule_baseline, split_seed
from bascule.schemas.events import Split
from bascule.schemas.harness import HarnessManifest, Tunable
from bascule.schemas.trajectory import ModelCall, Scored, ToolCall, Trajectory, Verdict

#: Families and variants of each, by split.
SIZES: dict[Split, tuple[int, int]] = {"train": (40, 4), "dev": (60, 1), "sealed": (60, 1)}
MOST_CHARACTERS = 4096
MOST_TURNS = 48
_ARGUMENT = {"go": "direction", "unlock": "direction", "take": "thing"}

PROMPT = f"""
Find the idol, carry it to the pedestal and place it there. Locked doors need the key of their colour.
Reply with one action: look, go n, go e, go s, go w, take red key, unlock n, or place.
You have {MOST_CALLS} actions.
"""


class Item(msgspec.Struct, frozen=True):
    """One world: the family's map in one of its variants."""

    family: str
    variant: int

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}"

    def world(self) -> World:
        return make_world(self.family, self.variant)


def items(seed: int) -> dict[Split, list[Item]]:
    """All worlds by split; a family stands in its split's name, so none is in two."""
    return {
        split: [Item(f"s{seed}-{split}{f:02d}", v) for v in range(variants) for f in range(families)]
        for split, (families, variants) in SIZES.items()
    }


def parsed(text: str) -> tuple[str, dict[str, str]]:
    """A line as a call: ``go n`` is ``go`` with the direction ``n``."""
    tool, _, rest = text.strip().partition(" ")
    return tool, {_ARGUMENT[tool]: rest.strip()} if tool in _ARGUMENT else {}


def played(world: World, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[State]:
    """The states after each of the first 64 calls; one that is not possible changes nothing."""
    states = [State(world.start)]
    for tool, arguments in list(calls)[:MOST_CALLS]:
        try:
            states.append(act(world, states[-1], tool, arguments))
        except NotPossible:
            states.append(states[-1])
    return states[1:]


def progress(state: State) -> float:
    """Fraction of the six feats."""
    return len(state.feats) / len(FEATS)


class RoomsPrivate:
    """Plays again what was done, in copies of the worlds of its own."""

    def __init__(self, seed: int) -> None:
        self._items = {(split, item.id): item for split, found in items(seed).items() for item in found}

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """An answer alone is a script: one action a line. What baselines and solutions give.

        Raises:
            KeyError: the split has no such world.
        """
        world = self._items[split, example].world()
        text = (answer or "").strip()
        lines = text.split("\n") if len(text) <= MOST_CHARACTERS else []
        states = played(world, map(parsed, lines))
        final = states[-1] if states else State(world.start)
        formed = bool(states) and all(parsed(text)[0] in TOOLS for text in lines)
        return Scored(reward=progress(final), passed=final.done, well_formed=formed)

    def score_episode(self, split: Split, example: str, episode: Trajectory) -> Verdict:
        """The fraction of the six feats; passed if the idol stands on the pedestal.

        Step rewards: each model call gets the progress that was made between it and the next one. An episode that ended
        in an error has achieved nothing. Without a step it is a script, which plays in the dark.

        Raises:
            KeyError: the split has no such world.
        """
        if not episode.steps:
            return self.score(split, example, episode.answer)
        world = self._items[split, example].world()
        # A call that the runtime refused was not made in its world.
        calls = [s for s in episode.steps if isinstance(s, ToolCall) and s.error is None]
        states = iter(played(world, [(c.name, _arguments(c)) for c in calls]))
        final = State(world.start)
        gains: list[float] = []
        for step in episode.steps:
            if isinstance(step, ModelCall):
                gains.append(0.0)
            elif isinstance(step, ToolCall) and step.error is None:
                before, final = final, next(states, final)
                if gains:
                    gains[-1] += progress(final) - progress(before)
        if episode.error is not None:
            return Scored(reward=0.0, passed=False, well_formed=False, steps=(0.0,) * len(gains))
        return Scored(reward=progress(final), passed=final.done, well_formed=bool(calls), steps=tuple(gains))


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        return msgspec.json.decode(call.arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


class _Visit:
    """One episode's own state of a world, which its tools share."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._state = State(world.start)
        self._calls = 0

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """Do one action; what the agent is told.

        Raises:
            NotPossible: not here, or not any more.
        """
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise NotPossible(f"The {MOST_CALLS} actions are used up.", next_step="Answer.")
        self._state = act(self._world, self._state, tool, arguments)
        return told(self._world, self._state)


class Rooms:
    """The task ``rooms``. Parameter: ``split_seed`` (0)."""

    name = "rooms"
    summary = "explore a small world with five tools, turn by turn; find the idol and place it"

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params)

    def public(self) -> PublicFace:
        found = items(self.seed)
        worlds = {item.id: item.world() for every in found.values() for item in every}
        examples = {
            split: tuple(
                Example(id=i.id, group=i.family, input={"question": told(w := worlds[i.id], State(w.start))})
                for i in every
            )
            for split, every in found.items()
        }
        return PublicFace(
            name=self.name,
            version="1",
            description=(
                "Explore a world of twelve rooms by tools: look(), go(direction), take(thing), unlock(direction) and "
                "place(). Directions are n, e, s and w. Which tools are to be had depends on the place; another one "
                "gives an error that names those. Take the idol, which is behind two locked doors, to the pedestal and "
                f"place it. The first {MOST_CALLS} calls count. Feats, each a sixth of the reward: "
                f"{', '.join(FEATS)}. The answer's text does not count."
            ),
            train=examples["train"],
            answers={i.id: "\n".join(line(*a) for a in solution(worlds[i.id])) for i in found["train"]},
            dev=examples["dev"],
            sealed=examples["sealed"],
            max_answer_tokens=8,
            source="made by this task's code",
            licence="MIT",
        )

    def private(self) -> RoomsPrivate:
        return RoomsPrivate(self.seed)

    def harness(self) -> dict[str, str]:
        manifest = HarnessManifest(
            name="conversation",
            max_model_calls=MOST_TURNS,
            max_tool_calls=MOST_CALLS,
            tools=TOOLS,
            params={"turns": 24, "max_tokens": 8, "hint": True},
            tunable={
                "turns": Tunable(low=12, high=MOST_TURNS, integer=True),
                "max_tokens": Tunable(low=4, high=16, integer=True),
                "hint": Tunable(values=(True, False)),
            },
        )
        return {
            "harness.py": Path(__file__).with_name("rooms_harness.py").read_text(encoding="utf-8"),
            "manifest.json": manifest_text(manifest),
            "system_prompt.md": PROMPT.strip() + "\n",
        }

    def tools(self, example: Example) -> Mapping[str, Tool]:
        family, _, variant = example.id.rpartition("-")
        visit = _Visit(make_world(family, int(variant)))
        return {name: partial(visit.call, name) for name in TOOLS}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """Depth-first search, a random walk, and going north for ever: scripts of what a player without a model did."""
        worlds = {i.id: i.world() for every in items(self.seed).values() for i in every}
        return (
            rule_baseline("depth-first", public, lambda e: "\n".join(explorer(worlds[e.id]))),
            rule_baseline("random-walk", public, lambda e: "\n".join(wanderer(worlds[e.id], f"rooms walk {e.id}"))),
            rule_baseline("always-north", public, lambda _: "\n".join(["go n"] * MOST_CALLS)),
        )

    def defaults(self) -> dict[str, Any]:
        return {
            # An episode is two dozen calls with a growing prompt: few of them say as much as many short ones.
            "evaluation": {"dev_examples": 8, "sealed_examples": 8, "train_groups": 4, "train_samples": 4},
            "max_generations": 2,
            "algorithms": {"grpo": {"steps": 2, "groups": 4, "num_generations": 4, "learning_rate": 1e-4}},
        }
