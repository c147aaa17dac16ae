"""The broker: what a harness asks is answered, bounded and recorded, and whatever it does ends in a trajectory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.plugins.engine import EngineInfo, Message, Sampled, SampleRequest, asked
from bascule.runtime.engines import cassette
from bascule.runtime.episodes import broker
from bascule.runtime.episodes.broker import EpisodeSpec, Tool, call_seed, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Producer
from bascule.schemas.errors import EngineError, PromptError
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.harness import Harness, make_harness
from bascule.schemas.landscape import WorkMeasured
from bascule.schemas.subjects import trajectory_logged
from bascule.schemas.trajectory import (
    ModelCall,
    Note,
    Output,
    Sampling,
    ToolCall,
    Trajectory,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)
from tests.episodes.seen import zygotes

GOOD = "return model.chat([{'role': 'user', 'content': example['question']}])[0].text"


class CannedEngine:
    """Answers sample ``i`` of call ``c`` with ``c.i`` and keeps the requests."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.requests: list[SampleRequest] = []
        self._fail = fail

    async def start(self) -> EngineInfo:
        return EngineInfo(name="canned", model="none", model_digest="")

    async def close(self) -> None: ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def sample(self, request: SampleRequest) -> Sampled:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self._fail is not None:
            raise self._fail
        outputs = tuple(
            Output(
                token_ids=pack_ids([request.call, i]),
                logprobs=pack_floats([-0.5, -0.25]),
                text=f"{request.call}.{i}",
                finish_reason="length" if i else "stop",
            )
            for i in range(request.n)
        )
        return Sampled(prompt_ids=(1, 2, 70000), outputs=outputs)


def make_spec(
    body: str, *, manifest: dict[str, Any] | None = None, files: dict[str, str] | None = None, **options: Any
) -> EpisodeSpec:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    code = (
        "import json, os, signal, time\nfrom bascule_harness import ModelError, ToolError\n"
        "def raw(data):\n    os.write(3, len(data).to_bytes(4, 'big') + data)\n"
        f"def solve(example, model, tools, context):\n{lines}"
    )
    text = json.dumps({"name": "test", "timeout_seconds": 30, **(manifest or {})})
    own = {"harness.py": code, "system_prompt.md": "Be brief.", "manifest.json": text, **(files or {})}
    example = {"question": "3 + 4 ="}
    values: dict[str, Any] = {"trajectory": "g00-dev-0001-n0", "sampling": Sampling(), "seed": 11, "example": example}
    return EpisodeSpec(harness=make_harness(own), **{**values, **options})


@pytest.fixture
async def pool() -> AsyncIterator[HarnessPool]:
    pool = HarnessPool()
    yield pool
    await pool.close()


class Bench:
    """Runs episodes on a canned engine."""

    def __init__(self, pool: HarnessPool, engine: CannedEngine) -> None:
        self.pool = pool
        self.engine = engine

    async def __call__(self, body: str, *, tools: dict[str, Tool] | None = None, **options: Any) -> Trajectory:
        return await run_episode(make_spec(body, **options), self.engine, self.pool, lambda: tools or {})

    async def kind(self, body: str, **options: Any) -> str:
        trajectory = await self(body, **options)
        assert trajectory.answer is None
        assert trajectory.error is not None
        return trajectory.error.kind


@pytest.fixture
def bench(pool: HarnessPool) -> Bench:
    return Bench(pool, CannedEngine())


async def test_a_chat_call_is_recorded_token_for_token(bench: Bench) -> None:
    trajectory = await bench(GOOD, adapter="lora-3")
    (request,) = bench.engine.requests
    (call,) = trajectory.steps
    assert trajectory.answer == "0.0"
    assert trajectory.error is None
    assert request.prompt == (Message("user", "3 + 4 ="),)
    assert (request.trajectory, request.call, request.n, request.adapter) == ("g00-dev-0001-n0", 0, 1, "lora-3")
    assert isinstance(call, ModelCall)
    assert (call.kind, call.asked, call.seed, call.adapter) == ("chat", asked(request), request.seed, "lora-3")
    assert unpack_ids(call.prompt_ids) == [1, 2, 70000]
    assert unpack_ids(call.outputs[0].token_ids) == [0, 0]
    assert unpack_floats(call.outputs[0].logprobs) == [-0.5, -0.25]


async def test_samples_of_a_completion_come_back_in_order(bench: Bench) -> None:
    trajectory = await bench("return repr([tuple(c) for c in model.complete('3 + 4 =', n=3, stop='\\n')])")
    assert trajectory.answer == "[('0.0', 'stop'), ('0.1', 'length'), ('0.2', 'length')]"
    assert (bench.engine.requests[0].prompt, bench.engine.requests[0].sampling.stop) == ("3 + 4 =", ("\n",))
    (call,) = trajectory.steps
    assert isinstance(call, ModelCall)
    assert (call.kind, len(call.outputs)) == ("completion", 3)


async def test_steps_are_recorded_in_their_order_with_failed_tool_calls(bench: Bench) -> None:
    tries = 0

    async def add(arguments: dict[str, Any]) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("not now")
        return str(arguments["a"] + arguments["b"])

    body = """
context.note('first')
model.complete('x')
for attempt in range(2):
    try:
        total = tools.call('add', a=3, b=4)
    except ToolError as e:
        context.note(e)
try:
    tools.call('hidden')
except ToolError:
    pass
return f"{total} {tools.names}"
"""
    trajectory = await bench(body, tools={"add": add, "hidden": add}, manifest={"tools": ["add", "gone"]})
    assert trajectory.answer == "7 ('add',)"
    note, call, failed, retry, worked, hidden = trajectory.steps
    assert note == Note(text="first")
    assert isinstance(call, ModelCall)
    assert failed == ToolCall(name="add", arguments='{"a":3,"b":4}', error="ValueError: not now")
    assert retry == Note(text="ValueError: not now")
    assert worked == ToolCall(name="add", arguments='{"a":3,"b":4}', result='"7"')
    assert isinstance(hidden, ToolCall)
    assert "no tool 'hidden'" in (hidden.error or "")
    assert tries == 2


async def test_the_context_holds_the_files_the_parameters_and_the_seed(bench: Bench) -> None:
    body = (
        "return '|'.join([context.system_prompt, context.params['shots'], context.file('a/b.txt'), str(context.seed)])"
    )
    trajectory = await bench(body, manifest={"params": {"shots": "two"}}, files={"a/b.txt": "text"})
    assert trajectory.answer == "Be brief.|two|text|11"


async def test_each_call_has_its_own_seed_and_the_same_one_in_every_run(bench: Bench) -> None:
    body = "model.complete('a')\nmodel.complete('a')\nreturn 'x'"
    await bench(body)
    await bench(body)
    await bench(body, seed=12)
    seeds = [request.seed for request in bench.engine.requests]
    assert seeds[:2] == seeds[2:4] == [call_seed(11, 0), call_seed(11, 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 1 << 48 for seed in seeds)


@pytest.mark.parametrize(("forced", "temperature"), [(False, 0.25), (True, 1.0)])
async def test_a_harness_chooses_its_temperature_unless_it_is_forced(
    bench: Bench, forced: bool, temperature: float
) -> None:
    trajectory = await bench("model.complete('a', temperature=0.25)\nreturn 'x'", forced_temperature=forced)
    assert bench.engine.requests[0].sampling.temperature == temperature
    (call,) = trajectory.steps
    assert isinstance(call, ModelCall)
    assert call.sampling.temperature == temperature


async def test_the_tokens_of_a_sample_are_capped(bench: Bench) -> None:
    body = "for m in (None, 5, 1000):\n    model.complete('a', max_tokens=m)\nreturn 'x'"
    await bench(body, sampling=Sampling(max_tokens=10))
    await bench(body, sampling=Sampling(max_tokens=10), max_tokens=20)
    assert [r.sampling.max_tokens for r in bench.engine.requests] == [10, 5, 40, 10, 5, 20]


async def test_a_failing_engine_is_not_the_harness_s_failure(pool: HarnessPool) -> None:
    for error in (EngineError("The adapter is unknown."), RuntimeError("out of memory"), TimeoutError("late")):
        bench = Bench(pool, CannedEngine(error))
        assert await bench.kind("try:\n    model.complete('a')\nexcept Exception:\n    return 'guess'") == "engine"


async def test_an_engine_that_never_answers_is_not_the_harness_s_failure(
    pool: HarnessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hung(CannedEngine):
        async def sample(self, request: SampleRequest) -> Sampled:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(broker, "OVERALL_SECONDS", 0.3)
    assert await Bench(pool, Hung()).kind(GOOD, manifest={"timeout_seconds": 1}) == "engine"


async def test_a_refused_prompt_is_the_harness_s_to_handle(pool: HarnessPool) -> None:
    bench = Bench(pool, CannedEngine(PromptError("The prompt is too long.")))
    trajectory = await bench("try:\n    model.complete('a')\nexcept ModelError as e:\n    return str(e)")
    assert trajectory.answer == "The prompt is too long."
    refused = asked(bench.engine.requests[0])
    assert trajectory.steps == (Note(text="The model refused a prompt: The prompt is too long.", refused=refused),)
    assert await bench.kind("return model.complete('a')[0].text") == "crash"


async def test_a_cassette_refuses_the_prompts_that_were_refused(pool: HarnessPool, tmp_path: Path) -> None:
    class Choosy(CannedEngine):
        async def sample(self, request: SampleRequest) -> Sampled:
            if request.call == 0:
                raise PromptError("The prompt is too long.", next_step="Shorten it.")
            return await super().sample(request)

    body = "try:\n    model.complete('a')\nexcept ModelError as e:\n    return str(e) + model.complete('b')[0].text"
    recorded = await Bench(pool, Choosy())(body)
    assert recorded.answer == "The prompt is too long. Shorten it.1.0"
    logged = TrajectoryLogged(
        trajectory="g00-dev-0001-n0",
        evaluation="g00-dev",
        example="e",
        position=1,
        sample=0,
        answer=recorded.answer,
        error=None,
        prompt_tokens=0,
        output_tokens=0,
        measured=WorkMeasured(),
        body=recorded,
    )
    draft = Draft(subject=trajectory_logged("r", logged.trajectory), step=0, data=logged)
    producer = Producer(service="rollout", version="0", hash="")
    path = tmp_path / "cassette.jsonl"
    path.write_bytes(encode(draft, run="r", producer=producer, time="2026-01-01T00:00:00Z", root=None) + b"\n")
    again = await Bench(pool, cassette.make("", {"path": str(path)}))(body)
    assert (again.answer, again.steps) == (recorded.answer, recorded.steps)


@pytest.mark.parametrize("body", ["return None", "return 7", "return ['a']", "return b'a'", "pass"])
async def test_an_answer_is_a_string_or_there_is_none(bench: Bench, body: str) -> None:
    assert await bench.kind(body) == "no-answer"


async def test_an_answer_has_a_largest_size(bench: Bench) -> None:
    assert (await bench("return 'x' * 16384")).answer == "x" * 16384
    assert await bench.kind("return 'x' * 16385") == "output-limit"
    assert await bench.kind("return 'é' * 16000") == "output-limit"


@pytest.mark.parametrize(
    "frame",
    [
        "b'{'",
        "b''",
        "b'\\xff\\xfe'",
        "b'[]'",
        "b'null'",
        "b'[' * 60000",
        """b'{"op":"root"}'""",
        """b'{"op":"answer","answer":5}'""",
        """b'{"op":"answer"}'""",
        """b'{"op":"note","text":"a","more":1}'""",
        """b'{"op":"chat","messages":[]}'""",
        """b'{"op":"chat","messages":[{"role":"user"}]}'""",
        """b'{"op":"complete","prompt":"a","n":0}'""",
        """b'{"op":"complete","prompt":"a","n":1e9}'""",
        """b'{"op":"complete","prompt":"a","temperature":-1}'""",
        """b'{"op":"complete","prompt":"a","max_tokens":0}'""",
        """b'{"op":"tool","name":"a","arguments":[]}'""",
    ],
)
async def test_a_malformed_request_ends_its_episode(bench: Bench, frame: str) -> None:
    assert await bench.kind(f"raw({frame})\ntime.sleep(1000)") == "protocol"
    assert bench.engine.requests == []


async def test_samples_and_tool_calls_are_limited(bench: Bench) -> None:
    async def tool(_: dict[str, Any]) -> str:
        return "ok"

    limits = {"max_model_calls": 4, "max_tool_calls": 2, "tools": ["t"]}
    assert await bench.kind("while True: model.complete('a')", manifest=limits) == "call-limit"
    assert len(bench.engine.requests) == 4
    assert await bench.kind("model.complete('a', n=5)", manifest=limits) == "call-limit"
    assert len(bench.engine.requests) == 4
    assert (await bench("model.complete('a', n=4)\nreturn 'x'", manifest=limits)).answer == "x"
    trajectory = await bench("while True: tools.call('t')", manifest=limits, tools={"t": tool})
    assert trajectory.error is not None
    assert (trajectory.error.kind, len(trajectory.steps)) == ("call-limit", 2)


async def test_what_was_recorded_before_the_end_is_kept(bench: Bench) -> None:
    trajectory = await bench("model.complete('a')\ncontext.note('so far')\nraise ValueError('bad')")
    assert [type(step) for step in trajectory.steps] == [ModelCall, Note]
    assert trajectory.error is not None
    assert trajectory.error.kind == "crash"
    assert "exited with status 1" in trajectory.error.message
    assert trajectory.error.message.endswith("ValueError: bad")
    assert "line 8, in solve" in trajectory.error.message


async def test_messages_and_records_stay_small(bench: Bench) -> None:
    loud = {"max_output_bytes": 16 << 20}
    for body in ("raise ValueError('x' * 100000)", "print('x' * 100000, flush=True)\nos._exit(1)"):
        trajectory = await bench(body, manifest=loud)
        assert trajectory.error is not None
        assert len(trajectory.error.message) < 3000
    trajectory = await bench("while True: context.note('x')", manifest=loud)
    assert trajectory.error is not None
    assert trajectory.error.kind == "output-limit"
    assert len(trajectory.steps) == broker.MAX_NOTES


async def test_a_trajectory_survives_its_encoding(bench: Bench) -> None:
    trajectory = await bench("context.note('\\ud800 é')\nmodel.complete('\\ud800')\nreturn 'z\\ud800'")
    assert trajectory.answer == "z?"
    assert msgspec.json.decode(msgspec.json.encode(trajectory), type=Trajectory) == trajectory


async def test_an_episode_that_was_lost_with_its_zygote_is_played_again(pool: HarnessPool) -> None:
    class Deadly(CannedEngine):
        async def sample(self, request: SampleRequest) -> Sampled:
            if not self.requests:
                (zygote,) = zygotes()
                os.kill(zygote, signal.SIGKILL)
            return await super().sample(request)

    bench = Bench(pool, Deadly())
    trajectory = await bench(f"{GOOD.replace('return', 'text =')}\nreturn text")
    assert trajectory.answer == "0.0"
    assert len(trajectory.steps) == 1
    assert [request.call for request in bench.engine.requests] == [0, 0]


async def test_tools_of_an_episode_that_is_played_again_begin_anew(pool: HarnessPool) -> None:
    calls: list[int] = []

    def make() -> dict[str, Tool]:
        own: list[int] = []

        async def step(_: dict[str, Any]) -> str:
            own.append(1)
            calls.append(len(own))
            if len(calls) == 2:
                (zygote,) = zygotes()
                os.kill(zygote, signal.SIGKILL)
            return str(len(own))

        return {"step": step}

    spec = make_spec("tools.call('step')\nreturn tools.call('step')", manifest={"tools": ["step"]})
    trajectory = await run_episode(spec, CannedEngine(), pool, make)
    assert (trajectory.answer, trajectory.error) == ("2", None)
    assert calls == [1, 2, 1, 2]


BAD = {
    "raise ValueError('no')": "crash",
    "os._exit(3)": "crash",
    "os.kill(os.getpid(), signal.SIGKILL)": "crash",
    "import ctypes; ctypes.string_at(0)": "crash",
    "import broken": "crash",
    "bytearray(4 << 30)": "crash",
    "open('big', 'wb').write(bytes(32 << 20))": "crash",
    "while True: pass": "timeout",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)": "timeout",
    "while True: print('x' * 4096)": "output-limit",
    "while True: context.note('x' * 4096)": "output-limit",
    "os.write(3, b'\\xff' * 4); time.sleep(1000)": "output-limit",
    "raw(b'{'); time.sleep(1000)": "protocol",
    "while True: model.complete('a')": "call-limit",
    "return 5": "no-answer",
    "[os.fork() or time.sleep(1000) for _ in range(20)]; return 5": "no-answer",
    "[os.fork() or time.sleep(1000) for _ in range(500)]; return 5": "crash",
    "if os.fork(): return 5\nif os.fork(): os._exit(0)\ntime.sleep(1000)": "no-answer",
}


async def test_bad_episodes_cost_themselves_and_not_the_good_ones(bench: Bench) -> None:
    brief = {"timeout_seconds": 5, "max_output_bytes": 65536}
    broken = {"broken.py": "x = 1\nx.y = = 2\n"}

    async def bad(body: str) -> Trajectory:
        spec = make_spec(body, manifest=brief)
        harness = Harness(files={**spec.harness.files, **broken}, digest=spec.harness.digest)
        return await run_episode(msgspec.structs.replace(spec, harness=harness), bench.engine, bench.pool, dict)

    good = [bench(GOOD, seed=number) for number in range(50)]
    results = await asyncio.gather(*good, *(bad(body) for body in BAD))
    assert [trajectory.answer for trajectory in results[:50]] == ["0.0"] * 50
    assert [trajectory.error and trajectory.error.kind for trajectory in results[50:]] == list(BAD.values())
    assert (await bench(GOOD)).answer == "0.0"
