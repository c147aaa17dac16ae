"""Redactors: every known form of a secret goes, everything else stays, and one that fails stops what it guards."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.plugins.loader import load_plugins, plugins
from bascule.plugins.redactors.names import secret_name
from bascule.plugins.redactors.secrets import Secrets
from bascule.runtime import redaction
from bascule.runtime.redaction import Redaction, redact_log, redact_message
from bascule.schemas.errors import PluginError
from bascule.schemas.events import TYPES, RunPaused, ToolCalled, TrajectoryLogged
from bascule.schemas.landscape import Measured
from bascule.schemas.trajectory import EpisodeError, ModelCall, Note, Output, Sampling, Trajectory

ROOT = Path(__file__).parents[2]
A, B = "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cF", "0123456789abcdefABCD"
BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
#: In two halves, so that nobody who scans this file for keys is alarmed.
KEYS = {
    "anthropic-key": [f"sk-{'ant'}-api03-{A}-{A}_AA"],
    "openai-key": [f"sk-{'proj'}-{A}_{A}", f"sk-{A}{B}", f"sk-{'svcacct'}-{A}"],
    "github-token": [f"{p}_{A}1234" for p in ("ghp", "gho", "ghs")] + [f"github_{'pat'}_11ABCDEFG0{A}_{A}"],
    "gitlab-token": [f"gl{'pat'}-{B}"],
    "slack-token": [f"xox{c}-123456789012-{A}" for c in "abp"],
    "aws-key": ["AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "IOSFODNN7EXAMPLE"],
    "google-key": [f"AI{'za'}Sy{A}A"],
    "huggingface-token": [f"h{'f'}_{A}ab"],
    "npm-token": [f"np{'m'}_{A}abcd"],
    "pypi-token": [f"py{'pi'}-AgEIcHlwaS5vcmc{A}{A}"],
    "jwt": [f"ey{'J'}hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{A}"],
    "private-key": [
        f"-----BEGIN {k}PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END {k}PRIVATE KEY-----" for k in ("", "RSA ")
    ],
}
ALL = [(rule, key) for rule, keys in KEYS.items() for key in keys]
secrets = Secrets({})


def redacted(text: str) -> str:
    return secrets.redact(text, None)


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "key"), ALL, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(ALL)])
@pytest.mark.parametrize("around", ["{}", "the key is {}.", "key={}", '{{"a": "{}"}}', "\n{}\n", "({})", "é{}é"])
def test_a_key_of_a_known_form_is_replaced_wherever_it_stands(rule: str, key: str, around: str) -> None:
    before, after = around.format("\0").split("\0")
    for text, kept in (
        (around.format(key), f"{before}[redacted:{rule}]{after}"),
        (json.dumps(f"{before}{key}{after}"), json.dumps(f"{before}[redacted:{rule}]{after}")),
    ):
        assert redacted(text) == kept
        assert secrets.suspects(msgspec.json.encode(text))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted:authorization]"),
        ("authorization: Bearer abcdef", "authorization: Bearer [redacted:authorization]"),
        ('{"Authorization": "token abcdefgh"}', '{"Authorization": "token [redacted:authorization]"}'),
        ("curl -H 'Authorization: a1b2c3d4e5f6'", "curl -H 'Authorization: [redacted:authorization]'"),
        ("sent Bearer abc.def-123_456", "sent Bearer [redacted:bearer]"),
        ("https://me:hunter22@example.org/x", "https://me:[redacted:url-password]@example.org/x"),
        ("nats://bascule:a1b2@127.0.0.1:4222", "nats://bascule:[redacted:url-password]@127.0.0.1:4222"),
        ("GET /x?api_key=abcdef12&n=1", "GET /x?api_key=[redacted:named-value]&n=1"),
        ("connect(password='hunter22')", "connect(password='[redacted:named-value]')"),
        (r'"{\"db_password\": \"hunter22\"}"', r'"{\"db_password\": \"[redacted:named-value]\"}"'),
    ],
)
def test_a_secret_behind_what_announces_it_is_replaced_and_the_rest_kept(text: str, kept: str) -> None:
    assert redacted(text) == kept
    assert secrets.suspects(msgspec.json.encode(text))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "api_key",
            "apiKey",
            "API-KEY",
            "apikey",
            "OPENAI_API_KEY",
            "x-api-key",
            "token",
            "access_token",
            "authToken",
        ),
        *("secret", "clientSecret", "password", "DB_PASSWORD", "PGPASSWORD", "passwd", "authorization", "credentials"),
        *("private_key", "privateKey", "aws_secret_access_key", "access_key_id", "Proxy-Authorization", "passphrase"),
    ],
)
def test_a_text_under_a_telling_name_is_replaced_whole_and_numbers_are_not(name: str) -> None:
    event = ToolCalled(session="s", ordinal=0, name="n", arguments={name: "x", "n": {name: [1, None, "y z"]}})
    clean = Redaction([secrets]).value(event)
    mark = "[redacted:named-value]"
    assert clean.arguments == {name: mark, "n": {name: [1, None, mark]}}


def test_what_the_environment_holds_under_a_telling_name_is_found_in_every_form() -> None:
    value = 'correct "horse"/battery'
    own = Secrets({"STAPLE_KEY": value, "SHORT_TOKEN": "1234567", "PWD": "/home/somebody", "LANG": "en_GB.UTF-8"})
    text = f"a {value} b {json.dumps(value)} c correct%20%22horse%22%2Fbattery d 1234567 /home/somebody en_GB.UTF-8"
    mark = "[redacted:environment]"
    assert own.redact(text, None) == f'a {mark} b "{mark}" c {mark} d 1234567 /home/somebody en_GB.UTF-8'
    assert own.suspects(msgspec.json.encode({"a": value}))
    assert not own.suspects(msgspec.json.encode({"a": "1234567 /home/somebody en_GB.UTF-8"}))


def test_of_two_values_of_the_environment_that_begin_alike_no_end_is_left() -> None:
    own = Secrets({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-more"})
    assert own.redact("x abcdefgh-and-more", None) == "x [redacted:environment]"


@given(
    st.lists(st.sampled_from([key for _, key in ALL] + ["Authorization: ", "Bearer ", "://u:p@", " ", "'", "\\n", "x"]))
)
def test_redacting_twice_is_redacting_once(parts: list[str]) -> None:
    once = redacted(" ".join(parts))
    assert redacted(once) == once
    assert Redaction([secrets]).value({"password": once})["password"] in (once, "[redacted:named-value]")


# --- what is left alone ----------------------------------------------------------------------------------------------


@given(st.text(), st.none() | st.text())
def test_a_text_that_the_quick_look_passes_over_is_one_that_nothing_is_changed_in(text: str, key: str | None) -> None:
    payload = msgspec.json.encode({key: text} if key is not None else text)
    if not secrets.suspects(payload):
        assert secrets.redact(text, key) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "task-1234567890abcdef1234567890",
            "the risk-adjusted disk-0123456789012345678901",
            "sk-learn",
            "Bearer bonds",
        ),
        *("Authorization: required for everything", "a bearer of news", "eyJust a word", "password: the word to enter"),
        *("token_ids", "max_tokens=64", "https://example.org:8080/a@b", "mailto:a@b.org", "hf_hub_download", "AKIA"),
        *(
            "The secret is out.",
            "eos_token='<|im_end|>'",
            "pypi-server",
            "0.1234567890123456",
            "-----BEGIN CERTIFICATE",
        ),
        *("git@github.com:a/b.git", "api_key: str", "def f(password): ...", "ghp_short", "1e-12", "no key here"),
    ],
)
def test_what_only_looks_like_a_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text


def texts() -> list[tuple[str, str]]:
    out = [(str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / "plugins" / "tasks").glob("*.py"))]
    out += [(str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / "tests/schemas/golden").glob("*.json"))]
    task = plugins().registry.tasks.get("arith")({})
    public = task.public()
    out += [(f"arith/{k}", v) for k, v in task.harness().items()]
    out += [(e.id, json.dumps(e.input)) for e in (*public.train, *public.dev, *public.sealed)]
    return [*out, (public.name, public.description), *public.answers.items()]


def test_tasks_harnesses_and_recorded_events_of_ours_hold_nothing_to_redact() -> None:
    found = texts()
    assert len(found) > 500
    for name, text in found:
        assert redacted(text) == text, name


def structs_of(type_: Any, seen: set[type]) -> set[type]:
    """Every struct that can stand in ``type_``."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct) and type_ not in seen:
        seen.add(type_)
        for field in msgspec.structs.fields(type_):
            structs_of(field.type, seen)
    for inner in get_args(type_):
        structs_of(inner, seen)
    return seen


def test_no_field_of_any_event_has_a_name_that_would_be_redacted() -> None:
    seen: set[type] = set()
    for type_ in TYPES.values():
        structs_of(type_, seen)
    names = {name for struct in seen for name in struct.__struct_fields__}
    assert {"token_ids", "prompt_tokens", "max_tokens", "wins", "reward"} <= names
    assert not {name for name in names if secret_name(name)}


@pytest.mark.parametrize(
    "name",
    ["eos_token", "pad_token", "tokens", "token_ids", "trained_tokens", "key", "keys", "sort_key", "monkey", "id"],
)
def test_names_of_counts_and_pieces_of_text_are_not_secret(name: str) -> None:
    assert not secret_name(name)


def test_token_ids_are_never_touched_even_if_their_base64_reads_like_a_key() -> None:
    ids = base64.b64decode("AKIA" + "AAAAAAAAAAAAAAAA" + "====")
    output = Output(token_ids=ids, logprobs=ids, text="AKIA" + "A" * 16)
    call = ModelCall(kind="chat", asked="0", prompt_ids=ids, outputs=(output,), sampling=Sampling())
    clean = Redaction([secrets]).value(Trajectory(steps=(call, Note(text="n")), answer="1"))
    kept = clean.steps[0]
    assert isinstance(kept, ModelCall)
    assert (kept.prompt_ids, kept.outputs[0].token_ids, kept.outputs[0].logprobs) == (ids, ids, ids)
    assert kept.outputs[0].text == "[redacted:aws-key]"


def test_a_value_without_secrets_comes_back_itself() -> None:
    data = TrajectoryLogged(
        trajectory="g00-dev-0000-n0",
        evaluation="g00-dev",
        example="e",
        position=0,
        sample=0,
        answer="the token is a key",
        error=None,
        prompt_tokens=3,
        output_tokens=1,
        measured=Measured(),
        body=Trajectory(answer="bearer", steps=(Note(text="password"),)),
    )
    assert secrets.suspects(msgspec.json.encode(data))
    assert Redaction([secrets]).value(data) is data


def test_a_word_of_ours_in_a_variable_that_looks_secret_does_not_change_what_a_field_may_be() -> None:
    own = Redaction([Secrets({"MY_TOKEN": "no-answer", "OTHER_TOKEN": "trouble!"})])
    data = TrajectoryLogged(
        trajectory="t",
        evaluation="e",
        example="e",
        position=0,
        sample=0,
        answer=None,
        error=EpisodeError(kind="no-answer", message="no-answer: trouble!"),
        prompt_tokens=0,
        output_tokens=0,
        measured=Measured(),
    )
    error = own.value(data).error
    assert error is not None
    assert (error.kind, error.message) == ("no-answer", "[redacted:environment]: [redacted:environment]")


# --- the kind --------------------------------------------------------------------------------------------------------


class Replace:
    """A redactor without a quick look."""

    version = "1"

    def __init__(self, name: str, old: str, new: str) -> None:
        self.name, self.old, self.new = name, old, new

    def redact(self, text: str, key: str | None) -> str:
        return text.replace(self.old, self.new)


class Broken:
    name = "broken"
    version = "7"

    def redact(self, text: str, key: str | None) -> str:
        raise ValueError(f"cannot handle {text}")


def test_the_built_in_redactor_is_registered_as_a_plugin_like_any_other() -> None:
    found = next(p for p in plugins().loaded if p.name == "redactors")
    assert found.provides == ("redactor:secrets",)


def test_all_redactors_apply_in_the_order_of_their_names() -> None:
    both = Redaction([Replace("b", "two", "three"), Replace("a", "one", "two")])
    assert both.value(RunPaused(reason="one")) == RunPaused(reason="three")


def test_names_in_mappings_are_redacted_too() -> None:
    key = KEYS["aws-key"][0]
    assert Redaction([secrets]).value({key: 1}) == {"[redacted:aws-key]": 1}


def test_an_allow_list_that_forgets_the_built_in_redactor_does_not_switch_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BASCULE_PLUGINS", "tasks")
    found = Redaction.of(load_plugins().registry)
    assert found.value(RunPaused(reason=KEYS["aws-key"][0])).reason == "[redacted:aws-key]"


@pytest.mark.parametrize("bad", [Broken(), Replace("broken", "k", 3)])  # type: ignore[arg-type]
def test_a_redactor_that_fails_is_named_and_what_it_saw_is_not_quoted(bad: Any) -> None:
    with pytest.raises(PluginError, match="The redactor broken") as caught:
        Redaction([bad]).value(RunPaused(reason="k hunter22"))
    assert "hunter22" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


class Limited(msgspec.Struct, frozen=True):
    text: Annotated[str, msgspec.Meta(max_length=4)]


def test_a_redactor_that_leaves_what_cannot_be_read_again_is_an_error() -> None:
    assert Redaction([Replace("long", "x", "xx")]).value(Limited("x")) == Limited("xx")
    with pytest.raises(PluginError, match="left of Limited does not fit"):
        Redaction([Replace("long", "x", "x" * 9)]).value(Limited("x"))


# --- where nothing is an event ---------------------------------------------------------------------------------------


def test_a_line_of_the_service_log_is_redacted_with_its_traceback_and_foreign_objects() -> None:
    key = KEYS["anthropic-key"][0]

    class Holder:
        def __repr__(self) -> str:
            return f"Holder({key})"

    line = redact_log(
        None, "error", {"event": key, "holder": Holder(), "exception": [{"exc_value": f"no {key}"}], "api_key": "x"}
    )
    assert key not in repr(line)
    assert line["api_key"] == "[redacted:named-value]"
    assert line["exception"] == [{"exc_value": "no [redacted:anthropic-key]"}]


def test_where_a_redactor_fails_a_line_of_the_service_log_and_a_message_are_withheld(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redaction, "process_redaction", lambda: Redaction([Broken()]))
    line = redact_log(None, "error", {"event": "hunter22"})
    assert line["event"] == "log.withheld"
    assert "broken" in line["reason"]
    said = redact_message("hunter22")
    assert "hunter22" not in said
    assert "The redactor broken 7 raised ValueError" in said


def test_a_message_to_a_person_is_redacted() -> None:
    assert redact_message(f"no {KEYS['jwt'][0]}") == "no [redacted:jwt]"
