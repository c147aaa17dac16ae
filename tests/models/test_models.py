"""Models behind real sockets, asked by the real SDKs: answers, tokens, retries, and what is said of failures."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from bascule.plugins.models import attempts
from bascule.plugins.models.anthropic import cached
from bascule.plugins.models.endpoint import OVER_CONTEXT, Endpoint, Refused, ask, check_endpoint, check_ready, check_url
from bascule.plugins.models.messages import NO_JSON, call_of, tool
from bascule.plugins.models.openai import translated
from bascule.plugins.policy import Performed
from bascule.schemas.errors import ConfigError, ModelError
from tests.models.server import KEY, Fault, Script, Server, completion, in_turn, message, serving, text, use

CHOOSE = tool("choose", "Choose.", {"choice": {"type": "string"}}, ["choice"])
Made = Callable[..., Endpoint]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_TEST_KEY", KEY)
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def endpoint(server: Server, provider: str = "anthropic", **params: Any) -> Endpoint:
    url = server.url if provider == "anthropic" else f"{server.url}/v1"
    given = {"base_url": url, "key_env": "MODEL_TEST_KEY", "model": "m-1", "max_retries": 2, **params}
    return Endpoint(provider=provider, **given)  # type: ignore[arg-type]


def request_of(made: Endpoint, messages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return call_of(
        made,
        system="You choose.",
        messages=messages or [{"role": "user", "content": "Which?"}],
        tools=[CHOOSE],
        tool_choice={"type": "tool", "name": "choose"},
    ).request


async def asked(script: Script, provider: str = "anthropic", **params: Any) -> tuple[Performed, Server]:
    with serving(script) as server:
        made = endpoint(server, provider, **params)
        return await ask(made, request_of(made)), server


async def failed(script: Script, provider: str = "anthropic", **params: Any) -> tuple[str, Server]:
    with serving(script) as server:
        made = endpoint(server, provider, **params)
        with pytest.raises(ModelError) as error:
            await ask(made, request_of(made))
    assert KEY not in str(error.value)
    assert error.value.next_step
    return str(error.value), server


async def test_claude_answers_with_a_tool_and_its_tokens_are_counted_apart() -> None:
    answer = message(
        text("so"), use("choose", {"choice": "b"}), cache_read_input_tokens=40, cache_creation_input_tokens=7
    )
    performed, server = await asked(in_turn(answer))
    assert performed.answer["content"] == [text("so"), use("choose", {"choice": "b"})]
    assert (performed.input_tokens, performed.output_tokens) == (100, 20)
    assert (performed.cache_read_tokens, performed.cache_write_tokens) == (40, 7)
    assert performed.stop_reason == "tool_use"
    assert performed.pause is None
    assert server.requests[0]["tool_choice"] == {"type": "tool", "name": "choose"}
    assert "temperature" not in server.requests[0]
    assert "anthropic-version" in server.headers[0]


async def test_tools_system_first_message_and_what_was_said_are_marked_for_the_cache() -> None:
    said = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": [use("choose", {})]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_01", "content": "no"}]},
    ]
    with serving(in_turn(message(text("a")))) as server:
        made = endpoint(server, temperature=0.5)
        request = request_of(made, said)
        await ask(made, request)
    sent = server.requests[0]
    marked = [sent["tools"][-1], sent["system"][-1], *(sent["messages"][i]["content"][-1] for i in (0, 2))]
    assert all(block["cache_control"] == {"type": "ephemeral"} for block in marked)
    assert str(sent).count("cache_control") == 4
    assert sent["temperature"] == 0.5
    assert "cache_control" not in str(request)
    assert cached(request)["messages"][1] == said[1]


async def test_an_openai_compatible_endpoint_is_asked_and_understood_in_the_same_form() -> None:
    performed, server = await asked(
        in_turn(completion("so", {"choose": '{"choice": "b"}'})), "openai", temperature=0.25
    )
    assert performed.answer["content"] == [text("so"), use("choose", {"choice": "b"}, "call_0")]
    assert performed.stop_reason == "tool_use"
    assert (performed.input_tokens, performed.output_tokens, performed.cache_read_tokens) == (70, 7, 50)
    sent = server.requests[0]
    assert sent["messages"] == [{"role": "system", "content": "You choose."}, {"role": "user", "content": "Which?"}]
    assert sent["tools"][0]["function"]["parameters"] == CHOOSE["input_schema"]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "choose"}}
    assert sent["max_tokens"] == 8192
    assert sent["temperature"] == 0.25


def test_a_conversation_is_translated_with_its_tool_calls_results_and_remarks() -> None:
    made = Endpoint(provider="openai", model="m-1")
    said = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": [use("choose", {"choice": "x"}, "a"), use("choose", {NO_JSON: "{oh"}, "b")]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "b", "content": "yes"},
                text("the last one"),
            ],
        },
    ]
    sent = translated(request_of(made, said), own=True)
    assert sent["max_completion_tokens"] == 8192
    _, _, spoken, *rest = sent["messages"]
    assert [c["function"]["arguments"] for c in spoken["tool_calls"]] == ['{"choice":"x"}', "{oh"]
    assert rest == [
        {"role": "tool", "tool_call_id": "a", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "b", "content": "yes"},
        {"role": "user", "content": "the last one"},
    ]


async def test_arguments_that_are_no_json_are_kept_and_marked() -> None:
    performed, _ = await asked(in_turn(completion(None, {"choose": "{oh"})), "openai")
    assert performed.answer["content"][0]["input"] == {NO_JSON: "{oh"}


@pytest.mark.parametrize(
    "fault",
    [Fault(429, headers={"retry-after": "0.01"}), Fault(500), Fault(529), Fault(), Fault(cut=True)],
    ids=["429", "500", "529", "closed", "cut"],
)
async def test_what_passes_is_tried_again_with_a_line_for_each(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "bascule.models")
    performed, server = await asked(in_turn(fault, message(text("a"))))
    assert performed.answer["content"] == [text("a")]
    assert len(server.requests) == 2
    assert [r.getMessage() for r in caplog.records if "retry 1 of 2" in r.getMessage()]
    assert KEY not in caplog.text


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
async def test_out_of_retries_names_endpoint_model_and_what_to_do(provider: str) -> None:
    said, server = await failed(in_turn(Fault(503, "down for now")), provider, max_retries=1)
    assert len(server.requests) == 2
    assert "m-1 at http://127.0.0.1" in said
    assert "after 2 attempts" in said
    assert "503" in said
    assert "bascule resume" in said


async def test_an_endpoint_that_wants_to_be_left_alone_for_longer_than_a_call_may_take_is_not_waited_for() -> None:
    said, server = await failed(in_turn(Fault(429, headers={"retry-after": "3600"})), total_s=30)
    assert len(server.requests) == 1
    assert "429" in said


async def test_a_call_ends_after_its_whole_time() -> None:
    said, _ = await failed(in_turn(Fault(hang=True)), total_s=0.5)
    assert "within 0.5 s, all attempts together. " in said
    said, _ = await failed(in_turn(*[Fault(503)] * 20), total_s=1.0, max_retries=20)
    assert "an attempt before was answered with status 503" in said
    with serving(in_turn()) as server:
        gone = endpoint(server, max_retries=20, total_s=2.0)
    with pytest.raises(ModelError, match="an attempt before had no connection, or lost it"):
        await ask(gone, request_of(gone))


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
async def test_a_wrong_key_is_said_without_the_key(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "sk-wrong-9876543210fedcba"
    monkeypatch.setenv("MODEL_TEST_KEY", wrong)
    said, server = await failed(in_turn(), provider)
    assert server.requests == []
    assert "MODEL_TEST_KEY" in said
    assert wrong not in said


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
@pytest.mark.parametrize("key", ["sk-first\nsecond", "sk-first second", "sk-first-sécond", "sk-first-second\n"])
async def test_a_key_that_no_header_takes_is_refused_by_its_variable(
    provider: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_TEST_KEY", key)
    said, server = await failed(in_turn(), provider)
    assert server.requests == []
    assert "MODEL_TEST_KEY holds white space or other characters" in said
    assert "first" not in said


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(400, "messages: too strange"), Refused),
        (Fault(404, "too long"), ModelError),
    ],
)
async def test_what_is_refused_is_told_apart(provider: str, fault: Fault, kind: type[ModelError]) -> None:
    with serving(in_turn(fault)) as server:
        made = endpoint(server, provider)
        with pytest.raises(ModelError) as error:
            await ask(made, request_of(made))
    assert type(error.value) is kind


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(400, "prompt is too long: 210000 tokens > 200000 maximum"),
        Fault(400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"),
        Fault(413, "Request exceeds the maximum size"),
    ],
)
async def test_what_is_refused_as_too_long_is_an_answer_that_says_so(provider: str, fault: Fault) -> None:
    performed, _ = await asked(in_turn(fault), provider)
    assert performed.stop_reason == OVER_CONTEXT
    assert fault.message in performed.answer["error"]
    assert performed.pause is not None
    assert fault.message in performed.pause
    assert "a lower max_tokens" in performed.pause


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
async def test_an_unknown_model_is_named(provider: str) -> None:
    said, server = await failed(in_turn(Fault(404, "model: m-1")), provider)
    assert len(server.requests) == 1
    assert "no model 'm-1'" in said


async def test_an_endpoint_that_is_not_there_is_named() -> None:
    with serving(in_turn()) as server:
        gone = endpoint(server, max_retries=1)
    with pytest.raises(ModelError, match="cannot be reached, after 2 attempts"):
        await ask(gone, request_of(gone))


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
async def test_another_api_behind_the_url_is_said(provider: str) -> None:
    said, _ = await failed(in_turn(Fault(raw=b'{"hello": "world"}')), provider)
    assert f"not of the provider {provider}" in said


@pytest.mark.parametrize(
    ("provider", "answer", "said"),
    [
        ("anthropic", message(use("choose", {}), stop_reason="max_tokens"), "cut off at max_tokens = 8192"),
        ("openai", completion(None, {"choose": '{"cho'}, finish_reason="length"), "cut off at max_tokens = 8192"),
        ("anthropic", message(stop_reason="refusal"), "refused to answer"),
        ("openai", completion(None, finish_reason="content_filter"), "refused to answer"),
        ("anthropic", message(stop_reason="model_context_window_exceeded"), "does not fit into the context"),
        ("anthropic", message(use("write", {"content": "x" * (1 << 18)})), "is over 262144 bytes"),
    ],
)
async def test_an_answer_that_is_cut_off_or_refused_is_counted_and_pauses(
    provider: str, answer: dict[str, Any], said: str
) -> None:
    performed, _ = await asked(in_turn(answer), provider)
    assert performed.output_tokens > 0
    assert performed.pause is not None
    assert said in performed.pause
    assert "m-1 at http://127.0.0.1" in performed.pause


async def test_what_is_too_large_to_be_recorded_is_not_kept_and_its_tokens_are() -> None:
    performed, _ = await asked(in_turn(message(use("write", {"content": "x" * (1 << 20)}))))
    assert len(msgspec.json.encode(performed.answer)) < 1000
    assert performed.output_tokens > 0


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
async def test_tokens_below_zero_are_no_answer(provider: str) -> None:
    answer: dict[str, Any] = message(use("choose", {}), input_tokens=-5)
    if provider == "openai":
        answer = completion(None, {"choose": "{}"}, finish_reason="stop")
        answer["usage"]["prompt_tokens"] = -5
    said, _ = await failed(in_turn(answer), provider)
    assert f"not of the provider {provider}" in said


async def test_an_endpoint_that_takes_its_time_is_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE", 0.2)
    said, _ = await failed(in_turn(Fault(hang=True)), total_s=1.0, max_retries=0)
    assert "within 1 s" in said
    assert 3 <= caplog.text.count("has not answered yet") <= 5


async def test_a_model_that_cannot_be_made_to_use_a_tool_is_asked_to() -> None:
    refused = Fault(400, "tool_choice: this model does not support forced tool use")
    performed, server = await asked(in_turn(refused, message(use("choose", {"choice": "b"}))))
    assert performed.stop_reason == "tool_use"
    assert [r["tool_choice"]["type"] for r in server.requests] == ["tool", "auto"]


async def test_any_other_bad_request_is_told() -> None:
    said, server = await failed(in_turn(Fault(400, "messages: too strange")))
    assert len(server.requests) == 1
    assert "messages: too strange" in said


def test_without_a_key_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="ANTHROPIC_API_KEY is not set") as caught:
        check_ready(Endpoint())
    assert "feedback" not in str(caught.value)  # an engine's model is asked by another service
    check_ready(Endpoint(provider="openai", model="m", base_url="http://127.0.0.1:1", key_env=""))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"provider": "openai"}, "for no model"),
        ({"base_url": "ftp://x"}, "The policy claude has the base_url 'ftp://x'"),
        ({"base_url": "https://me:secret@x"}, "password"),
    ],
)
def test_parameters_that_no_call_could_be_made_with_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_endpoint(Endpoint(**params), "The policy claude")


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://x", "http://", "http:///v1", "http://:80", "http://ho st", "http://host\n"),
        *("http://127.0.0.1:80o0", "http://host:0", "http://host:70000", "http://[::1", "http://300.1.2.3"),
        *("http://a..b", f"http://{'x' * 64}.example"),
    ],
)
def test_an_address_that_nothing_can_be_asked_at_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=r"The engine 'x' has the url .* no http or https address") as caught:
        check_url(url, "The engine 'x'", "url")
    assert repr(url) in caught.value.message
    assert "http://127.0.0.1:8000" in (caught.value.next_step or "")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://host.example/v1/",
            "http://127.0.0.1:8000",
            "http://[::1]:8000/v1",
            "HTTP://my_host",
            "http://bücher",
        ),
        "http://host/@me/v1?x=1",
    ],
)
def test_an_address_that_clients_take_is_taken(url: str) -> None:
    check_url(url, "The engine 'x'", "url")


@pytest.mark.parametrize(
    "rest", ["@host", "@host:80o0", "@[::1", "/hunter2@host", "#hunter2@host", "@ho st", "\n@host", "@@host"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(rest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_url(f"http://me:hunter2{rest}", "The engine 'x'", "url")
    assert "hunter2" not in str(caught.value)


def test_making_policy_and_author_imports_no_sdk() -> None:
    script = (
        "import sys; from bascule.plugins.loader import plugins; r = plugins().registry;"
        "r.policies.get('claude')({}); r.authors.get('claude')({});"
        "print(sorted({'anthropic', 'openai', 'httpx2'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"
