"""Spatially correlated noise on the ground: defined in metres, averaged over the pixels of any sensor.

A field is a sum of octaves. An octave is a lattice of Gaussian numbers, interpolated by cubic B-splines. The value of a
pixel is the mean of the splines over its footprint, so that the mean of fine pixels equals the coarse pixel.
Shapes: F fields, O octaves, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import sparse

_SPLINE_VARIANCE = (151 / 315) ** 2  # of an interpolated lattice of unit variance, averaged over positions
_REACH = 3  # lattice points beyond the scene, which the splines at its edge need
MARGIN_M = 2.0  # largest margin of an image around the scene
_NEGLIGIBLE = 0.2  # an octave finer than this share of a footprint averages to nearly zero


@dataclass(frozen=True)
class Grid:
    """Square pixels of ``resolution_m`` over a scene of ``extent_m``, with ``margin_m`` more on every side; less, where
    it is negative."""

    extent_m: float
    resolution_m: float
    margin_m: float = 0.0

    @property
    def size(self) -> int:
        """Pixels per side."""
        return round((self.extent_m + 2 * self.margin_m) / self.resolution_m)

    @property
    def centres(self) -> np.ndarray:
        """(size,) positions of the pixels' centres in metres, along either axis."""
        return (np.arange(self.size) + 0.5) * self.resolution_m - self.margin_m


class Fields:
    """Independent fields over a scene, drawn from ``rng``.

    ``amplitudes`` (F, O): standard deviation of each octave. ``spacings`` (O,): metres between lattice points,
    decreasing.
    """

    def __init__(
        self, rng: np.random.Generator, extent_m: float, spacings: Sequence[float], amplitudes: np.ndarray
    ) -> None:
        self._rng = rng
        self._extent_m = extent_m
        self._spacings = tuple(spacings)
        self._amplitudes = np.asarray(amplitudes, np.float32) / np.float32(np.sqrt(_SPLINE_VARIANCE))
        self._lattices: list[np.ndarray] = []

    def sample(
        self, grid: Grid, mix: np.ndarray | None = None, footprint_m: float | None = None
    ) -> np.ndarray:
        """(F, H, W) float32 means over squares of ``footprint_m`` (a pixel by default) around each pixel's centre.

        ``mix`` (G, F): sample G linear combinations instead.
        """
        width = grid.resolution_m if footprint_m is None else footprint_m
        resolved = sum(spacing >= _NEGLIGIBLE * width for spacing in self._spacings)
        self._draw(resolved)
        each, joined = _weights(grid, self._extent_m, self._spacings[:resolved], width)
        partial = []
        for lattice, weight in zip(self._lattices, each, strict=False):
            mixed = lattice if mix is None else np.tensordot(mix.astype(np.float32), lattice, 1)
            count, side, _ = mixed.shape
            rows = weight @ mixed.transpose(1, 0, 2).reshape(side, -1)  # (H, F * side)
            partial.append(rows.reshape(-1, count, side).transpose(2, 1, 0).reshape(side, -1))
        # One product for all octaves: the pass over the pixels is the expensive one.
        values = joined @ np.concatenate(partial)  # (W, F * H)
        return np.ascontiguousarray(values.reshape(grid.size, -1, grid.size).transpose(1, 2, 0))

    def _draw(self, count: int) -> None:
        """Have the first ``count`` lattices. They are drawn in this order from one stream, so that they do not depend
        on how many of them a sensor resolves."""
        for octave in range(len(self._lattices), count):
            side = _lattice_size(self._extent_m, self._spacings[octave])
            drawn = self._rng.standard_normal((len(self._amplitudes), side, side), np.float32)
            drawn *= self._amplitudes[:, octave, None, None]
            self._lattices.append(drawn)


def octaves(largest_m: float, smallest_m: float) -> tuple[float, ...]:
    """Lattice spacings from ``largest_m`` down to ``smallest_m``, each half of the one before."""
    found = [largest_m]
    while found[-1] / 2 >= smallest_m:
        found.append(found[-1] / 2)
    return tuple(found)


def fractal(spacings: Sequence[float], roughness: float) -> np.ndarray:
    """(O,) amplitudes proportional to spacing ** ``roughness`` (the Hurst exponent), of unit variance in total."""
    amplitudes = np.array(spacings, float) ** roughness
    return amplitudes / np.sqrt((amplitudes**2).sum())


def _lattice_size(extent_m: float, spacing: float) -> int:
    return int(np.ceil((extent_m + 2 * MARGIN_M) / spacing)) + 2 * _REACH + 1


@lru_cache(maxsize=64)
def _weights(
    grid: Grid, extent_m: float, spacings: tuple[float, ...], width: float
) -> tuple[tuple[sparse.csr_matrix, ...], sparse.csr_matrix]:
    """By octave, (pixels, side) means of the lattice's splines over the pixels of one axis; and all of them joined."""
    found = []
    for spacing in spacings:
        side = _lattice_size(extent_m, spacing)
        low = (grid.centres - width / 2 + MARGIN_M) / spacing + _REACH
        high = low + width / spacing
        taps = (np.floor(low).astype(int) - 1)[:, None] + np.arange(int(np.ceil(width / spacing)) + 4)
        weight = (_integral(high[:, None] - taps) - _integral(low[:, None] - taps)) * spacing / width
        inside = (taps >= 0) & (taps < side)
        rows = np.broadcast_to(np.arange(len(taps))[:, None], taps.shape)
        found.append(
            sparse.csr_matrix(
                (weight[inside].astype(np.float32), (rows[inside], taps[inside])), shape=(len(taps), side)
            )
        )
    return tuple(found), sparse.hstack(found, format="csr")


def _integral(u: np.ndarray) -> np.ndarray:
    """Integral of the cubic B-spline (support −2 to 2) from −2 to ``u``."""
    inside = np.clip(u, -2, 2)
    terms = ((1, 2), (-4, 1), (6, 0), (-4, -1))
    return sum(c * np.maximum(inside + shift, 0) ** 4 for c, shift in terms) / 24


def plane_wave(row: np.ndarray, col: np.ndarray, fx: float, fy: float, phase: float) -> np.ndarray:
    """(H, W) float32 sin(2π(fx·x + fy·y + phase)), as products of short vectors by the addition theorem."""
    along_x = 2 * np.pi * (fx * col + phase)
    along_y = (2 * np.pi * fy * row)[:, None]
    sin_x, cos_x = np.sin(along_x).astype(np.float32), np.cos(along_x).astype(np.float32)
    sin_y, cos_y = np.sin(along_y).astype(np.float32), np.cos(along_y).astype(np.float32)
    return sin_x * cos_y + cos_x * sin_y
