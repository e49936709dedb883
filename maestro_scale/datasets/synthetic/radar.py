"""Radar images of a scene: backscatter of structure and season, a persistent pattern, and correlated speckle.

Shapes: T dates, 2 polarisations (VV, VH), V variants, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maestro_scale.datasets.synthetic.classes import Variant
from maestro_scale.datasets.synthetic.vegetation import Nuisance, ground_season, phenology

_BACKSCATTER_DB = ((-10.0, -16.0), (-9.5, -15.2), (-9.0, -14.6), (-9.3, -14.8))  # VV, VH by family
# VV, VH gained from bare to green: volume scattering. Woody plants scatter with their branches in every season, so that
# radar does not contain the season of their leaves; conifers keep their needles.
_SEASONAL_DB = ((0.8, 3.5), (0.6, 2.5), (0.0, 0.0), (0.0, 0.0))
_STRUCTURE_DB = ((0.0, 0.0), (-0.6, 1.6))  # VV, VH by structure: open, dense (more volume, less ground)
_WET_GROUND_DB = (1.0, 0.6)  # VV, VH between dry and wet season
_RAIN_DB = (1.15, 0.3)  # by date: of the tile, and of one polarisation

LOOKS = 4.4
"""Equivalent number of looks of Sentinel-1 IW GRD in high resolution (ESA, Sentinel-1 product definition: 4.4)."""
_RESPONSE = (0.14, 0.72, 0.14)  # of the sensor and its resampling to 10 m, along either axis


def backscatter_db(tile: Nuisance, days: np.ndarray, orbit: str, variants: Sequence[Variant]) -> np.ndarray:
    """(P, V, T, 2) VV and VH in dB of pure ``variants`` under a tile's season, level and slope, without rain.

    P is 1 for a tile of numbers; ``orbit``: "asc" or "des". Variants that differ in texture alone are equal."""
    vigour, delay, level, slope = (
        np.atleast_1d(v) for v in (tile.vigour, tile.delay_days, tile.radar_db, tile.slope_db)
    )
    shifted = (days - delay[:, None]).ravel()
    curves = phenology(shifted).reshape(-1, len(delay), len(days))[[v.season for v in variants]]
    green = (vigour[:, None] * curves).swapaxes(0, 1)[..., None]  # (P, V, T, 1)
    wet = 0.5 - ground_season(shifted).reshape(len(delay), 1, len(days), 1)
    family = [v.family for v in variants]
    base = np.array(_BACKSCATTER_DB)[family] + np.array(_STRUCTURE_DB)[[v.structure for v in variants]]
    seasonal = (green - 0.3) * np.array(_SEASONAL_DB)[family][:, None]
    side = 1.0 if orbit == "asc" else -1.0
    tilted = (level + side * slope)[:, None, None, None]
    return base[:, None] + seasonal + wet * np.array(_WET_GROUND_DB) + tilted


def rain_db(rng: np.random.Generator, num_dates: int) -> np.ndarray:
    """(T, 2) dB by which a date differs from the season: moisture, common to both polarisations, and calibration."""
    common, single = _RAIN_DB
    return common * rng.standard_normal((num_dates, 1)) + single * rng.standard_normal((num_dates, 2))


def speckle(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """``shape`` (…, H, W) float32 factors of mean 1 and variance 1 / ``LOOKS``, correlated by the impulse response.

    Looks are averaged in intensity and then resampled, so that the response acts on intensities: independent numbers of
    a gamma distribution, filtered. Their number of looks is the one that the filter raises to ``LOOKS``.
    """
    *lead, height, width = shape
    near, centre, _ = (np.float32(r) for r in _RESPONSE)
    looks = LOOKS * sum(r * r for r in _RESPONSE) ** 2
    drawn = rng.standard_gamma(looks, (*lead, height + 2, width + 2), np.float32)
    rows = centre * drawn[..., 1:-1, :] + near * (drawn[..., :-2, :] + drawn[..., 2:, :])
    filtered = centre * rows[..., 1:-1] + near * (rows[..., :-2] + rows[..., 2:])
    return filtered / np.float32(looks)
