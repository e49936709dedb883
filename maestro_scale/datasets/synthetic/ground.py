"""Variation of reflectance within and between parcels: illumination, pigments, leaf area and moisture.

Each acts on one group of bands (illumination on all), so that bands vary together within a group and nearly
independently across groups. A pattern belongs to the ground: it is the same for all sensors on a day; one half of it
persists, the other changes within weeks. Shapes: T dates, C bands, G = 4 factors, S parcels, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maestro_scale.datasets.synthetic.fields import Fields, Grid, fractal, octaves

SPACINGS = octaves(80.0, 5.0)
_ROUGHNESS = 0.3  # Hurst exponent of the fields
_SIGMA = (0.15, 0.42, 0.28, 0.26)  # of the logarithm: illumination, pigments, leaf area, moisture
_PARCEL_SIGMA = (0.03, 0.08, 0.05, 0.06)  # the same, between parcels
_CHANGING = 0.5  # share of the variance that changes from date to date
_MEMORY_DAYS = 12.0  # after which the changing part is another one
_NM = (450, 560, 665, 705, 740, 783, 1000, 1400, 1610, 2190)
# How much a factor changes the reflectance at a wavelength.
_LOADING = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (1.0, 0.9, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0, 0.3, 0.4),
    (0.0, 0.1, 0.0, 0.3, 0.9, 1.0, 1.0, 0.4, 0.0, 0.0),
    (0.0, 0.1, 0.0, 0.3, 0.1, 0.1, 0.1, 0.8, 1.0, 1.0),
)
NUM_FACTORS = len(_LOADING)
NUM_MODES = 3  # of a factor: a constant pattern, and two whose weights change


class Ground:
    """The factors of one scene. ``rng``: the stream of a purpose."""

    def __init__(self, rng: Callable[[str], np.random.Generator], extent_m: float, num_parcels: int) -> None:
        amplitudes = np.repeat(fractal(SPACINGS, _ROUGHNESS)[None], NUM_FACTORS * NUM_MODES, axis=0)
        self._fields = Fields(lambda octave: rng(f"ground{octave}"), extent_m, SPACINGS, amplitudes)
        self._weights = _daily_weights(rng("days"))
        drawn = rng("parcels").standard_normal((NUM_FACTORS, num_parcels))
        self._parcels = (drawn * np.array(_PARCEL_SIGMA)[:, None]).astype(np.float32)

    def factors(
        self, days: np.ndarray, grid: Grid, parcel_shares: np.ndarray, footprint_m: float
    ) -> np.ndarray:
        """(T, G, H, W) the factors' logarithms, averaged over ``footprint_m``."""
        modes = self._fields.sample(grid, footprint_m=footprint_m)
        modes = modes.reshape(NUM_FACTORS, NUM_MODES, -1)
        course = np.einsum("tm,gmn->tgn", self._course(days).astype(np.float32), modes)
        course *= np.array(_SIGMA, np.float32)[:, None]
        course += np.tensordot(self._parcels, parcel_shares.reshape(len(parcel_shares), -1), 1)
        return course.reshape(len(days), NUM_FACTORS, grid.size, grid.size)

    def on_day(self, day: int, nm: np.ndarray, grid: Grid, parcels: np.ndarray) -> np.ndarray:
        """(C, H, W) logarithm of the reflectance relative to the mean of its class, on pixels of one parcel each."""
        course = self._course(np.array([day]))[0]
        load = loading(nm)  # (C, G)
        distinct, which = np.unique(load.round(2), axis=0, return_inverse=True)
        mix = (distinct * np.array(_SIGMA))[:, :, None] * course
        values = self._fields.sample(grid, mix.reshape(len(distinct), -1))
        values += (distinct.astype(np.float32) @ self._parcels)[:, parcels]
        return values[which.ravel()]

    def _course(self, days: np.ndarray) -> np.ndarray:
        """(T, modes) weights of a factor's modes on ``days``; their squares sum to one."""
        constant = np.full((len(days), 1), np.sqrt(1 - _CHANGING))
        return np.concatenate([constant, np.sqrt(_CHANGING) * self._weights[np.asarray(days) % 366]], axis=1)


def loading(nm: np.ndarray) -> np.ndarray:
    """(C, G) by how much each factor changes the reflectance at ``nm`` (C,)."""
    return np.stack([np.interp(nm, _NM, factor) for factor in _LOADING], axis=1)


def deviation(nm: np.ndarray) -> np.ndarray:
    """(C,) standard deviation of the logarithm of the reflectance at ``nm`` (C,) at a place, without illumination."""
    variance = np.array(_SIGMA) ** 2 + np.array(_PARCEL_SIGMA) ** 2
    return np.sqrt(loading(nm)[:, 1:] ** 2 @ variance[1:])


def _daily_weights(rng: np.random.Generator) -> np.ndarray:
    """(366, 2) unit vectors for the days of a year, which forget each other within ``_MEMORY_DAYS``."""
    drawn = rng.standard_normal((366, NUM_MODES - 1))
    keep = np.exp(-1 / _MEMORY_DAYS)
    for day in range(1, len(drawn)):
        drawn[day] = keep * drawn[day - 1] + np.sqrt(1 - keep**2) * drawn[day]
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
