"""Bootstrap intervals over tiles: the variation of a score over test sets of the same size and kind.

Scores are functions of counts that are summed over tiles, so a resample is a weighted sum of per-tile counts: nothing
is predicted again, and the statistic is computed for all resamples at once. Two results are compared in
:mod:`..paired`, over seeds too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Summed counts (R, …) of R resamples → (R,) scores; e.g. ``metrics.wf1`` or ``metrics.mean_iou``."""

_CHUNK_CELLS = 4_000_000  # tiles × resamples drawn at once: 32 MB of weights


def bootstrap_interval(
    statistic: Statistic, counts: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (low, high) of a statistic over tiles drawn with replacement.

    ``counts``: (tiles, …) counts of each tile on its own: ``metrics.tile_counts``, or per-tile confusions.
    Deterministic in ``seed``. A resample without a counted pixel has no score and is left out. ValueError if
    there is no tile, no resample with a score, or ``level`` is not within (0, 1).
    """
    _check(counts, resamples, level)
    return _interval(_resampled(statistic, counts, resamples, seed), level)


def _check(counts: np.ndarray, resamples: int, level: float) -> None:
    if len(counts) == 0:
        raise ValueError("a bootstrap over no tiles: there is nothing to resample")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie within (0, 1) and resamples {resamples} be at least 1")


def _resampled(statistic: Statistic, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    flat = counts.reshape(len(counts), -1).astype(np.float64)  # sums below 2^53 stay exact
    scores = [
        statistic((weights @ flat).reshape(len(weights), *counts.shape[1:]))
        for weights in _weights(len(counts), resamples, seed)
    ]
    return np.concatenate(scores)


def _weights(num_tiles: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each tile is drawn, (chunk, tiles) float64. Row r depends only on (seed, r), so the resamples do not
    depend on the size of a chunk."""
    chunk = max(1, _CHUNK_CELLS // num_tiles)
    for start in range(0, resamples, chunk):
        rows = []
        for r in range(start, min(start + chunk, resamples)):
            generator = np.random.Generator(np.random.Philox(key=[seed, r]))
            rows.append(np.bincount(generator.integers(num_tiles, size=num_tiles), minlength=num_tiles))
        yield np.stack(rows).astype(np.float64)


def _interval(scores: np.ndarray, level: float) -> tuple[float, float]:
    defined = scores[~np.isnan(scores)]
    if not len(defined):
        raise ValueError("a bootstrap of tiles without a score")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
