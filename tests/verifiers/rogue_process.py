"""A scoring process whose scorer does, by example id, everything that a scorer should not."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict
from bascule.verifiers.scoring_process import Open, main

TRUTH = "the-truth-is-42"


class Rogue:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        first = self.folder / example
        known = first.exists()
        first.touch()
        match example:
            case "crash":
                os._exit(3)
            case "exit":
                sys.exit(TRUTH)
            case "crash-once" if not known:
                os._exit(3)
            case "hang":
                while True:
                    signal.pause()
            case "raise":
                raise ValueError(TRUTH)
            case "nothing":
                return None  # type: ignore[return-value]
            case "text":
                return Scored(reward="much")  # type: ignore[arg-type]
            case "nan" | "inf" | "-inf":
                return Scored(reward=float(example))
            case "print":
                print(TRUTH, flush=True)
                os.write(1, b"\0\0\0\1x")
            case "closed":
                return Scored(reward=float((self.folder / "roots" / "late.txt").read_text() == answer))
            case "write":
                (self.folder / "roots" / "new.txt").write_text(TRUTH)
            case "environment":
                return Unscored(reason=" ".join(os.environ))
        return Scored(reward=float(answer == example), passed=answer == example)


def rogue(opening: Open) -> tuple[Rogue]:
    match opening.task:
        case "absent":
            raise ConfigError("There is no such data.", next_step="Fetch it.")
        case "broken":
            raise RuntimeError(TRUTH)
        case "dies":
            os._exit(3)
    return (Rogue(opening.params["folder"]),)


if __name__ == "__main__":
    main(rogue)
