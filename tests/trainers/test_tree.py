"""Token trees give every sequence the hidden states that it would have alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.trainers.tree import build_tree, pack, shared_prefix

Sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=8)


@given(Sequences)
def test_every_path_spells_its_sequence(sequences: list[list[int]]) -> None:
    tree = build_tree(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == sequence
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert tree.parents[path].tolist() == [-1, *path[:-1].tolist()]


@given(Sequences)
def test_a_tree_has_one_node_for_each_distinct_prefix(sequences: list[list[int]]) -> None:
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(build_tree(sequences).tokens) == len(prefixes)


@given(Sequences)
def test_nodes_attend_to_their_ancestors_and_themselves_only(sequences: list[list[int]]) -> None:
    tree = build_tree(sequences)
    mask = tree.ancestors()
    for path in tree.paths:
        for i, node in enumerate(path):
            assert np.flatnonzero(mask[node]).tolist() == sorted(path[: i + 1].tolist())


@given(Sequences)
def test_the_shared_prefix_is_shared_by_all_and_the_longest(sequences: list[list[int]]) -> None:
    n = shared_prefix(sequences)
    assert len({tuple(s[:n]) for s in sequences}) == 1
    assert min(map(len, sequences)) == n or len({s[n] for s in sequences}) > 1


@given(st.lists(Sequences, max_size=6), st.integers(1, 12))
def test_packing_takes_each_unit_once_whole_and_keeps_the_budget(units: list[list[list[int]]], budget: int) -> None:
    runs = list(pack(units, budget))
    assert sorted(i for run in runs for i in run) == list(range(len(units)))
    for run in runs:
        assert len(run) == 1 or len(build_tree([s for i in run for s in units[i]]).tokens) <= budget


def test_sequences_that_share_little_get_trees_of_their_own_and_those_that_share_stay_together() -> None:
    def row(first: int, length: int = 200) -> list[int]:
        return [first, *range(1000, 1000 + length)]

    assert list(pack([[row(1)], [row(2)]], 4096)) == [[0], [1]]
    assert list(pack([[row(1, 30)], [row(2, 30)]], 4096)) == [[0, 1]]  # too short to fill a machine
    assert list(pack([[[*row(1), i]] for i in range(8)], 4096)) == [list(range(8))]


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        build_tree([[1], []])
    assert shared_prefix([]) == 0


def test_hidden_states_of_a_tree_are_those_of_the_plain_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bascule.trainers.base_model import load_model
    from tests.tiny_model import make_tiny_model

    model = load_model(make_tiny_model(tmp_path))
    sequences = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10, 11], [12, 6, 7]]
    tree = build_tree(sequences)
    with torch.inference_mode():
        mask = torch.from_numpy(tree.ancestors())[None, None]
        together = model.base_model(
            input_ids=torch.from_numpy(tree.tokens)[None],
            position_ids=torch.from_numpy(tree.positions)[None],
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[0]
        for sequence, path in zip(sequences, tree.paths, strict=True):
            alone = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
            torch.testing.assert_close(together[torch.from_numpy(path)], alone, atol=1e-4, rtol=1e-4)
