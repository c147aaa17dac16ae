"""A first denoiser: every cell becomes the mean of its nearest neighbours, taken over logarithms of shares.

``denoise(counts, seed, budget_s)`` gets integers, cells x genes, and returns what the counts would be without sampling
noise, an array of the same shape. PARAMS can be tuned within TUNABLE.
"""

from typing import Any

import numpy as np

PARAMS: dict[str, Any] = {
    "scale": 500.0,
    "components": 5,
    "neighbours": 10,
    "steps": 1,
}
TUNABLE = {
    "scale": {"low": 300.0, "high": 100000.0, "log": True},
    "components": {"low": 3, "high": 40, "integer": True, "log": True},
    "neighbours": {"low": 8, "high": 60, "integer": True, "log": True},
    "steps": {"low": 1, "high": 3, "integer": True},
}


def denoise(counts: Any, seed: int, budget_s: float) -> Any:
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1).astype(np.float32)
    values = np.log1p(counts / totals * np.float32(PARAMS["scale"]))
    mixing = mean_of_neighbours(principal_components(values))
    for _ in range(PARAMS["steps"]):
        values = mixing @ values
    found = np.expm1(values)
    return found * (totals / np.maximum(found.sum(axis=1, keepdims=True), 1e-9))


def principal_components(values: Any) -> Any:
    """Cells x components."""
    centred = values - values.mean(axis=0)
    variances, directions = np.linalg.eigh(centred @ centred.T)
    kept = slice(-min(PARAMS["components"], len(values)), None)
    return directions[:, kept] * np.sqrt(np.maximum(variances[kept], 0))


def mean_of_neighbours(points: Any) -> Any:
    """Cells x cells; each row is the mean over a cell and its nearest ones."""
    squares = (points**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    np.fill_diagonal(distances, -1)
    near = min(PARAMS["neighbours"], len(points))
    nearest = np.argpartition(distances, near - 1, axis=1)[:, :near]
    mixing = np.zeros_like(distances)
    np.put_along_axis(mixing, nearest, 1 / near, axis=1)
    return mixing
