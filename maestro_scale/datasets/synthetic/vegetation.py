"""Reflectance of pure classes: leaves of a family that follow a season, above a ground with a season of its own.

Shapes: T dates, C bands, V variants, P candidate tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maestro_scale.datasets.synthetic.classes import Variant

DAYS = 365.25
NUM_SHIFTED = 5  # seasons that are one curve, shifted in time
BAND_NM = {
    "B": 490, "G": 560, "R": 660, "NIR": 835,
    "B2": 490, "B3": 560, "B4": 665, "B5": 705, "B6": 740, "B7": 783, "B8": 842, "B8A": 865,
    "B11": 1610, "B12": 2190,
    "L1": 443, "L2": 482, "L3": 561, "L4": 655, "L5": 865, "L6": 1609, "L7": 2201, "L8": 590, "L9": 1373,
    "L10": 10895, "L11": 12005,
}  # fmt: skip

NM = (450, 490, 560, 665, 705, 740, 783, 842, 1000, 1610, 2190)
_SOIL = (0.05, 0.06, 0.085, 0.12, 0.14, 0.165, 0.18, 0.19, 0.22, 0.27, 0.22)
# Grass, moss and litter: what the ground becomes from soil under its own season.
_UNDERSTOREY = (0.022, 0.027, 0.050, 0.034, 0.090, 0.225, 0.270, 0.290, 0.30, 0.16, 0.080)
# Full vegetation by family. They differ in shape (red edge, SWIR), little in brightness.
_LEAVES = (
    (0.020, 0.025, 0.055, 0.026, 0.100, 0.35, 0.43, 0.47, 0.48, 0.21, 0.085),
    (0.020, 0.025, 0.045, 0.028, 0.075, 0.29, 0.37, 0.42, 0.45, 0.15, 0.065),
    (0.030, 0.040, 0.080, 0.045, 0.125, 0.29, 0.34, 0.375, 0.39, 0.23, 0.125),
    (0.020, 0.026, 0.042, 0.034, 0.070, 0.20, 0.23, 0.26, 0.27, 0.13, 0.065),
)
# One greening curve with its peak at five times of the year: equal in mean, spread and shape.
_PEAK_DAYS = (65, 115, 165, 215, 265)
_PEAK_WIDTH_DAYS = 42.0
_BARE_GREEN = 0.05
_EVERGREEN = 0.75
_GROUND_PEAK_DAY, _GROUND_WIDTH_DAYS = 150, 75.0
_GROUND_WINTER = 0.67  # share of the understorey that stays through the winter


@dataclass(frozen=True)
class Nuisance:
    """Properties of a tile that are independent of its classes. Numbers, or arrays (P,) of candidates."""

    gain: float | np.ndarray
    tilt: float | np.ndarray
    soil: float | np.ndarray
    soil_tilt: float | np.ndarray
    understorey: float | np.ndarray
    vigour: float | np.ndarray
    delay_days: float | np.ndarray
    radar_db: float | np.ndarray
    slope_db: float | np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, fields: bool) -> Nuisance:
        """Draw those of one tile, uniform in the ranges of ``NUISANCE``; fields have less of an understorey."""
        ranges = NUISANCE | {"understorey": _FIELDS if fields else _FOREST}
        return cls(**{name: float(rng.uniform(low, high)) for name, (low, high) in ranges.items()})


_FOREST, _FIELDS = (0.5, 1.0), (0.25, 0.75)
NUISANCE = {
    "gain": (0.65, 1.4),
    "tilt": (-0.15, 0.15),
    "soil": (0.6, 1.4),
    "soil_tilt": (-0.3, 0.3),
    "understorey": (0.25, 1.0),
    "vigour": (0.75, 1.1),
    "delay_days": (-8, 8),
    "radar_db": (-2, 2),
    "slope_db": (-1.5, 1.5),
}


def signatures(tile: Nuisance, days: np.ndarray, nm: np.ndarray, variants: Sequence[Variant]) -> np.ndarray:
    """(P, V, T, C) reflectance of pure ``variants`` on ``days`` (T,) at ``nm`` (C,), under a tile's ground, vigour and
    season. P is 1 for a tile of numbers. Variants of equal family and season are equal."""
    soil, soil_tilt, understorey, vigour, delay = (
        np.atleast_1d(v) for v in (tile.soil, tile.soil_tilt, tile.understorey, tile.vigour, tile.delay_days)
    )
    tilted = 1 + soil_tilt[:, None].astype(nm.dtype) * np.log(nm / 800.0)
    bare = np.interp(nm, NM, _SOIL) * soil[:, None] * tilted  # (P, C)
    shifted = (days - delay[:, None]).ravel()
    grown = (understorey[:, None] * ground_season(shifted).reshape(len(delay), -1))[..., None]  # (P, T, 1)
    ground = grown * np.interp(nm, NM, _UNDERSTOREY) + (1 - grown) * bare[:, None, :]  # (P, T, C)
    leaves = np.stack([np.interp(nm, NM, leaf) for leaf in _LEAVES])[[v.family for v in variants]]
    curves = phenology(shifted).reshape(-1, len(delay), len(days))[[v.season for v in variants]]
    green = (vigour[:, None] * curves).swapaxes(0, 1)[..., None]  # (P, V, T, 1)
    return green * leaves[:, None, :] + (1 - green) * ground[:, None]


def phenology(days: np.ndarray) -> np.ndarray:
    """(7, T) greenness in 0–1 on ``days`` of the year by season: five shifted, evergreen, two seasons in a year."""
    days = np.asarray(days, float)
    shifted = _BARE_GREEN + (1 - _BARE_GREEN) * _bump(days - np.array(_PEAK_DAYS)[:, None], _PEAK_WIDTH_DAYS)
    evergreen = np.full((1, *days.shape), _EVERGREEN)
    return np.concatenate([shifted, evergreen, np.maximum(shifted[:1], shifted[3:4])])


def ground_season(days: np.ndarray) -> np.ndarray:
    """(T,) share of the understorey that is green: much in early summer, some of it always."""
    bump = _bump(np.asarray(days, float) - _GROUND_PEAK_DAY, _GROUND_WIDTH_DAYS)
    return _GROUND_WINTER + (1 - _GROUND_WINTER) * bump


def _bump(days: np.ndarray, width: float) -> np.ndarray:
    """A bell curve over the year, 1 at day 0, periodic (von Mises)."""
    kappa = (DAYS / (2 * np.pi * width)) ** 2
    return np.exp(kappa * (np.cos(2 * np.pi * days / DAYS) - 1))
