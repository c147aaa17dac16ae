"""longcot-chess: 39 knight's paths and 11 lines of three moves, all sealed; exact answers, the denominator is 50.

``train`` and ``dev`` are knight's paths on small boards that this task's code makes and solves. The lines of three
moves are what an engine expects, both sides moving; nothing here says which engine, so they are in sealed alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bascule.plugins.extras import install_command
from bascule.plugins.task import Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks import sia_data
from bascule.plugins.tasks.chess_answers import LINE, PATH, parsed
from bascule.plugins.tasks.chess_practice import Path, practice
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.knight_path import Square, fewest_moves
from bascule.plugins.tasks.splits import best_constant, constant_baseline, split_seed
from bascule.plugins.tasks.truths import Truths, kept_truths
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Verdict

NAME = "longcot-chess"
LAYOUT = "1"
_SQUARE = re.compile(r"\((\d+), (\d+)\)")
_BOARD = re.compile(r"board of size (\d+)x\1\b")


def truths(seed: int) -> Truths:
    """The answers by split and question; for the scoring process."""
    made = practice(seed)
    key: dict[str, str | list[str]] = sia_data.records(NAME, "private/answers.json")
    return {
        **{split: {p.id: p.truth for p in found} for split, found in made.items()},
        "sealed": {i: answer if isinstance(answer, str) else f"[{', '.join(answer)}]" for i, answer in key.items()},
    }


class ChessPrivate:
    """Holds the answers; opened in the scoring process only."""

    def __init__(self, held: Truths) -> None:
        self._truths = held

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """1 if the answer says exactly the truth: the number, or the three moves in their order.

        Raises:
            KeyError: the split has no such question.
        """
        truth = self._truths[split][example]
        kind = LINE if truth.startswith("[") else PATH
        said = None if answer is None else parsed(kind, answer)
        right = said is not None and said == parsed(kind, truth)
        return Scored(reward=float(right), passed=right, well_formed=said is not None)


class Chess:
    """The task ``longcot-chess``. Parameter: ``split_seed`` (0) of the practice questions."""

    name = NAME
    summary = "50 chess problems: shortest knight's paths over 30 squares, and lines of three moves"
    wheels = (sia_data.WHEEL,)

    def __init__(self, params: dict[str, Any]) -> None:
        self.seed = split_seed(self.name, params)

    def public(self) -> PublicFace:
        made = practice(self.seed)
        asked = [
            Example(
                id=item["question_id"],
                group=item["question_id"],
                input={"question": item["prompt"], "kind": item["problem"]["template"]},
            )
            for item in sia_data.records(NAME, "public/chess_hard.json")
        ]
        return PublicFace(
            name=self.name,
            version="1",
            description=(
                "Two kinds of question. knight_path: the fewest moves with which a knight touches every target square, "
                "in any order; the answer is the integer. best_3_moves: the three next moves of the best line from a "
                "position, the two sides moving in turn, in standard algebraic notation; the answer is a list such as "
                "[Nf3, Nc6, Bb5], and order matters. The whole answer is `solution = ...` or what stands after it, on "
                "one line, and nothing else. Train and dev have knight_path alone, on small boards; sealed has 39 "
                "knight_path on boards of 100 x 100 and 11 best_3_moves."
            ),
            train=tuple(map(example_of, made["train"])),
            answers={p.id: p.truth for p in made["train"]},
            dev=tuple(map(example_of, made["dev"])),
            sealed=tuple(asked),
            max_answer_tokens=32,
            source=f"LongCoT's hard chess questions, in {sia_data.FOUND_IN}; train and dev are made by code",
            licence="the wheel is MIT; nothing is redistributed here",
        )

    def private(self) -> ChessPrivate:
        name = sia_data.kept_name(self.name, LAYOUT, self.seed)
        return ChessPrivate(kept_truths(self.name, name, partial(truths, self.seed)))

    def harness(self) -> dict[str, str]:
        return reference_files(
            name="chat",
            system_prompt="Solve the chess problem. End with one line: solution = ...",
            params={"form": "chat", "extract": "last_line", "max_tokens": 48},
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The best constant of train; and the exact solver of knight's paths, which answers no other question."""
        splits: tuple[Split, ...] = ("train", "dev", "sealed")
        solved: dict[str, dict[str, str]] = {
            s: {e.id: str(solve(e)) for e in public.split(s) if e.input["kind"] == PATH} for s in splits
        }
        return (
            constant_baseline("best-constant", public, best_constant(public)),
            Baseline(name="exact-knight-solver", answers=solved),
        )

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 32, "train_samples": 4}, "max_generations": 2}


def example_of(path: Path) -> Example:
    """A practice question as agents see it."""
    return Example(id=path.id, group=path.group, input={"question": path.question, "kind": PATH})


def solve(example: Example) -> int:
    """The answer to a ``knight_path`` question, from its text.

    Raises:
        ConfigError: scipy is not installed.
    """
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise ConfigError("The knight solver needs scipy.", next_step=f"Install it: {install_command('tasks')}")
    text = example.input["question"]
    board = _BOARD.search(text)
    squares: list[Square] = [(int(x), int(y)) for x, y in _SQUARE.findall(text)]
    if board is None or not squares:
        raise ConfigError(f"The question {example.id} names no board or no squares.", next_step="Use the pinned wheel.")
    return fewest_moves(squares[0], squares[1:], int(board[1]))
