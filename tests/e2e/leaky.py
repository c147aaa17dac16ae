"""A plugin that leaks: its harness, its tool, its settings and its faults hold keys, in the open and in disguise."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bascule.plugins import Registry, hookimpl
from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.task import Baseline, Example, PublicFace
from bascule.schemas.errors import PromptError
from bascule.schemas.trajectory import Output, Scored, Verdict, pack_floats, pack_ids

KEY = "sk-" + "ant-api03-" + "Q7wE9rT1yU3iO5pA"
PASSWORD = "hunter22"
SETTING = "setting-of-the-canary"
VARIABLE = "CANARY_ACCESS_TOKEN"
LOGIN = "login of the canary/1"
CANARIES = (KEY, KEY[10:], PASSWORD, SETTING, LOGIN)

#: The harness holds its keys backwards, as one that reads them from somewhere would have them: not in its text.
HARNESS = """
KEY, LOGIN, PASSWORD = (text[::-1] for text in ({key!r}, {login!r}, {password!r}))


def solve(example, model, tools, context):
    n = example["n"]
    context.note(f"asking with {{KEY}}")
    found = tools.call("lookup", password=PASSWORD, url=f"nats://me:{{PASSWORD}}@host")
    said = model.chat([{{"role": "user", "content": f"{{example['question']}} {{KEY}} {{LOGIN}} {{found}}"}}])[0].text
    model.complete(f"password='{{PASSWORD}}' {{LOGIN}}")
    if n == 1:
        context.note("long " * 15000 + KEY)
    if n % 3 == 0:
        raise RuntimeError(f"{{LOGIN}} was refused with {{KEY}}")
    return said[:1] + KEY
"""
NAMES = {"train": 12, "dev": 4, "sealed": 4}


def examples(split: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{split}-{i}", group=f"{split}-{i}", input={"question": f"{split} {i}", "n": i})
        for i in range(NAMES[split])
    )


async def lookup(arguments: dict[str, Any]) -> str:
    assert arguments["password"] == PASSWORD  # a tool gets what the harness gave
    return json.dumps({"key": KEY, "login": LOGIN})


class Private:
    def score(self, split: str, example: str, answer: str | None) -> Verdict:
        del split, example
        return Scored(reward=float(answer is not None), passed=answer is not None)


class Leaky:
    name = "leaky"
    summary = "answer with anything"
    faults = 1

    def public(self) -> PublicFace:
        train = examples("train")
        return PublicFace(
            name=self.name,
            version="1",
            description=self.summary,
            train=train,
            answers={e.id: "b" for e in train},
            dev=examples("dev"),
            sealed=examples("sealed"),
            max_answer_tokens=3,
            source="made by this plugin",
            licence="MIT",
        )

    def private(self) -> Private:
        return Private()

    def harness(self) -> dict[str, str]:
        return {
            "harness.py": HARNESS.format(key=KEY[::-1], login=LOGIN[::-1], password=PASSWORD[::-1]),
            "manifest.json": json.dumps({"name": "leaky", "tools": ["lookup"]}),
            "system_prompt.md": f"Your key is {KEY}.\n",
        }

    def tools(self, example: Example) -> dict[str, Any]:
        if Leaky.faults:
            Leaky.faults -= 1
            raise RuntimeError(f"no tool for {os.environ[VARIABLE]} at https://me:{PASSWORD}@host with {KEY}")
        return {"lookup": lookup}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        return [Baseline(name="b", answers={s: {e.id: "b" for e in public.split(s)} for s in ("dev", "sealed")})]

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 4, "train_samples": 1}, "levers": ["harness"], "max_generations": 1}


class Letters:
    """An engine whose tokens are bytes; it refuses one prompt with a key in its reason."""

    async def start(self) -> EngineInfo:
        return EngineInfo(name="letters", model="letters", model_digest="")

    async def close(self) -> None: ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def sample(self, request: SampleRequest) -> Sampled:
        prompt = request.prompt
        text = prompt if isinstance(prompt, str) else "".join(f"{m.role}: {m.content}\n" for m in prompt)
        if "dev 2 " in text:
            raise PromptError(f"{LOGIN} may not ask with {KEY}")
        output = Output(token_ids=pack_ids([98]), logprobs=pack_floats([-0.5]), text=f"b {KEY}")
        return Sampled(prompt_ids=tuple(text.encode()), outputs=(output,) * request.n)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.task("leaky", lambda params: Leaky(), version="1")
    registry.engine("letters", lambda model, params: Letters(), version="1")
