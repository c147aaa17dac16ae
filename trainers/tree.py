"""Token trees: sequences that share a prefix are computed once.

The sequences of a batch are merged into a trie whose nodes are tokens. One forward pass over the nodes, with each
node attending to its ancestors only and standing at the position of its depth, gives every sequence the hidden states
that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenTree:
    """A trie in an order in which parents stand before children.

    Attributes:
        tokens: [N] token ids.
        positions: [N] depth of each node, the root's children at 0.
        parents: [N] index of the parent, -1 at depth 0.
        paths: for each sequence, in the order given, the node of each of its tokens.
    """

    tokens: Ids
    positions: Ids
    parents: Ids
    paths: tuple[Ids, ...]

    def ancestors(self) -> npt.NDArray[np.bool_]:
        """[N, N] mask; row i is true at i and at the ancestors of i."""
        n = len(self.tokens)
        mask = np.zeros((n, n), dtype=np.bool_)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] = mask[parent]
            mask[i, i] = True
        return mask


def build_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Merge sequences of token ids into one trie.

    Raises:
        ValueError: a sequence is empty.
    """
    tokens: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    paths: list[Ids] = []
    for sequence in sequences:
        if not len(sequence):
            raise ValueError("an empty sequence has no place in a token tree")
        node = -1
        path = np.empty(len(sequence), dtype=np.int64)
        for depth, token in enumerate(sequence):
            key = (node, int(token))
            child = children.get(key)
            if child is None:
                child = children[key] = len(tokens)
                tokens.append(int(token))
                positions.append(depth)
                parents.append(node)
            node = child
            path[depth] = node
        paths.append(path)
    return TokenTree(
        np.asarray(tokens, dtype=np.int64),
        np.asarray(positions, dtype=np.int64),
        np.asarray(parents, dtype=np.int64),
        tuple(paths),
    )


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    if not sequences:
        return 0
    first, last = min(sequences, key=tuple), max(sequences, key=tuple)
    n = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        n += 1
    return n


#: Tokens that a tree of fewer nodes may take in whatever they share: short passes do not use a machine fully.
SHORT = 128
#: Attention over a pair of tokens costs about as much as the linear layers do over 1/1500 token (at 135M parameters;
#: over less in larger models, which makes joining the better choice sooner).
PAIRS_PER_TOKEN = 1500


def pack(units: Sequence[Sequence[Sequence[int]]], budget: int) -> Iterator[list[int]]:
    """Split units of sequences into runs whose trees hold at most ``budget`` nodes (a larger unit stands alone).

    Units are taken in the lexicographic order of their sequences, in which neighbours share the most. One that shares
    so little with the tree that attending over all of it costs more than the sharing saves begins a new run. Yields
    indices into ``units``.
    """
    order = sorted(range(len(units)), key=lambda i: [tuple(s) for s in units[i]])
    chosen: list[int] = []
    size = 0
    for i in order:
        alone = _nodes((), units[i])
        new = _nodes(units[chosen[-1]][-1], units[i]) if chosen else alone
        full = size + new > budget
        apart = size + new > SHORT and (alone - new) * PAIRS_PER_TOKEN < new * size
        if chosen and (full or apart):
            yield chosen
            chosen, size, new = [], 0, alone
        chosen.append(i)
        size += new
    if chosen:
        yield chosen


def _nodes(before: Sequence[int], unit: Sequence[Sequence[int]]) -> int:
    """At most how many nodes a unit adds to a tree that holds the sequence ``before``."""
    return sum(len(s) - shared_prefix((b, s)) for b, s in pairwise((before, *unit)))
