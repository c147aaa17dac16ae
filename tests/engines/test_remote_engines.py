"""Engines of models behind endpoints: what they give is recorded, and what they do not is declared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("anthropic")

from bascule.plugins.engine import Engine, Message, SampleRequest
from bascule.plugins.kit_engine import Conditions, check_engine
from bascule.plugins.loader import plugins
from bascule.runtime.cli.configuration import configure, preflight
from bascule.runtime.doctor.endpoints import wanted
from bascule.runtime.engines import anthropic, openai
from bascule.runtime.engines.wire import read_key
from bascule.runtime.services.inference import start_engine
from bascule.runtime.services.rollout import tokens_of
from bascule.runtime.spending import paid_target
from bascule.schemas.errors import ConfigError, EngineError, PromptError
from bascule.schemas.run import PluginChoice, RunConfig, parse_config
from bascule.schemas.trajectory import ModelCall, Sampling, Trajectory, unpack_floats, unpack_ids
from tests.models.server import KEY, Fault, Script, Server, completion, in_turn, message, serving, text


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", KEY)


def claude(server: Server, **params: Any) -> Engine:
    given = {"base_url": server.url, "key_env": "ENDPOINT_KEY", "model": "m", "max_retries": 0, **params}
    return anthropic.make("local", given)


def compatible(server: Server, **params: Any) -> Engine:
    given = {"url": f"{server.url}/v1", "key_env": "ENDPOINT_KEY", "model": "m", "retries": 0, **params}
    return openai.make("local", given)


def request(*messages: tuple[str, str], n: int = 1, **sampling: Any) -> SampleRequest:
    prompt = tuple(Message(role, content) for role, content in messages or (("user", "12 + 13?"),))
    return SampleRequest(
        trajectory="g00-dev-0000-s0", call=0, prompt=prompt, n=n, sampling=Sampling(**sampling), seed=5
    )


def echo(asked: dict[str, Any], _: int) -> dict[str, Any]:
    """As many answers as are asked for, each with the question."""
    many = completion(f"{asked['messages'][-1]['content']} is 25. Done.")
    many["choices"] = [{**many["choices"][0], "index": i} for i in range(asked.get("n", 1))]
    return many


async def test_a_model_behind_the_messages_api_answers_and_its_tokens_are_counted() -> None:
    script: Script = in_turn(message(text("12 + 13 = 25. Done."), cache_read_input_tokens=7))
    with serving(script) as server:
        engine = claude(server)
        info = await engine.start()
        assert [info.token_ids, info.logprobs, info.seeds, info.adapters] == [False] * 4
        asked = request(("system", "Be short."), ("user", "12 + 13?"), n=2, stop=(" Done", " "), max_tokens=9)
        sampled = await engine.sample(asked)
        await engine.close()
    assert [o.text for o in sampled.outputs] == ["12"] * 2  # the blank is looked for here: the API takes none
    assert sampled.usage == (2 * 107, 2 * 20)
    sent = server.requests[0]
    assert (sent["max_tokens"], sent["stop_sequences"]) == (9, [" Done"])
    assert "Be short." in str(sent["system"])
    assert "temperature" not in sent
    assert "cache_control" not in str(sent)
    call = ModelCall(
        kind="chat", asked="", prompt_ids=b"", outputs=sampled.outputs, sampling=asked.sampling, usage=sampled.usage
    )
    assert tokens_of(Trajectory(steps=(call,))) == (214, 40)


@pytest.mark.parametrize(
    ("name", "params", "model", "asked"),
    [
        ("anthropic", {}, "claude-x", "claude-x"),
        ("anthropic", {"model": "claude-y"}, "claude-x", "claude-y"),
        ("anthropic", {"model": ""}, "claude-x", "claude-x"),
        ("anthropic", {}, None, "claude-sonnet-5-5"),
        ("openai", {}, "gpt-x", "gpt-x"),
        ("openai", {"model": "gpt-y"}, "gpt-x", "gpt-y"),
        ("openai", {"model": ""}, "gpt-x", "gpt-x"),
        ("openai", {}, None, "smollm2-135m-instruct"),
    ],
)
async def test_the_model_that_a_run_names_is_asked_looked_for_and_paid(
    name: str, params: dict[str, Any], model: str | None, asked: str
) -> None:
    script: Script = lambda _, __: message(text("yes")) if name == "anthropic" else completion("yes")  # noqa: E731
    with serving(script) as server:
        at = {"base_url": server.url} if name == "anthropic" else {"url": f"{server.url}/v1"}
        choice = PluginChoice(name=name, params={**at, "key_env": "ENDPOINT_KEY", **params})
        named = {} if model is None else {"model": model}
        config = RunConfig(task=PluginChoice(name="arith"), engine=choice, **named)
        engine = plugins().registry.engines.get(name)(config.model, choice.params)
        info = await engine.start()
        await engine.sample(request())
        await engine.close()
    assert [sent["model"] for sent in server.requests] == [asked] * len(server.requests)
    assert [one.model for one in wanted(config)] == [info.model] == [paid_target(config)] == [asked]


@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
async def test_the_doctor_asks_where_the_engine_does(path: str) -> None:
    with serving(in_turn(Fault(404))) as server:
        params = {"url": f"{server.url}{path}", "key_env": "ENDPOINT_KEY", "model": "m"}
        (one,) = wanted(RunConfig(task=PluginChoice(name="arith"), engine=PluginChoice(name="openai", params=params)))
        engine = openai.make("local", params)
        with pytest.raises(EngineError, match=f"{one.url}/chat/completions answered 404"):
            await engine.start()
        await engine.close()


async def test_failures_of_the_messages_api_are_engine_errors_without_the_key() -> None:
    faults = in_turn(
        Fault(529, f"overloaded, {KEY}"),
        Fault(404, f"model: m, {KEY}"),
        message(text("x"), stop_reason="max_tokens"),
    )
    with serving(faults) as server:
        engine = claude(server)
        await engine.start()
        for words in ("529", "knows no model"):
            with pytest.raises(EngineError, match=words) as caught:
                await engine.sample(request())
            assert caught.value.next_step
            assert KEY not in str(caught.value)
        (output,) = (await engine.sample(request())).outputs
        assert output.finish_reason == "length"
        with pytest.raises(PromptError, match="role 'tool'"):
            await engine.sample(request(("tool", "x")))
        with pytest.raises(EngineError, match="takes no adapters"):
            await engine.sample(SampleRequest(**{**_fields(request()), "adapter": "v1"}))
        await engine.close()


WRONG = "sk-wrong-0123456789abcdef"


@pytest.mark.parametrize("make", [claude, compatible])
@pytest.mark.parametrize(
    ("key", "said"),
    [
        (WRONG, "401"),
        (f"{WRONG}\nmore", "ENDPOINT_KEY.* holds white space or other characters"),
        (f"{WRONG}é", "ENDPOINT_KEY.* holds white space or other characters"),
    ],
)
async def test_a_key_that_is_refused_stands_in_no_message(
    make: Callable[[Server], Engine], key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", key)
    with serving(in_turn()) as server:  # which quotes the key that it refuses
        engine = make(server)

        async def asked() -> None:
            await engine.start()
            await engine.sample(request())

        with pytest.raises((EngineError, ConfigError), match=said) as caught:
            await asked()
        await engine.close()
    assert WRONG not in str(caught.value)
    assert caught.value.next_step


async def test_a_key_that_an_endpoint_quotes_in_a_failure_stands_in_no_message() -> None:
    with serving(in_turn(completion("yes"), Fault(404, f"no model for {KEY}"))) as server:
        engine = compatible(server)
        await engine.start()
        with pytest.raises(EngineError, match=r"no model for \[key\]"):
            await engine.sample(request())
        await engine.close()


@pytest.mark.parametrize(
    ("make", "answer"), [(claude, message(text("x"))), (partial(compatible, many=False), completion("x"))]
)
async def test_the_first_sample_that_fails_ends_the_others(make: Callable[..., Engine], answer: dict[str, Any]) -> None:
    failing = True
    with serving(lambda _, __: Fault(404, "no such model") if failing and started else answer) as server:
        started = False
        engine = make(server, concurrency=1)
        await engine.start()
        started, before = True, len(server.requests)
        with pytest.raises(EngineError, match="no such model"):
            await engine.sample(request(n=5))
        failing = False
        await engine.sample(request())  # waits its turn behind all that was asked before
        # That which failed, this one, and at most one that took its place before it was cancelled.
        assert len(server.requests) - before < 4
        await engine.close()


def _fields(asked: SampleRequest) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in asked.__struct_fields__}


async def test_closing_ends_calls_that_an_endpoint_does_not_answer() -> None:
    with serving(lambda _, __: Fault(hang=True)) as server:
        engine = claude(server)
        await engine.start()
        waiting = asyncio.create_task(engine.sample(request()))
        await asyncio.to_thread(server.wait_for, 1)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting


async def test_an_endpoint_without_ids_declares_none_and_many_samples_are_one_call() -> None:
    with serving(echo) as server:
        engine = compatible(server)
        info = await engine.start()
        assert [info.token_ids, info.logprobs, info.adapters] == [False] * 3
        sampled = await engine.sample(request(n=3, stop=("Done",)))
        assert [o.text for o in sampled.outputs] == ["12 + 13? is 25. "] * 3
        assert sampled.usage == (120, 7)
        assert server.requests[-1]["n"] == 3
        single = compatible(server, many=False)
        await single.start()
        before = len(server.requests)
        assert len((await single.sample(request(n=3))).outputs) == 3
        assert [r["n"] for r in server.requests[before:]] == [1, 1, 1]
        assert len({r["seed"] for r in server.requests[before:]}) == 3
        await engine.close()
        await single.close()


async def test_a_model_that_refuses_temperatures_is_sent_none_and_a_greedy_group_is_one_call() -> None:
    def script(asked: dict[str, Any], number: int) -> dict[str, Any] | Fault:
        return Fault(400, "Only the default (1) is supported.") if "temperature" in asked else echo(asked, number)

    with serving(script) as server:
        engine = compatible(server, temperature=False)
        await engine.start()
        before = len(server.requests)
        for heat in (0, 0.7):
            assert len((await engine.sample(request(n=3, temperature=heat))).outputs) == 3
        assert [r["n"] for r in server.requests[before:]] == [3, 3]
        await engine.close()


@pytest.mark.parametrize("said", [b"<html>Sign in</html>", b"", b"\xff{"])
async def test_an_answer_that_is_said_to_be_json_and_is_none_is_an_engine_error(said: bytes) -> None:
    with serving(in_turn(completion("yes"), Fault(200, raw=said))) as server:
        engine = compatible(server)
        await engine.start()
        with pytest.raises(EngineError, match="does not answer in JSON") as caught:
            await engine.sample(request())
        assert caught.value.next_step
        await engine.close()


def test_an_empty_name_of_a_variable_means_no_key() -> None:
    assert read_key("") is read_key(None) is None
    assert read_key("ENDPOINT_KEY") == KEY


PRICED = {"prices": {"m": {"input": 1, "output": 2}}, "machine": {"gpu_hour": 0, "cpu_hour": 0}}
FREE = {**PRICED, "prices": {"m": {"input": 0, "output": 0}}}


@pytest.mark.parametrize(
    ("usage", "bounds", "held"),
    [
        (False, {"budget": {"tokens": 1000}}, False),
        (False, {"budget": {"levers": {"harness": {"tokens": 1000}}}}, False),
        (False, {"budget": {"dollars": 1}, **PRICED}, False),
        (False, {"budget": {"dollars": 1}, **FREE}, True),
        (False, {"budget": {"rollouts": 9}}, True),
        (True, {"budget": {"tokens": 1000}}, True),
    ],
)
async def test_a_budget_of_tokens_is_refused_at_the_start_where_the_endpoint_counts_none(
    usage: bool, bounds: dict[str, Any], held: bool
) -> None:
    answer = completion("yes")
    if not usage:
        del answer["usage"]
    with serving(lambda *_: answer) as server:
        engine = compatible(server)
        given = {"task": {"name": "arith"}, "engine": {"name": "openai", "params": {"model": "m"}}}
        config = parse_config({**given, "levers": ["harness"], **bounds})
        view: Any = SimpleNamespace(
            world=SimpleNamespace(config=config),
            state=SimpleNamespace(started=None),
            logger=SimpleNamespace(info=lambda *_, **__: None),
        )
        if held:
            await start_engine(view, engine, config.engine)
        else:
            with pytest.raises(EngineError, match=r"budget counts tokens, and .*tells neither"):
                await start_engine(view, engine, config.engine)
        await engine.close()


async def test_stop_strings_of_a_model_that_thinks_are_for_its_answer() -> None:
    with serving(lambda *_: completion("<think>\n12 and\n13\n</think>\n\n25\nDone")) as server:
        engine = compatible(server, model="Qwen3-8B")
        await engine.start()
        (output,) = (await engine.sample(request(stop=("\n",)))).outputs
        assert output.text == "25"
        assert "stop" not in server.requests[-1]
        await engine.close()


async def test_ids_and_logprobs_are_recorded_where_the_endpoint_gives_them() -> None:
    def script(asked: dict[str, Any], _: int) -> dict[str, Any]:
        answer = completion("yes")
        if asked.get("return_token_ids"):
            answer["prompt_token_ids"] = [1, 2, 3]
            answer["choices"][0] |= {"token_ids": [7, 8], "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]}}
        return answer

    with serving(script) as server:
        engine = compatible(server)
        info = await engine.start()
        assert info.token_ids
        assert info.logprobs
        sampled = await engine.sample(request())
        await engine.close()
    assert sampled.prompt_ids == (1, 2, 3)
    (output,) = sampled.outputs
    assert unpack_ids(output.token_ids) == [7, 8]
    assert unpack_floats(output.logprobs) == [-0.5, -1.0]


async def test_an_endpoint_that_refuses_what_it_does_not_know_is_asked_without() -> None:
    def script(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
        return Fault(400, "Unknown parameter: return_token_ids") if "return_token_ids" in asked else completion("yes")

    with serving(script) as server:
        engine = compatible(server)
        assert not (await engine.start()).token_ids
        await engine.close()
        assert ["return_token_ids" in r for r in server.requests] == [True, False]


async def test_log_probabilities_of_a_text_prompt_are_asked_for_and_recorded_as_well() -> None:
    def script(asked: dict[str, Any], _: int) -> dict[str, Any]:
        if "messages" in asked:
            answer = completion("yes")
            answer["prompt_token_ids"] = [1]
            answer["choices"][0] |= {"token_ids": [7], "logprobs": {"content": [{"logprob": -0.5}]}}
            return answer
        choice = {"index": 0, "text": "25", "finish_reason": "stop", "prompt_token_ids": [1, 2], "token_ids": [7, 8]}
        logprobs = {"tokens": ["2", "5"], "token_logprobs": [-0.5, -1.0], "top_logprobs": None}
        return {"choices": [{**choice, "logprobs": logprobs if asked.get("logprobs") else None}]}

    with serving(script) as server:
        engine = compatible(server)
        assert (await engine.start()).logprobs
        sampled = await engine.sample(SampleRequest(**{**_fields(request()), "prompt": "12 + 13 ="}))
        await engine.close()
    assert server.paths[-1] == "/v1/completions"
    assert type(server.requests[-1]["logprobs"]) is int
    assert sampled.prompt_ids == (1, 2)
    (output,) = sampled.outputs
    assert unpack_floats(output.logprobs) == [-0.5, -1.0]


@pytest.mark.parametrize("make", [claude, compatible])
async def test_what_an_endpoint_refuses_of_one_prompt_is_the_prompt_s_and_of_any_it_is_the_endpoint_s(
    make: Callable[[Server], Engine],
) -> None:
    broken = False

    def script(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
        if "strange" in str(asked["messages"]) or broken:
            return Fault(400, "The content filter was triggered.")
        return message(text("25")) if make is claude else completion("25")

    with serving(script) as server:
        engine = make(server)
        await engine.start()
        with pytest.raises(PromptError, match="content filter"):
            await engine.sample(request(("user", "a strange case")))
        assert (await engine.sample(request())).outputs[0].text == "25"
        broken = True
        with pytest.raises(EngineError, match="content filter") as caught:
            await engine.sample(request(("user", "a strange case")))
        assert not isinstance(caught.value, PromptError)
        await engine.close()


@pytest.mark.parametrize("make", [claude, compatible])
async def test_a_longer_answer_than_the_model_gives_is_the_run_s_until_something_was_answered(
    make: Callable[[Server], Engine],
) -> None:
    def script(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
        if asked["max_tokens"] > 4096:
            return Fault(400, "max_tokens: 8192 > 4096, the maximum of output tokens")
        return message(text("25")) if make is claude else completion("25")

    with serving(script) as server:
        engine = make(server)
        await engine.start()
        with pytest.raises(EngineError, match="8192 > 4096") as caught:
            await engine.sample(request(max_tokens=8192))
        assert not isinstance(caught.value, PromptError)
        await engine.sample(request(max_tokens=4096))
        with pytest.raises(PromptError, match="8192 > 4096"):
            await engine.sample(request(max_tokens=8192))
        await engine.close()


async def test_a_text_prompt_is_refused_by_an_endpoint_that_has_chats_alone() -> None:
    here = True

    def script(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
        return Fault(404, "This is a chat model") if "prompt" in asked or not here else completion("yes")

    with serving(script) as server:
        engine = compatible(server)
        await engine.start()
        asked = SampleRequest(**{**_fields(request()), "prompt": "12 + 13 ="})
        with pytest.raises(PromptError, match="answered 404: This is a chat model"):
            await engine.sample(asked)
        here = False
        with pytest.raises(EngineError, match="answered 404") as caught:
            await engine.sample(asked)
        assert not isinstance(caught.value, PromptError)
        await engine.close()


async def test_more_answers_and_stop_strings_than_an_endpoint_takes_at_once_are_had_all_the_same() -> None:
    def script(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
        if len(asked.get("stop", ())) > 4 or asked.get("n", 1) > 128:
            return Fault(400, "too many")
        return {
            **(many := completion("one two six")),
            "choices": [{**many["choices"][0], "index": i} for i in range(asked.get("n", 1))],
        }

    with serving(script) as server:
        engine = compatible(server)
        await engine.start()
        sampled = await engine.sample(request(n=300, stop=("a", "b", "c", "d", "six", "f")))
        await engine.close()
    assert [o.text for o in sampled.outputs] == ["one two "] * 300
    assert len({sent["seed"] for sent in server.requests[1:]}) == 3


CONTEXT = 400
ANSWER = "A bascule has two arms."


def messages_api(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
    if len(str(asked["messages"])) > CONTEXT:
        return Fault(400, f"prompt is too long: {2 * CONTEXT} tokens > {CONTEXT} maximum")
    return message(text(ANSWER))


def completions_api(asked: dict[str, Any], _: int) -> dict[str, Any] | Fault:
    """Answers texts and conversations, each that number of times that it is asked for; cuts at stop strings."""
    if len(str(asked.get("prompt") or asked["messages"])) > CONTEXT:
        return Fault(400, f"This model's maximum context length is {CONTEXT} tokens.")
    said = ANSWER
    for stop in asked.get("stop", ()):
        said = said.partition(stop)[0]
    answer = completion(said)
    (choice,) = answer["choices"]
    if "prompt" in asked:
        choice["text"] = choice.pop("message")["content"]
    return {**answer, "choices": [{**choice, "index": i} for i in range(asked.get("n", 1))]}


@pytest.mark.parametrize(("make", "script"), [(claude, messages_api), (compatible, completions_api)])
async def test_it_keeps_what_the_kit_asks_of_every_engine(make: Callable[[Server], Engine], script: Script) -> None:
    with serving(script) as server:
        checks = [c async for c in check_engine(make(server), Conditions(context=CONTEXT))]
    assert {c.name: c.found for c in checks if c.outcome == "broken"} == {}
    assert {c.name: c.outcome for c in checks}["too-long"] == "held"


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_a_run_that_is_to_train_is_refused_before_it_starts(name: str) -> None:
    given = {"task": {"name": "arith"}, "engine": {"name": name, "params": {"model": "m"}}}
    with pytest.raises(ConfigError, match="no adapters") as caught:
        preflight(configure({**given, "levers": ["harness", "weights"]}, [], plugins()), plugins())
    assert "--levers harness" in str(caught.value)
    assert preflight(configure({**given, "levers": ["harness"]}, [], plugins()), plugins())


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("openai", {"url": "http://127.0.0.1:80o0"}),
        ("openai", {"url": ""}),
        ("anthropic", {"base_url": "http://[::1"}),
        ("vllm", {"url": "localhost:8000"}),
        ("vllm", {"urls": ["http://127.0.0.1:8000", "http://me:hunter2@127.0.0.1:8001"]}),
    ],
)
def test_a_run_whose_engine_could_ask_nobody_is_refused_before_it_starts(name: str, params: dict[str, Any]) -> None:
    given = {"task": {"name": "arith"}, "engine": {"name": name, "params": params}, "levers": ["harness"]}
    with pytest.raises(ConfigError, match=f"The engine '{name}' has the (base_)?url") as caught:
        preflight(configure(given, [], plugins()), plugins())
    assert "hunter2" not in str(caught.value)


def test_the_guide_to_plugins_names_every_engine_that_is_built_in() -> None:
    guide = (Path(__file__).parents[2] / "plugins" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith("| engine |")]
    assert [name for name in plugins().registry.engines.items if f"`{name}`" not in row] == []
