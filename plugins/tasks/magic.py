"""MAGIC in numpy, as a program for the task ``denoising`` (van Dijk et al. 2018, Cell 174:716).

Markov diffusion over a graph of nearest neighbours, with the parameters that the Open Problems benchmark gives: square
root of shares, 100 principal components, an alpha-decay kernel over 15 neighbours with the distance to the fifth as
its width, three steps.
"""

from typing import Any

import numpy as np
from scipy import sparse
from scipy.linalg import eigh

NEIGHBOURS = 15
WIDTH_NEIGHBOUR = 5
DECAY = 1.0
STEPS = 3
COMPONENTS = 100
THRESHOLD = 1e-4


def magic(counts: Any, *, reversed_normalisation: bool = False) -> Any:
    """Denoised counts, cells x genes.

    Args:
        counts: cells x genes, integers.
        reversed_normalisation: take the root first and shares of it afterwards. The result then has next to nothing of
            the counts' totals, which is all that improves in the published Poisson score.
    """
    values = counts.astype(np.float64)
    if reversed_normalisation:
        values = np.sqrt(values)
    totals = np.maximum(values.sum(axis=1, keepdims=True), 1e-12)
    values /= totals
    if not reversed_normalisation:
        values = np.sqrt(values)
    step = transitions(components(values))
    for _ in range(STEPS):
        values = step @ values
    return values**2 * totals


def components(values: Any) -> Any:
    """Principal components, cells x at most 100, exact."""
    centred = values - values.mean(axis=0)
    cells = len(values)
    variances, directions = eigh(centred @ centred.T, subset_by_index=(max(0, cells - COMPONENTS), cells - 1))
    return directions * np.sqrt(np.maximum(variances, 0.0))


def transitions(points: Any) -> Any:
    """The Markov matrix of the symmetric alpha-decay kernel, cells x cells, sparse."""
    cells = len(points)
    squares = (points**2).sum(axis=1)
    every = squares[:, None] + squares[None, :] - 2.0 * points @ points.T
    np.fill_diagonal(every, 0.0)
    near = min(NEIGHBOURS + 1, cells)
    indices = np.argpartition(every, near - 1, axis=1)[:, :near]
    distances = np.sqrt(np.maximum(np.take_along_axis(every, indices, axis=1), 0.0))
    # The cell itself is among its neighbours, with the distance 0.
    width = np.maximum(np.sort(distances, axis=1)[:, min(WIDTH_NEIGHBOUR, near - 1), None], 1e-12)
    weights = np.exp(-((distances / width) ** DECAY))
    weights[weights < THRESHOLD] = 0.0
    rows = np.repeat(np.arange(cells), near)
    kernel = sparse.csr_array((weights.ravel(), (rows, indices.ravel())), shape=(cells, cells))
    kernel = (kernel + kernel.T) / 2
    return sparse.diags_array(1.0 / kernel.sum(axis=1)) @ kernel


def denoise(counts: Any, seed: int, budget_s: float) -> Any:
    """What the task calls."""
    return magic(counts)
