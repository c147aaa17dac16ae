"""Rows join, leave and take turns between passes, and no answer depends on that."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from bascule.runtime.engines.attention import area
from bascule.runtime.engines.generate import TURN, Answer, Generator, Limits, Row
from bascule.schemas.trajectory import Output, Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import load_model, load_tokenizer
from tests.tiny_model import make_tiny_model

SYSTEM = "A bascule is a balance with two arms; one rises when the other falls. A bascule is a balance.\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASCULE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = make_tiny_model(tmp_path_factory.mktemp("base"))
        load_model(folder)
    return folder


@pytest.fixture
def make(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Generator]:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(base)

    def made(activate: Callable[[str | None], None] = lambda name: None, **limits: int) -> Generator:
        return Generator(
            load_model(base), lambda ids: str(tokenizer.decode(ids)), frozenset(), Limits(**limits), activate
        )

    return made


@pytest.fixture
def rows(base: Path) -> Callable[..., list[Row]]:
    tokenizer = load_tokenizer(base)

    def made(first: int, count: int, *, tokens: int = 12, samples: int = 1) -> list[Row]:
        return [
            Row(tuple(tokenizer.encode(f"{SYSTEM}{i} + {i * 7} is")), Sampling(max_tokens=tokens), seed=i, sample=k)
            for i in range(first, first + count)
            for k in range(samples)
        ]

    return made


def finish(generator: Generator) -> list[Answer]:
    answers = []
    while generator.busy:
        answers += generator.step()
    return answers


def outputs(answers: Sequence[Answer]) -> dict[tuple[str | None, Row], Output]:
    found = {}
    for answer in answers:
        assert isinstance(answer.outcome, Output), answer.outcome
        assert (answer.adapter, answer.row) not in found, "answered twice"
        found[answer.adapter, answer.row] = answer.outcome
    return found


def assert_alike(one: Output, other: Output) -> None:
    assert unpack_ids(one.token_ids) == unpack_ids(other.token_ids)
    assert unpack_floats(one.logprobs) == pytest.approx(unpack_floats(other.logprobs), abs=1e-4)


def counted(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each pass, its tokens and how many of them are sampled from."""
    seen: list[tuple[int, int]] = []
    forward = generator._forward

    def counting(ids: Sequence[int], positions: Any, wanted: Sequence[int], state: Any) -> Any:
        seen.append((len(ids), len(wanted)))
        return forward(ids, positions, wanted, state)

    monkeypatch.setattr(generator, "_forward", counting)
    return seen


def test_rows_join_those_that_decode_at_the_next_pass(
    make: Callable[..., Generator], rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make()
    early, late = rows(0, 4, tokens=40), rows(10, 3, tokens=5)
    generator.submit(None, early)
    for _ in range(6):
        assert generator.step() == []
    generator.submit(None, late)
    passes = counted(generator, monkeypatch)
    answers: list[Answer] = []
    while len(answers) < len(late):
        answers += generator.step()
    assert {a.row for a in answers} <= set(late) | set(early)
    # The prefix may want a pass of its own; then the prompts, one token of each included, and four decode passes.
    assert len(passes) <= 6
    assert passes[0][1] >= len(early), "those that decode went on while others were prefilled"
    together = outputs([*answers, *finish(generator)])
    assert set(together) == {(None, row) for row in (*early, *late)}
    for row in (*early, *late):
        alone = make()
        alone.submit(None, [row])
        assert_alike(together[None, row], outputs(finish(alone))[None, row])


def test_an_adapter_that_waits_has_its_turn_while_another_decodes_on(
    make: Callable[..., Generator], rows: Callable[..., list[Row]]
) -> None:
    active: list[str | None] = []
    generator = make(active.append)
    generator.submit("a", rows(0, 3, tokens=120))
    generator.step()
    generator.submit("b", rows(0, 3, tokens=4))
    begun = len(active)
    answers: list[Answer] = []
    while not any(a.adapter == "b" for a in answers):
        answers += generator.step()
        generator.submit("a", rows(3 + len(active), 1, tokens=120))  # and more of the first come all the time
    assert "b" in active[begun : begun + TURN + 1]
    assert generator.busy
    assert active[-1] == "b"
    assert len(active) <= begun + 2 * TURN


def test_cancelled_rows_leave_at_the_next_pass(
    make: Callable[..., Generator], rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make(rows=5)
    decoding, waiting = rows(0, 5, tokens=30), rows(5, 3, tokens=30)
    generator.submit(None, [*decoding, *waiting])
    for _ in range(4):
        generator.step()
    passes = counted(generator, monkeypatch)
    generator.cancel(None, [decoding[2], waiting[0]])
    generator.step()
    assert passes[0][1] <= 4 + 2
    answers = outputs(finish(generator))
    assert set(answers) == {(None, row) for row in (*decoding, *waiting)} - {(None, decoding[2]), (None, waiting[0])}
    generator.submit(None, decoding)
    generator.step()
    generator.cancel(None, decoding)
    assert not generator.busy


def test_a_row_that_is_cancelled_while_it_waits_for_room_may_be_asked_for_again(
    make: Callable[..., Generator], rows: Callable[..., list[Row]]
) -> None:
    generator = make(kv_mib=1)
    asked = rows(0, 48, tokens=110)
    generator.submit(None, asked)
    while not any(batch.live for batch in generator._batches.values()):
        generator.step()
    waiting = [row for row in asked if row in generator._batches[None].planned]
    assert waiting
    generator.cancel(None, waiting[:1])
    generator.step()
    generator.submit(None, waiting[:1])
    assert {row for _, row in outputs(finish(generator))} == set(asked)


def test_a_row_that_is_asked_again_while_it_decodes_is_answered_once(
    make: Callable[..., Generator], rows: Callable[..., list[Row]]
) -> None:
    generator = make()
    (row,) = rows(0, 1)
    for _ in range(4):
        generator.submit(None, [row])
        generator.step()
    assert set(outputs(finish(generator))) == {(None, row)}


@pytest.mark.parametrize("seed", range(4))
def test_whoever_joins_or_leaves_when_memory_holds_and_answers_are_the_same(
    make: Callable[..., Generator], rows: Callable[..., list[Row]], seed: int
) -> None:
    draw = random.Random(seed)
    limits = {"rows": 9, "tokens": 48, "kv_mib": 1, "prefix_tokens": 64}
    generator = make(**limits)
    budget = None
    asked: set[tuple[str | None, Row]] = set()
    answers: list[Answer] = []
    gone: set[tuple[str | None, Row]] = set()
    for i in range(60):
        if draw.random() < 0.4:
            adapter = draw.choice([None, "a", "b"])
            new = rows(i, draw.randint(1, 4), tokens=draw.choice([1, 5, 20, 110]), samples=draw.randint(1, 3))
            generator.submit(adapter, new)
            asked |= {(adapter, row) for row in new}
            if draw.random() < 0.3:
                generator.cancel(adapter, new[::2])
                gone |= {(adapter, row) for row in new[::2]}
        if gone and draw.random() < 0.3:
            again = draw.choice(sorted(gone, key=str))
            generator.submit(again[0], [again[1]])
            gone.discard(again)
        answers += generator.step()
        live = [batch.live for batch in generator._batches.values()]
        assert sum(map(len, live)) <= limits["rows"]
        if generator._token_bytes:
            budget = 2**20 // generator._token_bytes
            assert sum(map(area, live)) <= budget or sum(map(len, live)) == 1
    assert budget is not None
    found = outputs([*answers, *finish(generator)])
    assert asked - gone <= set(found)
    alone = make()
    for adapter, row in sorted(found, key=str)[:: max(1, len(found) // 12)]:
        alone.submit(adapter, [row])
        assert_alike(found[adapter, row], outputs(finish(alone))[adapter, row])


def test_a_pass_that_fails_fails_its_rows_and_no_others(
    make: Callable[..., Generator], rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def activate(name: str | None) -> None:
        if name == "broken":
            raise KeyError(name)

    generator = make(activate)
    generator.submit("broken", rows(0, 2))
    generator.submit(None, rows(0, 2))
    answers = finish(generator)
    assert {type(a.outcome) for a in answers if a.adapter == "broken"} == {KeyError}
    assert len(outputs([a for a in answers if a.adapter is None])) == 2


def test_what_is_held_for_an_adapter_is_dropped_with_it(
    make: Callable[..., Generator], rows: Callable[..., list[Row]]
) -> None:
    generator = make()
    generator.submit("a", rows(0, 4))
    finish(generator)
    assert any(name == "a" for name, _ in generator._prefixes)
    generator.submit("a", rows(4, 2))
    generator.step()
    assert set(generator.drop("a")) == set(rows(4, 2))
    assert not generator.busy
    assert not any(name == "a" for name, _ in generator._prefixes)
