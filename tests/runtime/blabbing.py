"""A task whose scorer leaks: what only it may hold gets into reasons, which everyone may read."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.canary import canary, canary_key
from bascule.plugins.task import Baseline, PublicFace
from bascule.plugins.tasks.arith import Arith, ArithPrivate
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Unscored, Verdict

#: Examples of dev that the scorer says too much about: by position, and how.
WAYS = ("plain", "base64", "environment", "cut off")


class Blabbing(Arith):
    name = "blabbing"
    summary = "sums, scored by somebody who talks"

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__({k: v for k, v in params.items() if k != "counter"})
        self._counter = params.get("counter")

    def private(self) -> Talker:
        dev = [e.id for e in self.public().dev]
        return Talker(self.seed, dict(zip(dev, WAYS, strict=False)))

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        if self._counter is not None:
            with Path(self._counter).open("a") as file:
                file.write("computed\n")
        right = {e.id: "0" for e in public.dev}
        return [
            Baseline(name="zero", answers={"dev": right, "sealed": {e.id: "0" for e in public.sealed}}),
            Baseline(name="nothing", answers={"dev": {}}),
        ]


class Talker(ArithPrivate):
    def __init__(self, seed: int, ways: dict[str, str]) -> None:
        super().__init__(seed)
        self._ways = ways
        self._key = canary_key()

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        token = canary(self._key, "blabbing", split, example)
        match self._ways.get(example) if split == "dev" else None:
            case "plain":
                return Unscored(reason=f"{answer!r} is not {token}")
            case "base64":
                return Unscored(reason=base64.b64encode(f"{answer} is not {token}!".encode()).decode())
            case "environment":
                return Unscored(reason=str(sorted(os.environ.items())))
            case "cut off":
                return Unscored(reason=f"{answer!r} is not {token[:20]}")
        return super().score(split, example, answer)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("blabbing", Blabbing, version="1")
