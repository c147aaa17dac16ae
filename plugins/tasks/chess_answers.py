"""How an answer of longcot-chess is read: strictly, whole, on one line."""

from __future__ import annotations

import re
from typing import Literal

PATH: Literal["knight_path"] = "knight_path"
LINE: Literal["best_3_moves"] = "best_3_moves"
Kind = Literal["knight_path", "best_3_moves"]
MOVES = 3

_SOLUTION = re.compile(r"(?:solution[ \t]*=[ \t]*)?(.*)")
_INTEGER = re.compile(r"[0-9]{1,9}")
#: Standard algebraic notation: castling; or piece, origin, capture, square, promotion; then check or mate.
_MOVE = re.compile(r"(?:O-O(?:-O)?|[KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](?:=[QRBN])?)[+#]?")


def parsed(kind: Kind, answer: str) -> tuple[str, ...] | None:
    """What an answer says: the integer in plain form, or the three moves in order; None where it is ill-formed.

    Both kinds may begin with ``solution =``. Moves may be quoted. Prose, a further line, another number of moves, other
    digits than 0 to 9 are ill-formed.
    """
    found = _SOLUTION.fullmatch(answer.strip())
    if found is None:
        return None
    text = found[1]
    if kind == PATH:
        return (str(int(text)),) if _INTEGER.fullmatch(text) else None
    if not (text.startswith("[") and text.endswith("]")):
        return None
    moves = tuple(_unquoted(part.strip()) for part in text[1:-1].split(","))
    return moves if len(moves) == MOVES and all(map(_MOVE.fullmatch, moves)) else None


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
