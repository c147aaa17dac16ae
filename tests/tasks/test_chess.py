"""The task longcot-chess: exact paths, strict answers, 50 the denominator."""

from __future__ import annotations

import itertools
import json
import random
import zipfile
from collections import Counter

import pytest

from bascule.plugins.task import PublicFace
from bascule.plugins.tasks.chess import Chess, ChessPrivate, solve
from bascule.plugins.tasks.chess_answers import parsed
from bascule.plugins.tasks.knight_path import (
    MOVES,
    fewest_moves,
    moves_from,
    shortest_path,
    shortest_path_of_few,
)
from bascule.plugins.tasks.sia_data import WHEEL
from bascule.plugins.wheels import fetch_wheel
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")


@pytest.fixture(scope="module")
def public() -> PublicFace:
    return Chess({}).public()


@pytest.fixture(scope="module")
def private() -> ChessPrivate:
    return Chess({}).private()


@pytest.fixture(scope="module")
def key() -> dict[str, str | list[str]]:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as archive:
        return dict(json.loads(archive.read("sia/tasks/longcot-chess/data/private/answers.json")))


def test_sealed_is_the_50_of_the_file_and_groups_do_not_straddle(
    public: PublicFace, key: dict[str, str | list[str]]
) -> None:
    assert {e.id for e in public.sealed} == set(key)
    assert Counter(e.input["kind"] for e in public.sealed) == {"knight_path": 39, "best_3_moves": 11}
    groups = [{e.group for e in public.split(s)} for s in SPLITS]
    assert not (groups[0] & groups[1])
    assert not (groups[0] & groups[2])
    assert not (groups[1] & groups[2])
    assert set(public.answers) == {e.id for e in public.train}


def test_the_exact_solver_gets_the_published_paths(public: PublicFace, key: dict[str, str | list[str]]) -> None:
    paths = [e for e in public.sealed if e.input["kind"] == "knight_path"]
    for e in random.Random(0).sample(paths, 2):
        assert str(solve(e)) == key[e.id]


def test_both_exact_methods_find_what_trying_every_order_finds() -> None:
    r = random.Random(7)
    for _ in range(12):
        size = r.randint(5, 9)
        squares = r.sample([(x, y) for x in range(size) for y in range(size)], 6)
        distance = [[moves_from(a, size)[x][y] for x, y in squares] for a in squares]
        tried = min(
            sum(distance[a][b] for a, b in itertools.pairwise((0, *order)))
            for order in itertools.permutations(range(1, len(squares)))
        )
        assert shortest_path_of_few(distance) == shortest_path(distance) == tried
        assert fewest_moves(squares[0], squares[1:], size) == tried


def test_distances_are_those_of_a_walk_on_the_board() -> None:
    for size in (5, 8):
        for start in ((0, 0), (2, 3)):
            board = moves_from(start, size)
            assert board[start[0]][start[1]] == 0
            for x, y in itertools.product(range(size), repeat=2):
                near = [board[x + a][y + b] for a, b in MOVES if 0 <= x + a < size and 0 <= y + b < size]
                if (x, y) != start:
                    assert board[x][y] == min(near) + 1


def test_a_target_that_cannot_be_reached_is_an_error_and_one_at_the_start_costs_nothing() -> None:
    with pytest.raises(ValueError, match="cannot get"):
        fewest_moves((0, 0), [(1, 1)], 3)
    assert fewest_moves((0, 0), [(0, 0)], 3) == 0
    assert fewest_moves((0, 0), [(1, 2), (1, 2), (0, 0)], 8) == 1


def test_every_question_takes_its_own_truth_in_each_permitted_form(
    private: ChessPrivate, key: dict[str, str | list[str]]
) -> None:
    right = Scored(reward=1.0, passed=True)
    for identity, truth in key.items():
        if isinstance(truth, str):
            forms = [truth, f"solution = {truth}", f" solution={truth}\n"]
        else:
            quoted = json.dumps(truth)
            forms = [f"[{', '.join(truth)}]", quoted, f"solution = {quoted}", str(truth), f"[{','.join(truth)}]"]
        for answer in forms:
            assert private.score("sealed", identity, answer) == right


def test_the_order_of_moves_matters_and_half_a_line_is_nothing(
    private: ChessPrivate, key: dict[str, str | list[str]]
) -> None:
    lines = {i: t for i, t in key.items() if isinstance(t, list)}
    assert len(lines) == 11
    for identity, truth in lines.items():
        for order in itertools.permutations(truth):
            verdict = private.score("sealed", identity, f"[{', '.join(order)}]")
            assert verdict == Scored(reward=float(list(order) == truth), passed=list(order) == truth)
        for moves in (truth[:1], truth[:2], [*truth, truth[0]], truth * 2):
            verdict = private.score("sealed", identity, f"[{', '.join(moves)}]")
            assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


@pytest.mark.parametrize(
    "form",
    [
        *(
            "The answer is {}",
            "{} moves",
            "{}.",
            "{}.0",
            "+{}",
            "-{}",
            "[{}]",
            '"{}"',
            "{0} {0}",
            "{0}\n{0}",
            "{0} or 1",
        ),
        *(
            "solution = {0}\nsolution = {0}",
            "solution: {}",
            "solution == {}",
            "Solution = {}",
            "1e2",
            "",
            "0x{}",
            "{},",
        ),
    ],
)
def test_a_number_in_anything_else_is_ill_formed(
    private: ChessPrivate, key: dict[str, str | list[str]], form: str
) -> None:
    for identity, truth in list(key.items())[7:20]:
        if isinstance(truth, str):
            verdict = private.score("sealed", identity, form.format(truth))
            assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_digits_of_other_scripts_huge_numbers_and_silence_are_ill_formed(private: ChessPrivate) -> None:
    arabic = "".join(chr(0x660 + int(d)) for d in "218")
    for answer in (None, arabic, "２１８", "²¹⁸", "9" * 10_000, "218\u200b", "None", "NaN", "[]", "[218, 218, 218]"):
        verdict = private.score("sealed", "knight_path_hard_1", answer)
        assert verdict == Scored(reward=0.0, passed=False, well_formed=False)


def test_moves_are_read_as_written_and_only_in_algebraic_notation() -> None:
    assert parsed("best_3_moves", "[O-O, exd8=Q#, Nbd7+]") == ("O-O", "exd8=Q#", "Nbd7+")
    for text in ("[O-O, x, Nf3]", "[nf3, Nc6, Bb5]", "[Nf9, Nc6, Bb5]", "Nf3, Nc6, Bb5", "[[Nf3, Nc6, Bb5]]", "218"):
        assert parsed("best_3_moves", text) is None
    assert parsed("best_3_moves", "[Rc8, Nc6, Bb5]") != parsed("best_3_moves", "[Rc8+, Nc6, Bb5]")


def test_one_right_answer_of_many_is_one_of_50(private: ChessPrivate, key: dict[str, str | list[str]]) -> None:
    verdicts = [private.score("sealed", i, "218" if i == "knight_path_hard_1" else None) for i in key]
    assert sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(key) == 1 / 50


def test_practice_is_solved_balanced_and_follows_its_seed(public: PublicFace, private: ChessPrivate) -> None:
    for e in public.train:
        assert private.score("train", e.id, public.answers[e.id]) == Scored(reward=1.0, passed=True)
        assert str(solve(e)) == public.answers[e.id]
    for e in public.dev:
        assert private.score("dev", e.id, f"solution = {solve(e)}") == Scored(reward=1.0, passed=True)
    most = Counter(public.answers.values()).most_common(1)[0][1]
    assert most / len(public.train) < 0.2, "no constant goes far"
    assert Chess({"split_seed": 1}).public().dev != public.dev


def test_its_first_harness_and_defaults_are_valid() -> None:
    assert make_harness(Chess({}).harness()).manifest.isolation == "episode"
    assert parse_config({"task": {"name": "longcot-chess"}, **Chess({}).defaults()}).evaluation.sealed_examples == 0
