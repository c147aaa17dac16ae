"""Practice questions of longcot-chess: knight's paths on small boards, made and solved by code."""

from __future__ import annotations

import hashlib

import msgspec

from bascule.plugins.tasks.knight_path import Square, fewest_moves
from bascule.plugins.tasks.splits import seeded_random

PER_SPLIT = 96
SIZES = (6, 12)
TARGETS = (1, 4)


class Path(msgspec.Struct, frozen=True):
    """One question and its answer; ``group`` is its board and squares."""

    id: str
    group: str
    question: str
    truth: str


def path_question(start: Square, targets: list[Square], size: int) -> str:
    """The question in the words of the task."""
    squares = ", ".join(f"({x}, {y})" for x, y in targets)
    return (
        f"A knight stands on a chess board of size {size}x{size}. What is the minimum number of moves with which it "
        "touches all the target squares, in any order? Squares are given as (row, column), counted from 0.\n\n"
        f"Start: ({start[0]}, {start[1]})\nTarget squares: [{squares}]\n\n"
        "Return your answer in the format: solution = <integer>"
    )


def practice(seed: int) -> dict[str, list[Path]]:
    """The questions of train and dev; no board with its squares twice."""
    out: dict[str, list[Path]] = {"train": [], "dev": []}
    seen: set[str] = set()
    for split, found in out.items():
        attempt = 0
        while len(found) < PER_SPLIT:
            r = seeded_random(f"longcot-chess practice {seed} {split} {attempt}")
            attempt += 1
            size, count = r.randint(*SIZES), r.randint(*TARGETS)
            squares = r.sample([(x, y) for x in range(size) for y in range(size)], count + 1)
            start, targets = squares[0], squares[1:]
            group = hashlib.sha256(f"{size} {start} {sorted(targets)}".encode()).hexdigest()[:16]
            if group not in seen:
                seen.add(group)
                truth = str(fewest_moves(start, targets, size))
                identity = f"practice-{split}-{len(found):03d}"
                found.append(Path(identity, group, path_question(start, targets, size), truth))
    return out
