"""Variation of reflectance within and between parcels: illumination, pigments, leaf area and moisture.

Each acts on one group of bands (illumination on all), so that bands vary together within a group and nearly
independently across groups. A pattern belongs to the ground: it is the same for all sensors on a day; one half of it
persists, the other changes within weeks. Shapes: T dates, C bands, G = 4 factors, S parcels, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maestro_scale.datasets.synthetic.fields import Fields, Grid, fractal, octaves

SPACINGS = octaves(40.0, 5.0)
_ROUGHNESS = 0.15  # Hurst exponent of the fields
_SIGMA = (0.125, 0.305, 0.21, 0.175)  # of the logarithm: illumination, pigments, leaf area, moisture
_PARCEL_SIGMA = (0.05, 0.22, 0.10, 0.14)  # the same, between parcels
_DATE_SIGMA = (0.0, 0.06, 0.05, 0.22)  # of all of a scene from date to date: dust, wilting, rain
_CHANGING = 0.6  # share of the variance that changes from date to date
_MEMORY_DAYS = 12.0  # after which the changing part is another one
_NM = (450, 560, 665, 705, 740, 783, 1000, 1400, 1610, 2190)
# How much a factor changes the reflectance at a wavelength.
_LOADING = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (1.0, 1.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0, 0.3, 0.4),
    (0.0, 0.0, 0.0, 0.3, 0.9, 1.0, 1.0, 0.4, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.3, 0.1, 0.1, 0.1, 0.8, 1.0, 1.0),
)
NUM_FACTORS = len(_LOADING)
NUM_MODES = 3  # of a factor: a constant pattern, and two whose weights change


class Ground:
    """The factors of one scene. ``rng``: the stream of a purpose."""

    def __init__(self, rng: Callable[[str], np.random.Generator], extent_m: float, num_parcels: int) -> None:
        amplitudes = np.repeat(fractal(SPACINGS, _ROUGHNESS)[None], NUM_FACTORS * NUM_MODES, axis=0)
        self._fields = Fields(rng("ground"), extent_m, SPACINGS, amplitudes)
        modes = _daily(rng("days"), NUM_MODES - 1)
        self._weights = modes / np.linalg.norm(modes, axis=1, keepdims=True)
        self._dates = (_daily(rng("weather2"), NUM_FACTORS) * np.array(_DATE_SIGMA)).astype(np.float32)
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
        course += self._dates[_day(days)][..., None]
        course += np.tensordot(self._parcels, parcel_shares.reshape(len(parcel_shares), -1), 1)
        return course.reshape(len(days), NUM_FACTORS, grid.size, grid.size)

    def on_day(self, day: int, nm: np.ndarray, grid: Grid, parcels: np.ndarray) -> list[np.ndarray]:
        """By band, (H, W) reflectance relative to the mean of its class, on pixels of one parcel each."""
        course = self._course(np.array([day]))[0]
        # Bands of one group vary alike: each distinct combination of factors is computed once.
        distinct, which = np.unique(loading(nm).round(2), axis=0, return_inverse=True)
        mix = (distinct * np.array(_SIGMA))[:, :, None] * course
        values = self._fields.sample(grid, mix.reshape(len(distinct), -1))
        effects = self._parcels + self._dates[_day(np.array([day]))].T
        for value, effect in zip(values, distinct.astype(np.float32) @ effects, strict=True):
            value += effect.take(parcels)
        np.exp(values, out=values)
        return [values[i] for i in which.ravel()]

    def _course(self, days: np.ndarray) -> np.ndarray:
        """(T, modes) weights of a factor's modes on ``days``; their squares sum to one."""
        constant = np.full((len(days), 1), np.sqrt(1 - _CHANGING))
        return np.concatenate([constant, np.sqrt(_CHANGING) * self._weights[_day(days)]], axis=1)


def loading(nm: np.ndarray) -> np.ndarray:
    """(C, G) by how much each factor changes the reflectance at ``nm`` (C,)."""
    return np.stack([np.interp(nm, _NM, factor) for factor in _LOADING], axis=1)


def deviation(nm: np.ndarray) -> np.ndarray:
    """(C,) standard deviation of the logarithm of the reflectance at ``nm`` (C,) at a place, without illumination."""
    variance = np.array((_SIGMA, _PARCEL_SIGMA, _DATE_SIGMA)) ** 2
    return np.sqrt(loading(nm)[:, 1:] ** 2 @ variance.sum(axis=0)[1:])


def _daily(rng: np.random.Generator, count: int) -> np.ndarray:
    """(366, count) numbers of variance one for the days of a year, which change within ``_MEMORY_DAYS``."""
    keep = np.exp(-np.arange(366) / _MEMORY_DAYS)[:, None]
    # An autoregressive process of order one, as a sum: keep[s] weighs what was drawn s days ago.
    drawn = keep * np.cumsum(rng.standard_normal((366, count)) / keep, axis=0)
    return drawn / np.sqrt(np.cumsum(keep**2, axis=0))


def _day(days: np.ndarray) -> np.ndarray:
    """Index of days of the year among 366."""
    return np.asarray(days, int) % 366
