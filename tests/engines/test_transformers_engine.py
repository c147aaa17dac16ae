"""The embedded engine answers as the plain model would, however its calls are batched."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from bascule.plugins.engine import Engine, Message, Sampled, SampleRequest
from bascule.runtime.engines.transformers import TransformersEngine, make
from bascule.schemas.errors import ConfigError, EngineError
from bascule.schemas.trajectory import Output, Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tiny_model import CHAT, make_tiny_adapter, make_tiny_model

PREFIX = "A bascule is a balance with two arms.\n"
PROMPTS = [PREFIX + f"{i} + {i * 7} is{' ' * (i % 3)}" for i in range(9)] + ["Zwölf", "What is 12 + 13? The answer"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_tiny_adapter(base, tmp_path_factory.mktemp("adapter"), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return load_model(base)


@pytest.fixture
async def engine(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    engine = make(str(base), {"tokens": 64, "rows": 7, "merged_adapters": 1, "threads": 1})
    assert isinstance(engine, TransformersEngine)
    await engine.start()
    yield engine
    await engine.close()


def request(text: str, *, n: int = 1, seed: int = 0, adapter: str | None = None, **sampling: Any) -> SampleRequest:
    sampling.setdefault("max_tokens", 12)
    return SampleRequest(
        trajectory="g00-dev-0000-s0",
        call=0,
        prompt=text,
        n=n,
        sampling=Sampling(**sampling),
        seed=seed,
        adapter=adapter,
    )


async def ask(engine: Engine, *requests: SampleRequest) -> list[tuple[Output, ...]]:
    return [s.outputs for s in await asyncio.gather(*(engine.sample(r) for r in requests))]


@torch.inference_mode()
def true_logprobs(model: Any, prompt: Sequence[int], output: Output, temperature: float = 1.0) -> list[float]:
    ids = unpack_ids(output.token_ids)
    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    logs = (logits / temperature).log_softmax(-1)
    return [float(x) for x in logs.gather(1, torch.tensor(ids)[:, None])[:, 0]]


def assert_close(output: Output, expected: list[float]) -> None:
    assert unpack_floats(output.logprobs) == pytest.approx(expected, abs=1e-4)


async def test_greedy_answers_are_those_of_generate(engine: TransformersEngine, base: Path, plain: Any) -> None:
    answers = await ask(engine, *(request(p, temperature=0) for p in PROMPTS))
    tokenizer = load_tokenizer(base)
    for prompt, (output,) in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert unpack_ids(output.token_ids) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
async def test_logprobs_are_those_of_a_full_forward_pass(
    engine: TransformersEngine, plain: Any, temperature: float
) -> None:
    requests = [request(p, n=3, seed=i, temperature=temperature) for i, p in enumerate(PROMPTS)]
    for asked, outputs in zip(requests, await ask(engine, *requests), strict=True):
        assert len(outputs) == 3
        for output in outputs:
            assert_close(output, true_logprobs(plain, engine.encode(asked.prompt), output, temperature))


async def test_greedy_logprobs_are_those_at_temperature_one(engine: TransformersEngine, plain: Any) -> None:
    asked = request(PROMPTS[0], temperature=0)
    ((output,),) = await ask(engine, asked)
    assert_close(output, true_logprobs(plain, engine.encode(asked.prompt), output))


async def test_the_same_seed_gives_the_same_tokens_whatever_the_batch(engine: TransformersEngine) -> None:
    asked = request(PROMPTS[3], n=4, seed=11)
    (alone,) = await ask(engine, asked)
    others = [request(p, n=2, seed=i) for i, p in enumerate(PROMPTS)]
    *_, crowded = await ask(engine, *others, asked)
    assert [o.token_ids for o in alone] == [o.token_ids for o in crowded]


async def test_samples_and_seeds_differ(engine: TransformersEngine) -> None:
    (first,), (second,) = [await ask(engine, request(PROMPTS[0], n=6, seed=seed, temperature=2.0)) for seed in (1, 2)]
    assert len({o.token_ids for o in [*first, *second]}) == 12


async def test_sampling_follows_the_distribution(engine: TransformersEngine, plain: Any) -> None:
    asked = request(PROMPTS[0], n=2000, temperature=1.0, max_tokens=1)
    (outputs,) = await ask(engine, asked)
    counts = torch.zeros(plain.config.vocab_size)
    for output in outputs:
        counts[unpack_ids(output.token_ids)[0]] += 1
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([engine.encode(asked.prompt)])).logits[0, -1].softmax(-1)
    # The total variation distance of 2000 draws over k likely tokens is about sqrt(k / 2000) / 2.5: 0.1 for 100.
    assert float((counts / 2000 - expected).abs().sum() / 2) < 0.15


async def test_equal_prompts_of_a_batch_are_computed_once(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 0
    forward = engine._generator._forward

    def counting(ids: Sequence[int], *rest: Any) -> Any:
        nonlocal tokens
        tokens += len(ids)
        return forward(ids, *rest)

    monkeypatch.setattr(engine._generator, "_forward", counting)
    asked = request(PROMPTS[0], max_tokens=1)
    requests = [request(PROMPTS[0], seed=seed, max_tokens=1) for seed in range(7)]
    await ask(engine, *requests)
    assert tokens == len(engine.encode(asked.prompt))


async def test_a_stop_string_ends_the_text_before_it_and_keeps_the_tokens(engine: TransformersEngine) -> None:
    ((whole,),) = await ask(engine, request(PROMPTS[1], temperature=0, max_tokens=20))
    stop = whole.text[4:6]
    ((cut,),) = await ask(engine, request(PROMPTS[1], temperature=0, max_tokens=20, stop=("never seen", stop)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    kept = unpack_ids(cut.token_ids)
    assert kept == unpack_ids(whole.token_ids)[: len(kept)]
    assert stop in engine._tokenizer.decode(kept)
    assert stop not in engine._tokenizer.decode(kept[:-1])
    assert len(unpack_floats(cut.logprobs)) == len(kept)


async def test_an_end_token_ends_the_answer_and_is_kept(engine: TransformersEngine) -> None:
    ((whole,),) = await ask(engine, request(PROMPTS[1], temperature=0))
    ids = unpack_ids(whole.token_ids)
    assert whole.finish_reason == "length"
    assert len(ids) == 12
    engine._generator._ends = frozenset([ids[4]])
    ((ended,),) = await ask(engine, request(PROMPTS[1], temperature=0))
    first = ids.index(ids[4])
    assert unpack_ids(ended.token_ids) == ids[: first + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == engine._tokenizer.decode(ids[:first])


async def test_adapters_answer_as_peft_does_and_can_alternate(
    engine: TransformersEngine, base: Path, plain: Any, adapters: list[Path]
) -> None:
    from peft import PeftModel

    for i, folder in enumerate(adapters):
        await engine.load_adapter(f"v{i}", folder)
    for turn in range(2):
        requests = [request(p, seed=turn, adapter=name) for p in PROMPTS[:4] for name in ("v0", None, "v1", "v2")]
        answers = await ask(engine, *requests)
        models = {
            f"v{i}": PeftModel.from_pretrained(load_model(base), folder).eval() for i, folder in enumerate(adapters)
        }
        for asked, (output,) in zip(requests, answers, strict=True):
            model = plain if asked.adapter is None else models[asked.adapter]
            assert_close(output, true_logprobs(model, engine.encode(asked.prompt), output))


async def test_a_loaded_name_is_idempotent_and_refuses_other_content(
    engine: TransformersEngine, adapters: list[Path]
) -> None:
    await engine.load_adapter("v0", adapters[0])
    await engine.load_adapter("v0", adapters[0])
    with pytest.raises(EngineError, match=r"other content.*'v0'"):
        await engine.load_adapter("v0", adapters[1])


@pytest.mark.parametrize("damage", ["key", "shape", "half", "dora", "missing"])
async def test_an_adapter_that_does_not_fit_is_refused_by_name(
    engine: TransformersEngine, adapters: list[Path], tmp_path: Path, damage: str
) -> None:
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    key = sorted(tensors)[0]
    named = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    if damage == "key":
        named = "base_model.model.model.layers.0.extra"
        tensors[named] = torch.zeros(1)
    elif damage == "shape":
        tensors[key] = torch.zeros(4, 3)
    elif damage == "half":
        del tensors[key]
    elif damage == "dora":
        config["use_dora"], named = True, "use_dora"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if damage == "missing":
        named = str(tmp_path)
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(EngineError) as caught:
        await engine.load_adapter("bad", tmp_path)
    assert named in str(caught.value)
    assert "'bad'" in str(caught.value)


async def test_one_bad_request_fails_alone_and_is_named(engine: TransformersEngine) -> None:
    good = request(PROMPTS[0])
    unknown = request(PROMPTS[0], adapter="nobody")
    long = request(PROMPTS[0], max_tokens=256)
    empty = request("")
    results = await asyncio.gather(*(engine.sample(r) for r in (good, unknown, long, empty)), return_exceptions=True)
    assert isinstance(results[0], Sampled)
    for result, words in zip(results[1:], ("nobody", "context of 256", "0 prompt tokens"), strict=True):
        assert isinstance(result, EngineError)
        assert words in str(result)


async def test_an_exception_in_the_worker_reaches_its_callers_and_the_engine_lives(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine._generator, "_forward", broken)
        results = await asyncio.gather(*(engine.sample(request(p)) for p in PROMPTS[:3]), return_exceptions=True)
    assert all(isinstance(r, EngineError) and "no room" in str(r) for r in results)
    assert await engine.sample(request(PROMPTS[0]))


async def test_the_loop_stays_responsive_and_a_cancelled_caller_harms_nobody(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()
    forward = engine._generator._forward

    def held(*arguments: Any) -> Any:
        entered.set()
        assert release.wait(60)
        return forward(*arguments)

    monkeypatch.setattr(engine._generator, "_forward", held)
    running, other = (asyncio.create_task(engine.sample(request(p))) for p in PROMPTS[:2])
    await asyncio.to_thread(entered.wait, 60)
    waiting, last = (asyncio.create_task(engine.sample(request(p))) for p in PROMPTS[2:4])
    await asyncio.sleep(0)  # reached only because the loop is not held by the model
    running.cancel()
    waiting.cancel()
    release.set()
    assert await other
    assert await last
    assert running.cancelled() or running.cancelling()


async def test_close_ends_the_threads_and_fails_what_waits(base: Path, engine: TransformersEngine) -> None:
    waiting = asyncio.create_task(engine.sample(request(PROMPTS[0])))
    await asyncio.sleep(0)
    computing = weakref.ref(engine._generator)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await waiting
    assert computing() is None, "the weights are held by nobody"
    assert not [t for t in threading.enumerate() if t.name.startswith("bascule-engine")]
    with pytest.raises(EngineError, match="not started"):
        engine.encode("x")


async def test_long_prompts_and_many_prefixes_change_no_answer(engine: TransformersEngine, plain: Any) -> None:
    texts = [f"{head}{PREFIX * 2}{i}" for head in ("", "B", "Deich. ") for i in range(5)]  # each longer than a pass
    requests = [request(t, n=2, seed=5) for t in texts]
    for _ in range(2):  # the second time from kept prefixes
        for asked, outputs in zip(requests, await ask(engine, *requests), strict=True):
            for output in outputs:
                assert_close(output, true_logprobs(plain, engine.encode(asked.prompt), output))


async def test_chat_prompts_follow_the_template(engine: TransformersEngine, base: Path) -> None:
    ids = engine.encode((Message("user", "12 + 13?"),))
    text = load_tokenizer(base).decode(list(ids))
    assert text == "<|im_start|>user\n12 + 13?<|im_end|>\n<|im_start|>assistant\n"


async def test_a_family_that_thinks_is_asked_as_its_preset_says_and_read_without_its_thoughts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(base, tmp_path / "Qwen3-tiny")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% if enable_thinking is not defined or enable_thinking %}think: {% endif %}" + CHAT
    tokenizer.save_pretrained(folder)
    told = "<|im_start|>user\n12 + 13?<|im_end|>\n<|im_start|>assistant\n"
    said = "<think>\n12 and\n13\n</think>\n\n25\nDone"
    for template, asked in (({}, told), ({"enable_thinking": True}, f"think: {told}")):
        engine = make(str(folder), {"threads": 1, "template": template})
        assert isinstance(engine, TransformersEngine)
        await engine.start()
        assert engine.decode(engine.encode((Message("user", "12 + 13?"),))) == asked
        monkeypatch.setattr(engine._generator, "_decode", lambda ids: said[: 4 * len(ids)])
        ((output,),) = await ask(engine, request("12 + 13?", temperature=0, stop=("\n",)))
        assert (output.text, output.finish_reason) == ("25", "stop")
        assert len(unpack_ids(output.token_ids)) == 12
        ((cut,),) = await ask(engine, request("12 + 13?", temperature=0, max_tokens=4))
        assert cut.text == ""
        await engine.close()


async def test_a_model_of_the_harmony_form_is_refused_before_it_is_loaded(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    with pytest.raises(EngineError, match=r"cannot start with .*gpt-oss answers in the harmony format") as caught:
        await make(str(folder), {}).start()
    assert "vllm" in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        {"gather_ms": -1},
        {"gather_ms": float("inf")},
        {"rows": 0},
        {"tokens": 0},
        {"kv_mib": 0},
        {"prefix_tokens": -1},
        {"merged_adapters": 0},
        {"threads": -1},
    ],
)
def test_limits_that_nothing_could_be_computed_within_are_refused(params: dict[str, Any]) -> None:
    (name,) = params
    with pytest.raises(ConfigError, match=name):
        make("x", params)
    assert make("x", {"gather_ms": 0, "prefix_tokens": 0, "threads": 0})


async def test_start_says_what_runs_and_what_is_wrong(engine: TransformersEngine, tmp_path: Path) -> None:
    info = await engine.start()
    assert len(info.model_digest) == 64
    assert {"torch", "transformers", "threads", "dtype"} <= info.versions.keys()
    with pytest.raises(EngineError, match=r"no config\.json"):
        await make(str(tmp_path), {}).start()
    with pytest.raises(ConfigError, match="typo"):
        make(str(tmp_path), {"typo": 1})


def test_importing_the_engine_imports_no_model_library() -> None:
    code = "import sys, bascule.runtime.engines.transformers; print([m for m in ('torch', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
