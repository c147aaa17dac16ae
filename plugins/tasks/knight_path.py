"""The shortest way of a knight over given squares, exactly.

Moves between two squares are counted by breadth-first search on the board; the order of the squares is an open
travelling salesman's path over those distances, solved to proven optimality.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

Square = tuple[int, int]

MOVES = tuple((a * x, b * y) for x, y in ((1, 2), (2, 1)) for a in (-1, 1) for b in (-1, 1))
#: Up to so many targets the order is found by dynamic programming.
FEW = 8


@lru_cache(maxsize=16)
def _reach(size: int) -> tuple[tuple[int, ...], ...]:
    """For each square of the board, by row and column as one number, the squares one move away."""
    squares = [(x, y) for x in range(size) for y in range(size)]
    return tuple(
        tuple((x + dx) * size + y + dy for dx, dy in MOVES if 0 <= x + dx < size and 0 <= y + dy < size)
        for x, y in squares
    )


def moves_from(start: Square, size: int) -> list[list[int]]:
    """Moves of a knight from ``start`` to each square of a ``size`` × ``size`` board; -1 where it cannot get."""
    reach = _reach(size)
    first = start[0] * size + start[1]
    board = [-1] * size**2
    board[first] = 0
    frontier, count = [first], 0
    while frontier:
        count += 1
        reached = []
        for square in frontier:
            for other in reach[square]:
                if board[other] < 0:
                    board[other] = count
                    reached.append(other)
        frontier = reached
    return [board[row * size : (row + 1) * size] for row in range(size)]


def fewest_moves(start: Square, targets: Sequence[Square], size: int) -> int:
    """The fewest moves with which a knight from ``start`` touches every target at least once.

    Raises:
        ValueError: a target cannot be reached.
    """
    stops = list(dict.fromkeys((start, *targets)))
    distance = []
    for stop in stops:
        board = moves_from(stop, size)
        distance.append([board[x][y] for x, y in stops])
    if any(d < 0 for d in distance[0]):
        raise ValueError(f"A knight from {start} cannot get to every target on a {size} x {size} board.")
    if len(stops) == 1:
        return 0
    return shortest_path_of_few(distance) if len(stops) <= FEW + 1 else shortest_path(distance)


def shortest_path_of_few(distance: Sequence[Sequence[int]]) -> int:
    """Length of the shortest path from 0 through all others (Held and Karp, 1962): time 2ⁿ n²."""
    n = len(distance)
    best: dict[tuple[int, int], int] = {(1 << j, j): distance[0][j] for j in range(1, n)}
    for subset in range(2, 1 << n, 2):
        for last in range(1, n):
            if (length := best.get((subset, last))) is None:
                continue
            for j in range(1, n):
                if not subset >> j & 1:
                    key = (subset | 1 << j, j)
                    best[key] = min(best.get(key, length + distance[last][j]), length + distance[last][j])
    full = (1 << n) - 2
    return min(best[full, last] for last in range(1, n))


def shortest_path(distance: Sequence[Sequence[int]]) -> int:
    """Length of the shortest path from 0 through all others, by integer programming.

    A further node joins the ends to a tour: it is linked with node 0 and, at no cost, with the last one. Tours that
    fall apart are cut off one after the other (Dantzig, Fulkerson and Johnson, 1954), the relaxed problem's first.

    Args:
        distance: square, symmetric, whole numbers.
    """
    import numpy as np

    n = len(distance)
    edges = [(i, j) for i in range(n) for j in range(i + 1, n)] + [(i, n) for i in range(n)]
    ends = np.array(edges)
    cost = np.array([distance[i][j] if j < n else 0 for i, j in edges], dtype=float)
    fixed = np.array([e == (0, n) for e in edges])
    cuts: list[Any] = []
    known: set[frozenset[int]] = set()
    for whole in (False, True):
        while True:
            used = _solved(ends, cost, fixed, cuts, n + 1, whole=whole)
            new = [s for s in _loose(ends, used, n + 1, whole=whole) if s not in known]
            if not new:
                break
            for side in new:
                known.add(side)
                inside = np.isin(ends, list(side))
                cuts.append(inside[:, 0] != inside[:, 1])
    return round(float(cost @ used))


def _solved(ends: Any, cost: Any, fixed: Any, cuts: Sequence[Any], nodes: int, *, whole: bool) -> Any:
    """Which edges the best solution uses so far: each node has two, each cut is crossed twice."""
    import numpy as np
    from scipy import optimize, sparse

    m = len(cost)
    degrees = sparse.csr_matrix((np.ones(2 * m), (ends.ravel(), np.repeat(np.arange(m), 2))), (nodes, m))
    constraints = [optimize.LinearConstraint(degrees, 2, 2)]
    if cuts:
        constraints.append(optimize.LinearConstraint(sparse.csr_matrix(np.array(cuts, dtype=float)), 2, np.inf))
    result = optimize.milp(
        cost,
        integrality=np.full(m, int(whole)),
        bounds=optimize.Bounds(fixed.astype(float), 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status != 0:
        raise ValueError(f"The path has no proven optimum: {result.message}")
    return result.x


def _loose(ends: Any, used: Any, nodes: int, *, whole: bool) -> list[frozenset[int]]:
    """Sets of nodes that too few of the used edges leave: parts of a whole solution, smallest cuts of a relaxed one."""
    import numpy as np
    from scipy.sparse import csgraph, csr_matrix

    strong = used > (0.5 if whole else 1e-6)
    graph = csr_matrix((used[strong], (ends[strong, 0], ends[strong, 1])), (nodes, nodes))
    count, part = csgraph.connected_components(graph, directed=False)
    if count > 1:
        return [frozenset(np.flatnonzero(part == k).tolist()) for k in range(count)]
    if whole:
        return []
    scale = 10_000
    capacity = csr_matrix(np.rint((graph + graph.T).toarray() * scale).astype(np.int32))
    found = set()
    for sink in range(1, nodes):
        flow = csgraph.maximum_flow(capacity, 0, sink)
        if flow.flow_value < 2 * scale - 10:
            residual = capacity - flow.flow
            residual.data[residual.data <= 0] = 0
            residual.eliminate_zeros()
            reached = csgraph.breadth_first_order(residual, 0, return_predecessors=False)
            found.add(frozenset(range(nodes)) - frozenset(reached.tolist()))
    return sorted(found, key=sorted)
