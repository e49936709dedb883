"""Regression metrics from sums over tiles: RMSE, MAE, bias and R².

The sums of a tile are computed in float64 by one rank; they are added in the order of the tiles by one process, so a
score does not depend on the number of ranks. Shapes: N tiles; ``…`` are leading axes, such as bootstrap resamples.
"""

from __future__ import annotations

import numpy as np

NUM_SUMS = 6  # of a tile, see `tile_sums`


def tile_sums(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(N, 6) float64: number of values, sums of error, squared error, absolute error, label and squared label.

    ``predicted``, ``target``: (N, …) numbers; an error is predicted - target. Values whose target is NaN are left out.
    ValueError if the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predictions have shape {predicted.shape}, targets {target.shape}: they must agree")
    axes = tuple(range(1, target.ndim))
    counted = ~np.isnan(target)
    label = np.where(counted, target, 0).astype(np.float64)
    error = np.where(counted, predicted, 0).astype(np.float64) - label
    parts = (counted.astype(np.float64), error, error**2, np.abs(error), label, label**2)
    return np.stack([part.sum(axis=axes) for part in parts], axis=1)


def rmse(sums: np.ndarray) -> np.ndarray:
    """Root mean square error, (…), of sums (…, 6); NaN where there is no value."""
    return np.sqrt(_mean(sums, 2))


def regression_scores(sums: np.ndarray) -> dict[str, float]:
    """``r2``, ``mae`` and ``bias`` (mean of predicted - label) of sums (6,).

    R² = 1 - Σ(predicted - label)² / Σ(label - mean label)², as in scikit-learn's r2_score; NaN if all labels are equal.
    """
    num, _, squared_error, _, label, squared_label = (float(s) for s in sums)
    variation = squared_label - label**2 / num if num else 0.0
    r2 = 1 - squared_error / variation if variation > 1e-12 * squared_label else float("nan")
    return {"r2": r2, "mae": float(_mean(sums, 3)), "bias": float(_mean(sums, 1))}


def _mean(sums: np.ndarray, index: int) -> np.ndarray:
    sums = np.asarray(sums, np.float64)
    num = sums[..., 0]
    return np.divide(sums[..., index], num, out=np.full_like(num, np.nan), where=num > 0)
