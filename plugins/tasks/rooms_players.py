"""Players of the task rooms that need no model: depth-first search, and a random walk. They see what an agent sees."""

from __future__ import annotations

from collections import deque

from bascule.plugins.tasks.rooms_world import (
    BACK,
    IDOL,
    MOST_CALLS,
    State,
    View,
    World,
    act,
    actions,
    line,
    view,
)
from bascule.plugins.tasks.splits import seeded_order

Action = tuple[str, dict[str, str]]


def explorer(world: World) -> list[str]:
    """Depth-first search: the last way that was found and not yet tried comes first. Its actions, one a line.

    It takes what lies about, unlocks what its keys fit, and carries the idol back when it has it.
    """
    state = State(world.start)
    lines: list[str] = []
    known: dict[str, View] = {}
    beyond: dict[tuple[str, str], str] = {}
    while not state.done and len(lines) < MOST_CALLS:
        seen = view(world, state)
        known.pop(seen.room, None)
        known[seen.room] = seen
        tool, arguments = _next(seen, known, beyond)
        state = act(world, state, tool, arguments)
        if tool == "go":
            beyond[seen.room, arguments["direction"]] = state.room
            beyond[state.room, BACK[arguments["direction"]]] = seen.room
        lines.append(line(tool, arguments))
    return lines


def _next(seen: View, known: dict[str, View], beyond: dict[tuple[str, str], str]) -> Action:
    if "place" in seen.tools:
        return "place", {}
    if seen.thing:
        return "take", {"thing": seen.thing}

    def open_ends(room: str) -> list[Action]:
        found: list[Action] = []
        for direction, colour in known[room].exits.items():
            if colour is not None and f"{colour} key" in seen.carried:
                found.append(("unlock", {"direction": direction}))
            elif colour is None and (room, direction) not in beyond:
                found.append(("go", {"direction": direction}))
        return found

    goals = [room for room, there in known.items() if there.pedestal] if IDOL in seen.carried else []
    goal = (goals or [room for room in reversed(known) if open_ends(room)])[0]
    if goal == seen.room:
        return open_ends(goal)[0]
    return "go", {"direction": _towards(seen.room, goal, known, beyond)}


def _towards(room: str, goal: str, known: dict[str, View], beyond: dict[tuple[str, str], str]) -> str:
    """The first direction of a shortest known way."""
    first: dict[str, str] = {room: ""}
    queue = deque([room])
    while queue:
        here = queue.popleft()
        for direction in known[here].exits if here in known else ():
            there = beyond.get((here, direction))
            if there is not None and there not in first:
                first[there] = first[here] or direction
                queue.append(there)
    return first[goal]


def wanderer(world: World, salt: str) -> list[str]:
    """A random walk: each time one of the actions that do something here. Its actions, one a line."""
    state = State(world.start)
    lines: list[str] = []
    while not state.done and len(lines) < MOST_CALLS:
        options = [(tool, arguments) for tool, arguments in actions(view(world, state))]
        tool, arguments = seeded_order(options, lambda a: line(*a), f"{salt} {len(lines)}")[0]
        state = act(world, state, tool, arguments)
        lines.append(line(tool, arguments))
    return lines
