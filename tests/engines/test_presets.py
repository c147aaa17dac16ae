"""Model families are known by name or configuration, and gpt-oss by its own format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bascule.plugins.engine import Message
from bascule.runtime.engines.form import Form
from bascule.runtime.engines.presets import PLAIN, preset_of
from bascule.schemas.errors import PromptError
from bascule.schemas.trajectory import Output, Sampling, pack_ids

CHAT = (Message("user", "12 + 13?"),)
# Ids of gpt-oss's special tokens, as its tokenizer configuration has them.
START, END, MESSAGE, CHANNEL, RETURN = 200006, 200007, 200008, 200005, 200002


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("openai/gpt-oss-120b", "gpt-oss"),
        ("/models/gpt-oss-20b", "gpt-oss"),
        ("Qwen/Qwen3-4B", "Qwen3"),
        ("Qwen/Qwen3-4B-Thinking-2507", "Qwen3-Thinking"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3"),
        ("/m/qwen3-8b-non-thinking", "Qwen3"),
        ("smollm2-135m-instruct", ""),
        ("Qwen/Qwen2.5-7B", ""),
        ("Qwen/Qwen3-Embedding-0.6B", ""),
    ],
)
def test_a_family_is_known_by_the_models_name(model: str, family: str) -> None:
    assert preset_of(model).family == family


def test_a_family_is_known_by_the_configuration_whatever_the_folder_is_called(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    assert preset_of("/data/mine", tmp_path).harmony
    assert preset_of("/data/mine", tmp_path / "none") is PLAIN


def test_what_is_thought_is_no_answer_and_its_tokens_are_kept() -> None:
    form = Form(preset_of("Qwen3-8B"), {"enable_thinking": True})
    assert form.template == {"enable_thinking": True}
    sampling = Sampling(stop=("\n",))
    assert form.asked(sampling)[0].stop == ()
    thought = Output(
        token_ids=b"1234", logprobs=b"1234", text="<think>\n25\n</think>\n\n25\nmore", finish_reason="length"
    )
    read = form.read(thought, sampling, CHAT)
    assert (read.text, read.finish_reason, read.token_ids) == ("25", "stop", b"1234")
    cut = Output(token_ids=b"12", logprobs=b"12", text="<think>\n25 or", finish_reason="length")
    assert form.read(cut, sampling, CHAT).text == ""
    unthought = Output(token_ids=b"12", logprobs=b"12", text="25")
    assert form.read(unthought, sampling, CHAT).text == "25"
    opened = Form(preset_of("Qwen3-4B-Thinking-2507"), {})  # its template opens the thinking in the prompt
    assert opened.read(Output(token_ids=b"12", logprobs=b"12", text="25 or"), sampling, CHAT).text == ""
    assert opened.read(unthought, sampling, "12 + 13 =").text == "25"  # where there is no template
    whole = Output(token_ids=b"12", logprobs=b"12", text="25 or 26\n</think>\n\n25")
    assert opened.read(whole, sampling, CHAT).text == "25"
    plain = Form(PLAIN, {})
    assert plain.asked(sampling) == (sampling, ())
    assert plain.read(thought, sampling, CHAT) is thought


@pytest.fixture
def harmony() -> Form:
    pytest.importorskip("openai_harmony")
    from bascule.plugins.wheels import cache_folder
    from bascule.runtime.engines.harmony import FOLDER_ENV, VOCABULARY

    kept = Path(os.environ.get(FOLDER_ENV) or cache_folder() / "encodings") / VOCABULARY
    if not kept.is_file():
        pytest.skip("the vocabulary of harmony is not here; `make harmony-vocabulary` makes it")
    return Form(preset_of("gpt-oss-20b"), {})


def test_a_conversation_is_rendered_in_the_harmony_format(harmony: Form) -> None:
    ids = harmony.rendered((Message("system", "Be short."), Message("user", "2 + 2?"), Message("assistant", "4")))
    assert ids is not None
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    text = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS).decode(list(ids))
    assert "Reasoning: low" in text
    assert (
        "<|start|>developer<|message|># Instructions\n\nBe short.<|end|><|start|>user<|message|>2 + 2?<|end|>" in text
    )
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>4<|end|><|start|>assistant")
    assert ids.count(START) == 5
    with pytest.raises(PromptError, match="wizard"):
        harmony.rendered((Message("wizard", "x"),))


def test_only_the_final_channel_is_the_answer(harmony: Form) -> None:
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)

    def output(text: str) -> Output:
        ids = encoding.encode(text, allowed_special="all")
        return Output(token_ids=pack_ids(ids), logprobs=b"", text=text, finish_reason="stop")

    sampling, ends = harmony.asked(Sampling(stop=("4",)))
    assert RETURN in ends
    assert sampling.stop == ()
    thought = "<|channel|>analysis<|message|>That is 4.<|end|>"
    whole = output(f"{thought}<|start|>assistant<|channel|>final<|message|>It is 4, yes.<|return|>")
    assert harmony.read(whole, Sampling(), CHAT).text == "It is 4, yes."
    assert harmony.read(whole, Sampling(stop=("4",)), CHAT).text == "It is "
    assert harmony.read(whole, Sampling(), CHAT).token_ids == whole.token_ids
    cut = output(f"{thought}<|start|>assistant<|channel|>final<|message|>It is")
    assert harmony.read(cut, Sampling(), CHAT).text == "It is"
    assert harmony.read(output("<|channel|>analysis<|message|>That is"), Sampling(), CHAT).text == ""
    assert harmony.read(output("no format at all"), Sampling(), CHAT).text == ""
