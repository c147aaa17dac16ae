"""A plugin as somebody else could ship it, made so that a run of it records every type of event that a run can.

Its policy asks a model before every choice and follows a script; its author uses a tool before every edit, and once
has no edit; one of its algorithms always fails; its engine answers by a hash of what is asked, so that every run gets
the same answers without a recording; one trajectory of most evaluations is too long for an event.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.algorithm import Credit, Group, Requires
from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.policy import (
    AuthorInput,
    CallModel,
    CallResult,
    CallTool,
    HarnessEdit,
    NoEdit,
    Performed,
    PolicyInput,
)
from bascule.plugins.task import Baseline, Example, PublicFace
from bascule.schemas.decision import LeverDecision
from bascule.schemas.errors import TrainError
from bascule.schemas.harness import Harness
from bascule.schemas.trajectory import Output, Scored, Verdict, pack_floats, pack_ids

SIZES = {"train": 12, "dev": 12, "sealed": 8}
#: More than an event may hold.
LONG = 70_000
#: What the policy chooses in each generation, and of the harness what the author does.
SCRIPT: tuple[tuple[str, str | None], ...] = (
    ("harness", "better"),
    ("harness", None),
    ("weights", "stumbles"),
    ("weights", "learns"),
    ("harness", "worse"),
)
HARNESS = """
def solve(example, model, tools, context):
    question = example["question"]
    if question.endswith(" 0 ="):
        context.note("n" * context.params["note"])
    return model.complete(context.system_prompt.strip() + " " + question)[0].text
"""


def examples(split: str) -> tuple[Example, ...]:
    names = (f"{split} {i} =" for i in range(SIZES[split]))
    return tuple(Example(id=f"{split}-{i}", group=f"{split}-{i}", input={"question": n}) for i, n in enumerate(names))


class Private:
    def score(self, split: str, example: str, answer: str | None) -> Verdict:
        del split, example
        return Scored(reward=float(answer == "yes"), passed=answer == "yes", well_formed=bool(answer))


class Gauntlet:
    """The task. With ``broken`` its first harness is not usable."""

    name = "gauntlet"
    summary = "say yes"

    def __init__(self, params: dict[str, Any]) -> None:
        self._broken = bool(params.get("broken"))

    def public(self) -> PublicFace:
        train = examples("train")
        return PublicFace(
            name=self.name,
            version="1",
            description=self.summary,
            train=train,
            answers=dict.fromkeys((e.id for e in train), "yes"),
            dev=examples("dev"),
            sealed=examples("sealed"),
            max_answer_tokens=3,
            source="made by this plugin",
            licence="MIT",
        )

    def private(self) -> Private:
        return Private()

    def harness(self) -> dict[str, str]:
        return {"readme": "no harness"} if self._broken else files("plain")

    def tools(self, example: Example) -> dict[str, Any]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        return [Baseline(name="yes", answers={s: {e.id: "yes" for e in public.split(s)} for s in ("dev", "sealed")})]

    def defaults(self) -> dict[str, Any]:
        return {
            "evaluation": {"train_groups": 3, "train_samples": 2},
            "engine": {"name": "hashed"},
            "policy": {"name": "gauntlet"},
            "author": {"name": "gauntlet"},
            "max_generations": len(SCRIPT),
            "threads": 1,
            "concurrency": 8,
        }


def files(prompt: str) -> dict[str, str]:
    manifest = {"name": "gauntlet", "params": {"note": LONG}}
    return {"harness.py": HARNESS, "manifest.json": json.dumps(manifest), "system_prompt.md": f"{prompt}\n"}


async def called(key: str) -> None:
    """The endpoint's own book of what it was asked; it answers once the file ``GAUNTLET_GATE``, if named, is there."""
    if book := os.environ.get("GAUNTLET_CALLS"):
        with Path(book).open("a") as out:
            out.write(json.dumps({"key": key, "time": time.time()}) + "\n")
    while (gate := os.environ.get("GAUNTLET_GATE")) and not await asyncio.to_thread(Path(gate).exists):
        await asyncio.sleep(0.05)


class Policy:
    """Follows the script; with ``endless`` it pulls the harness as long as it may."""

    name = "gauntlet"
    version = "1"

    def __init__(self, params: dict[str, Any]) -> None:
        self._tag = params.get("tag", "")
        self._endless = bool(params.get("endless"))

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> CallModel | LeverDecision:
        if given.generation > given.max_generations:
            return LeverDecision(lever="stop", reasons=("the end of the script",))
        if self._endless:
            return LeverDecision(lever="harness", reasons=("endless",))
        if not results:
            return CallModel(model="oracle", request={"key": f"{self._tag}-policy-{given.generation}"})
        lever, what = SCRIPT[given.generation - 1]
        algorithm = what if lever == "weights" else None
        return LeverDecision(lever=lever, algorithm=algorithm, reasons=(str(results[0].answer["text"]),))  # type: ignore[arg-type, union-attr]

    async def perform(self, call: CallModel) -> Performed:
        await called(call.request["key"])
        return Performed(answer={"text": f"go on with {call.request['key']}"}, input_tokens=1, output_tokens=1)


class Author:
    """Edits as the script says; with ``endless`` always, and always otherwise."""

    name = "gauntlet"
    version = "1"

    def __init__(self, params: dict[str, Any]) -> None:
        self._tag = params.get("tag", "")
        self._endless = bool(params.get("endless"))

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> CallTool | HarnessEdit | NoEdit:
        if self._endless:
            return HarnessEdit(files=files(f"edit {given.generation}"), edit=f"edit {given.generation}")
        if not results:
            return CallTool(name="look", arguments={"key": f"{self._tag}-author-{given.generation}"})
        _, edit = SCRIPT[given.generation - 1]
        return HarnessEdit(files=files(edit), edit=edit) if edit else NoEdit(reason="nothing comes to mind")

    async def perform(self, call: CallTool) -> Performed:
        await called(call.arguments["key"])
        return Performed(answer={"result": "looked"})

    def edits_left(self, harness: Harness, tried: Sequence[str]) -> int | None:
        del harness, tried
        return None


class Learns:
    """Two updates that reinforce what is right. The engine's tokens are not the model's, so nothing bounds that."""

    name = "learns"
    version = "1"
    requires = Requires(on_policy=True)
    streams: frozenset[str] = frozenset()

    def defaults(self) -> dict[str, Any]:
        return {"steps": 2, "groups": 4, "num_generations": 4, "lora_r": 2, "max_kl": 1e6, "max_ratio": 1e30}

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        del params
        samples = [s for group in groups for s in group.samples]
        return [
            Credit(trajectory=s.trajectory, component="policy", advantage=1.0 if s.passed else -1.0) for s in samples
        ]


class Stumbles(Learns):
    """An algorithm that never gets anywhere, once it has something to go by."""

    name = "stumbles"

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        if groups:
            raise TrainError(f"{len(groups)} groups, and none of them will do.")
        return super().credit(groups, params)


class Hashed:
    """An engine that is right as often as the prompt deserves, by a hash of trajectory, call and prompt."""

    async def start(self) -> EngineInfo:
        return EngineInfo(name="hashed", model="hashed", model_digest="")

    async def close(self) -> None:
        pass

    async def load_adapter(self, name: str, folder: Path) -> None:
        del name, folder

    async def unload_adapter(self, name: str) -> None:
        del name

    async def sample(self, request: SampleRequest) -> Sampled:
        drawn = hashlib.sha256(f"{request.trajectory} {request.call} {request.seed} {request.prompt}".encode()).digest()
        chance = 0.5 if request.sampling.temperature else 0.95 if str(request.prompt).startswith("better") else 0.15
        text = "yes" if drawn[0] < 256 * chance else "no"
        ids = [10 + drawn[1] % 200, 10 + drawn[2] % 200]
        output = Output(token_ids=pack_ids(ids), logprobs=pack_floats([-5.7] * len(ids)), text=text)
        return Sampled(prompt_ids=(5, 6, 7), outputs=(output,) * request.n)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("gauntlet", Gauntlet, version="1")
    registry.policy("gauntlet", Policy, version="1")
    registry.author("gauntlet", Author, version="1")
    registry.algorithm(Learns())
    registry.algorithm(Stumbles())
    registry.engine("hashed", lambda model, params: Hashed(), version="1")
