"""Optical satellite images of a scene: mixing of classes, ground, atmosphere, clouds, snow and sensor noise.

Shapes: T dates, C bands, V variants, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from maestro_scale.datasets.synthetic.fields import Fields, Grid, fractal, octaves
from maestro_scale.datasets.synthetic.ground import Ground, loading
from maestro_scale.datasets.synthetic.vegetation import BAND_NM, DAYS, NM, Nuisance

_SNOW = (0.90, 0.90, 0.89, 0.87, 0.86, 0.85, 0.84, 0.82, 0.70, 0.12, 0.10)
_CLOUD = (0.62, 0.62, 0.61, 0.60, 0.60, 0.60, 0.60, 0.60, 0.58, 0.45, 0.35)
# Native resolution of bands that are delivered on pixels of 10 m.
_NATIVE_M = {
    **dict.fromkeys(("B5", "B6", "B7", "B8A", "B11", "B12"), 20.0),
    **dict.fromkeys((f"L{i}" for i in range(1, 12)), 30.0),
}
_BLUR_M = 4.0  # of the optics, beyond the pixel
GAIN_SIGMA = 0.10  # of a date: view and sun
CALIBRATION_SIGMA = 0.03  # of a date and band: correction of the atmosphere
HAZE = 0.075  # largest, at 490 nm; falls with the square of the wavelength
RELATIVE_NOISE, ABSOLUTE_NOISE = 0.04, 0.0015  # of a pixel and band: misregistration of bands, detector
_CLOUD_SPACINGS = octaves(640.0, 40.0)


def image(
    ground: Ground,
    tile: Nuisance,
    rng: np.random.Generator,
    pure: np.ndarray,
    variant_shares: np.ndarray,
    parcel_shares: np.ndarray,
    days: np.ndarray,
    bands: Sequence[str],
    grid: Grid,
) -> np.ndarray:
    """(T, C, H, W) reflectance without clouds and noise of ``pure`` (V, T, C) in ``variant_shares`` (V, H, W)."""
    nm = np.array([BAND_NM[b] for b in bands], np.float32)
    gain = tile.gain * np.exp(GAIN_SIGMA * rng.standard_normal((len(days), 1)))
    gain = gain * np.exp(CALIBRATION_SIGMA * rng.standard_normal((len(days), len(bands))))
    light = (gain * (1 + tile.tilt * np.log(nm / 800.0))).astype(np.float32)
    haze = HAZE * rng.random((len(days), 1), np.float32) ** 2 * (490.0 / nm) ** 2
    values = np.empty((len(days), len(bands), grid.size, grid.size), np.float32)
    native = np.array([max(_NATIVE_M.get(b, 0.0), grid.resolution_m) for b in bands])
    for footprint in np.unique(native):
        chosen = np.flatnonzero(native == footprint)
        factors = ground.factors(days, grid, parcel_shares, footprint + _BLUR_M)
        load = loading(nm[chosen]).astype(np.float32)
        shares = _blurred(variant_shares, footprint / grid.resolution_m)
        part = np.einsum("vtc,vhw->tchw", pure[:, :, chosen] * light[:, chosen], shares)
        relative = np.einsum("cg,tghw->tchw", load, factors)
        part *= np.exp(relative, out=relative)
        values[:, chosen] = part
    values += haze[:, :, None, None]
    return values


def add_veils(
    values: np.ndarray,
    rng: np.random.Generator,
    bands: Sequence[str],
    snow: np.ndarray,
    cloud: np.ndarray,
) -> None:
    """Cover ``values`` with ``snow`` and ``cloud`` (T, H, W) in 0–1, in place."""
    nm = np.array([BAND_NM[b] for b in bands], np.float32)
    for veil, colour in ((snow, _SNOW), (cloud, _CLOUD)):
        bright = np.interp(nm, NM, colour).astype(np.float32)
        bright = bright * (1 + 0.15 * rng.standard_normal((len(values), 1), np.float32))
        for t in np.flatnonzero(veil.any(axis=(1, 2))):  # most dates have neither
            values[t] += veil[t] * (bright[t][:, None, None] - values[t])


def add_noise(values: np.ndarray, rng: np.random.Generator) -> None:
    """Add the sensor's noise to ``values`` in place, and keep them positive."""
    drawn = rng.standard_normal(values.shape, np.float32)
    drawn *= np.float32(ABSOLUTE_NOISE) + np.float32(RELATIVE_NOISE) * values
    values += drawn
    np.maximum(values, np.float32(0.0001), out=values)


def weather(
    rng: Callable[[str], np.random.Generator], days: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Snow and cloud cover (T, H, W) in 0–1: clear, broken or overcast by date, more in winter."""
    drawn = rng("weather")
    winter = 0.5 + 0.5 * np.cos(2 * np.pi * (days - 15) / DAYS)
    kind = drawn.random(len(days)) - 0.15 * winter
    level = np.select([kind < 0.28, kind < 0.42], [1.6, 0.5], 0.0).astype(np.float32)
    snowy = drawn.random(len(days)) < 0.25 * (winter > 0.85)
    snow, cloud = np.zeros((2, len(days), grid.size, grid.size), np.float32)
    covered = [(cloud, t) for t in np.flatnonzero(level)] + [(snow, t) for t in np.flatnonzero(snowy)]
    if not covered:
        return snow, cloud
    amplitude = np.repeat(fractal(_CLOUD_SPACINGS, 0.7)[None], len(covered), axis=0)
    shapes = Fields(rng("clouds"), grid.extent_m, _CLOUD_SPACINGS, amplitude)
    for (veil, t), shape in zip(covered, shapes.sample(grid), strict=True):
        veil[t] = np.clip(level[t] + shape if veil is cloud else 0.7 + 0.3 * shape, 0, 1)
    return snow, cloud


def _blurred(shares: np.ndarray, pixels: float) -> np.ndarray:
    """Shares over footprints of 1, 2 or 3 pixels."""
    if pixels <= 1:
        return shares
    side = np.float32(0.25 if pixels <= 2 else 1 / 3)
    for axis in (1, 2):
        last = shares.shape[axis] - 1
        before = shares.take(np.maximum(np.arange(last + 1) - 1, 0), axis)
        after = shares.take(np.minimum(np.arange(last + 1) + 1, last), axis)
        shares = (1 - 2 * side) * shares + side * (before + after)
    return shares
