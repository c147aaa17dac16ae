"""The broker redacts before anything else happens to a text: before tokens are made of it, before it is cut or told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.redactors.secrets import Secrets
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.runtime.redaction import Redaction
from bascule.schemas.errors import PromptError
from bascule.schemas.harness import make_harness
from bascule.schemas.trajectory import ModelCall, Output, Sampling, ToolCall, Trajectory

SECRET = "the-long-password-of-the-canary"
HALF = SECRET[len(SECRET) // 2 :]
MARK = "[redacted:environment]"
REDACTION = Redaction([Secrets({"CANARY_PASSWORD": SECRET})])


class Echo:
    """Answers with the secret, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    async def start(self) -> EngineInfo:
        return EngineInfo(name="echo", model="none", model_digest="")

    async def close(self) -> None: ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def sample(self, request: SampleRequest) -> Sampled:
        self.requests.append(request)
        if request.call == 1:
            raise PromptError("x" * (2000 - len(HALF)) + SECRET)
        return Sampled(prompt_ids=(1,), outputs=(Output(token_ids=b"", logprobs=b"", text=f"is {SECRET}"),))


@pytest.fixture
async def pool() -> AsyncIterator[HarnessPool]:
    pool = HarnessPool()
    yield pool
    await pool.close()


async def play(pool: HarnessPool, body: str, engine: Echo, seen: list[dict[str, Any]]) -> Trajectory:
    """Run ``solve`` with ``secret`` at hand, which the harness's text holds backwards."""

    async def lookup(arguments: dict[str, Any]) -> str:
        seen.append(arguments)
        if arguments.get("fail"):
            raise RuntimeError("x" * (2000 - len(HALF)) + SECRET)
        return f"found {SECRET}"

    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    code = f"import os, sys\nfrom bascule_harness import ModelError, ToolError\nsecret = {SECRET[::-1]!r}[::-1]\n"
    files = {
        "harness.py": f"{code}def solve(example, model, tools, context):\n{lines}",
        "manifest.json": json.dumps({"name": "t", "tools": ["lookup"]}),
        "system_prompt.md": "",
    }
    spec = EpisodeSpec(trajectory="t", harness=make_harness(files), example={}, sampling=Sampling(), seed=1)
    return await run_episode(spec, engine, pool, lambda: {"lookup": lookup}, REDACTION)


async def test_the_engine_is_asked_and_the_harness_is_told_what_is_recorded(pool: HarnessPool) -> None:
    engine = Echo()
    body = "return model.chat([{'role': 'user', 'content': secret}], stop=[secret])[0].text[::-1]"
    trajectory = await play(pool, body, engine, [])
    (request,) = engine.requests
    assert not isinstance(request.prompt, str)
    assert (request.prompt[0].content, request.sampling.stop) == (MARK, (MARK,))
    (call,) = trajectory.steps
    assert isinstance(call, ModelCall)
    assert call.outputs[0].text == f"is {MARK}"
    assert trajectory.answer == f"is {MARK}"[::-1]


async def test_a_tool_gets_what_the_harness_gave_and_its_result_is_told_redacted(pool: HarnessPool) -> None:
    seen: list[dict[str, Any]] = []
    trajectory = await play(pool, "return tools.call('lookup', a=secret, password='x')[::-1]", Echo(), seen)
    assert seen == [{"a": SECRET, "password": "x"}]
    (call,) = trajectory.steps
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"a": MARK, "password": "[redacted:named-value]"}
    assert call.result == json.dumps(f"found {MARK}")
    assert trajectory.answer == f"found {MARK}"[::-1]


async def test_an_answer_is_recorded_redacted(pool: HarnessPool) -> None:
    assert await play(pool, "return f'{secret}!'", Echo(), []) == Trajectory(answer=f"{MARK}!")


@pytest.mark.parametrize(
    "body",
    [
        "try:\n    tools.call('lookup', fail=True)\nexcept ToolError as e:\n    return str(e)[-60:]",
        "model.complete('')\ntry:\n    model.complete('')\nexcept ModelError as e:\n    return str(e)[-60:]",
        "sys.stderr.write(secret + 'x' * (2000 - len(secret) // 2))\nsys.stderr.flush()\nos._exit(3)",
    ],
    ids=["tool", "model", "stderr"],
)
async def test_what_is_cut_to_a_length_is_redacted_before(pool: HarnessPool, body: str) -> None:
    trajectory = await play(pool, body, Echo(), [])
    assert "xxx" in str(trajectory)
    assert HALF[:8] not in str(trajectory)
    assert HALF[-8:] not in str(trajectory)
    assert SECRET[:8] not in str(trajectory)
