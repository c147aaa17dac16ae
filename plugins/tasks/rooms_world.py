"""A small world of rooms: a map, locked doors, keys, an idol and a pedestal; and what an action does in it.

Everything is a function of its arguments: the world that an agent explores and the scorer's own copy are the same ones.

A map is a tree of twelve rooms on a grid, with one further passage where the grid allows it. Two doors divide it: the
red one leads out of the part where one starts, the blue one to the idol. The red key lies in the first part, the blue
key behind the red door, the pedestal in the first part. So all six feats are needed, in nearly one order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from typing import Any

import msgspec

from bascule.plugins.tasks.splits import seeded_order
from bascule.schemas.errors import BasculeError

STEPS = {"n": (0, 1), "e": (1, 0), "s": (0, -1), "w": (-1, 0)}
BACK = {"n": "s", "e": "w", "s": "n", "w": "e"}
WIDTH = 4
ROOMS = 12
NAMES = (
    *("attic", "barn", "cave", "cellar", "den", "forge", "garden", "hall", "kitchen", "library", "loft", "mill"),
    *("nook", "pantry", "porch", "shed", "stable", "study", "tower", "well"),
)
TOOLS = ("look", "go", "take", "unlock", "place")
FEATS = ("take red key", "unlock red", "take blue key", "unlock blue", "take idol", "place")
IDOL = "idol"
#: Calls of an episode that are played; what comes after them changes nothing.
MOST_CALLS = 64

Edge = frozenset[str]


class World(msgspec.Struct, frozen=True):
    """A world as it is at the start.

    Attributes:
        exits: by room and direction, the room that is there.
        locks: colour of the door between two rooms, where there is one.
        things: what lies in a room.
        pedestal: the room where the idol belongs.
    """

    exits: dict[str, dict[str, str]]
    locks: dict[Edge, str]
    things: dict[str, str]
    start: str
    pedestal: str


class State(msgspec.Struct, frozen=True):
    """Where an agent is, and the feats that it has done; whatever else has changed follows from these."""

    room: str
    feats: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return FEATS[-1] in self.feats


class View(msgspec.Struct, frozen=True):
    """What can be seen from a place: the colour of a locked door by direction, None where the way is open."""

    room: str
    exits: dict[str, str | None]
    thing: str | None
    pedestal: bool
    carried: tuple[str, ...]
    tools: tuple[str, ...]


class NotPossible(BasculeError):
    """The world does not allow this action here."""

    code = "bascule.rooms.not_possible"


@lru_cache(maxsize=1024)
def make_world(family: str, variant: int) -> World:
    """The world of a family's map in one of its variants: other doors, things and starts in the same rooms."""
    names = seeded_order(NAMES, str, f"rooms names {family}")[:ROOMS]
    where = {names[0]: (0, 0)}
    exits: dict[str, dict[str, str]] = {name: {} for name in names}

    def connect(room: str, direction: str, other: str) -> None:
        exits[room][direction], exits[other][BACK[direction]] = other, room

    tree: list[Edge] = []
    for name in names[1:]:
        free = [(r, d) for r in where for d in STEPS if (cell := _beyond(where[r], d)) and cell not in where.values()]
        room, direction = seeded_order(free, "".join, f"rooms map {family} {name}")[0]
        connect(room, direction, name)
        where[name] = _beyond(where[room], direction) or (0, 0)
        tree.append(frozenset((room, name)))

    salt = f"rooms variant {family} {variant}"
    start, red, blue, parts = _divided(tree, names, salt)
    first, middle, last = parts
    for room, direction in seeded_order([(r, d) for r in where for d in STEPS], "".join, f"{salt} passage"):
        other = next((r for r, cell in where.items() if cell == _beyond(where[room], direction)), None)
        if other is not None and direction not in exits[room] and any({room, other} <= part for part in parts):
            connect(room, direction, other)
            break
    # Things are at the far end of their part, so that there is something to explore.
    key = _farthest(exits, min(red & first), first - {start}, salt)
    return World(
        exits={room: {d: exits[room][d] for d in STEPS if d in exits[room]} for room in names},
        locks={red: "red", blue: "blue"},
        things={
            key: "red key",
            _farthest(exits, min(red & middle), middle, salt): "blue key",
            _farthest(exits, min(blue & last), last, salt): IDOL,
        },
        start=start,
        pedestal=_farthest(exits, min(blue - last), first - {key}, salt),
    )


def _farthest(exits: Mapping[str, Mapping[str, str]], door: str, part: set[str], salt: str) -> str:
    """The room of a part that is farthest from a door; of equally far ones the first in seeded order."""
    steps = {door: 0}
    queue = deque([door])
    while queue:
        here = queue.popleft()
        for there in exits[here].values():
            if there not in steps:
                steps[there] = steps[here] + 1
                queue.append(there)
    return max(seeded_order(sorted(part), str, f"{salt} {door}"), key=steps.__getitem__)


def _beyond(cell: tuple[int, int], direction: str) -> tuple[int, int] | None:
    x, y = cell[0] + STEPS[direction][0], cell[1] + STEPS[direction][1]
    return (x, y) if 0 <= x < WIDTH and 0 <= y < WIDTH else None


def _divided(tree: list[Edge], names: list[str], salt: str) -> tuple[str, Edge, Edge, list[set[str]]]:
    """The start, both doors, and the rooms before the first, behind it, and behind the second.

    The first of the seeded choices whose parts are large enough; every tree of twelve rooms with at most four ways out
    of a room has one.
    """
    doors = [(red, blue) for red in tree for blue in tree if red != blue]
    doors = seeded_order(doors, lambda pair: " ".join(r for edge in pair for r in sorted(edge)), f"{salt} doors")
    starts = seeded_order(names, str, f"{salt} start")
    for least, start, (red, blue) in product((2, 1), starts, doors):
        rest = [e for e in tree if e not in (red, blue)]
        first = _reached(start, rest)
        if len(red & first) != 1 or len(first) < 3:
            continue
        middle = _reached(min(red - first), rest)
        last = set(names) - first - middle
        if min(len(middle), len(last)) >= least:
            return start, red, blue, [first, middle, last]
    raise AssertionError(salt)


def _reached(start: str, edges: list[Edge]) -> set[str]:
    found = {start}
    while more := {room for e in edges if e & found for room in e} - found:
        found |= more
    return found


def view(world: World, state: State) -> View:
    """What is seen from where the agent is."""
    room, feats = state.room, state.feats
    exits = {}
    for direction, other in world.exits[room].items():
        colour = world.locks.get(frozenset((room, other)))
        exits[direction] = None if colour is None or f"unlock {colour}" in feats else colour
    thing = world.things.get(room)
    if thing is not None and f"take {thing}" in feats:
        thing = None
    carried = tuple(t for t in world.things.values() if f"take {t}" in feats and (t != IDOL or not state.done))
    pedestal = room == world.pedestal
    able = {
        "look": True,
        "go": None in exits.values(),
        "take": thing is not None,
        "unlock": any(colour is not None and f"{colour} key" in carried for colour in exits.values()),
        "place": pedestal and IDOL in carried,
    }
    return View(room, exits, thing, pedestal, carried, tuple(name for name in TOOLS if able[name]))


def told(world: World, state: State) -> str:
    """What the agent is told in a state."""
    if state.done:
        return "The idol stands on the pedestal. You are done."
    seen = view(world, state)
    ways = [d if colour is None else f"{d} ({colour} door, locked)" for d, colour in seen.exits.items()]
    parts = [f"{seen.room}. exits: {', '.join(ways)}."]
    parts += [f"here: {seen.thing}."] if seen.thing else []
    parts += ["here: the pedestal."] if seen.pedestal else []
    parts += [f"you have: {', '.join(seen.carried)}."] if seen.carried else []
    return " ".join((*parts, f"tools: {', '.join(seen.tools)}"))


def act(world: World, state: State, tool: str, arguments: Mapping[str, Any]) -> State:
    """The state after one call of a tool.

    Raises:
        NotPossible: the tool is not to be had here, or its argument names nothing that is here.
    """
    seen = view(world, state)
    if tool not in seen.tools:
        raise NotPossible(f"{tool[:20]} is not possible here.", next_step=f"Possible: {', '.join(seen.tools)}.")
    match tool:
        case "go":
            direction = arguments.get("direction")
            ways = [d for d, colour in seen.exits.items() if colour is None]
            if direction not in ways:
                raise NotPossible(f"There is no open way {str(direction)[:20]}.", next_step=f"Open: {', '.join(ways)}.")
            return State(world.exits[seen.room][str(direction)], state.feats)
        case "take":
            if arguments.get("thing") != seen.thing:
                raise NotPossible(f"No {str(arguments.get('thing'))[:20]} is here.", next_step=f"Here: {seen.thing}.")
            return State(seen.room, (*state.feats, f"take {seen.thing}"))
        case "unlock":
            direction = arguments.get("direction")
            colour = seen.exits.get(direction) if isinstance(direction, str) else None
            if colour is None or f"{colour} key" not in seen.carried:
                raise NotPossible(
                    f"No door {str(direction)[:20]} fits a key of yours.", next_step="Name its direction."
                )
            return State(seen.room, (*state.feats, f"unlock {colour}"))
        case "place":
            return State(seen.room, (*state.feats, FEATS[-1]))
    return state


def actions(seen: View) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call that does something from a place."""
    for direction, colour in seen.exits.items():
        if colour is None:
            yield "go", {"direction": direction}
        elif f"{colour} key" in seen.carried:
            yield "unlock", {"direction": direction}
    if seen.thing:
        yield "take", {"thing": seen.thing}
    if "place" in seen.tools:
        yield "place", {}


def solution(world: World) -> list[tuple[str, dict[str, str]]]:
    """A shortest way to the goal, for one who knows the world."""
    start = State(world.start)
    came: dict[tuple[str, frozenset[str]], tuple[State, tuple[str, dict[str, str]]] | None] = {}
    came[start.room, frozenset()] = None
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if state.done:
            path = []
            while (step := came[state.room, frozenset(state.feats)]) is not None:
                state = step[0]
                path.append(step[1])
            return path[::-1]
        for tool, arguments in actions(view(world, state)):
            after = act(world, state, tool, arguments)
            if (after.room, frozenset(after.feats)) not in came:
                came[after.room, frozenset(after.feats)] = (state, (tool, arguments))
                queue.append(after)
    raise AssertionError(world.start)


def line(tool: str, arguments: Mapping[str, str]) -> str:
    """An action as text: ``go n``, ``take red key``, ``place``."""
    return " ".join((tool, *arguments.values()))
