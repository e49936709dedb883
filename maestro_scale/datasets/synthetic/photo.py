"""Photographs of a scene: colours of the classes, crowns or rows whose period follows the class, light and noise.

Shapes: C bands, V variants, S parcels, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from maestro_scale.datasets.synthetic.classes import Variant
from maestro_scale.datasets.synthetic.fields import Fields, Grid

PERIOD_M = (2.6, 4.2, 6.8)  # of rows and crowns by texture
_CROWN_CONTRAST, _ROW_CONTRAST, _GRAIN_CONTRAST = 0.50, 0.22, 0.10
_GRAIN_M = (2.5, 1.25)  # gaps and branches, at scales that no class determines


def texture(
    rng: Callable[[str], np.random.Generator],
    grid: Grid,
    parcels: np.ndarray,
    variant_of_parcel: Sequence[Variant],
    rows: bool,
) -> np.ndarray:
    """(H, W) relative brightness around 1 of rows (fields) or crowns (forest) on ``parcels`` (H, W)."""
    stretch = rng("stretch").uniform(0.92, 1.08)
    grain = Fields(lambda octave: rng(f"grain{octave}"), grid.extent_m, _GRAIN_M, np.ones((1, len(_GRAIN_M))))
    light = 1 + np.float32(_GRAIN_CONTRAST) * grain.sample(grid)[0]
    period = np.array([PERIOD_M[v.texture] for v in variant_of_parcel]) * stretch
    if rows:
        light += np.float32(_ROW_CONTRAST) * _rows(rng("rows"), grid, parcels, period)
        return light
    light *= _crowns(rng, grid, parcels, variant_of_parcel, stretch)
    return light


def _rows(rng: np.random.Generator, grid: Grid, parcels: np.ndarray, period: np.ndarray) -> np.ndarray:
    """(H, W) a wave whose direction is the parcel's."""
    angle = rng.uniform(0, np.pi, len(period))
    phase = rng.uniform(0, 2 * np.pi, len(period)).astype(np.float32)
    fx, fy = ((2 * np.pi * f(angle) / period).astype(np.float32) for f in (np.cos, np.sin))
    at = grid.centres.astype(np.float32)
    wave = fx[parcels] * at
    wave += fy[parcels] * at[:, None]
    wave += phase[parcels]
    return np.sin(wave, out=wave)


def _crowns(
    rng: Callable[[str], np.random.Generator],
    grid: Grid,
    parcels: np.ndarray,
    variant_of_parcel: Sequence[Variant],
    stretch: float,
) -> np.ndarray:
    """(H, W) sunlit and shaded sides of crowns: the slope of their surface in the direction of the sun."""
    light = np.ones(parcels.shape, np.float32)
    sun = rng("sun").uniform(0.3, 1.3)  # from the south-west to the south-east, as at the hours of flights
    textures = np.array([v.texture for v in variant_of_parcel])
    for number in np.unique(textures):
        inside = np.isin(parcels, np.flatnonzero(textures == number))
        if not inside.any():
            continue
        # The splines of a lattice have their energy at wavelengths of about twice its spacing.
        spacing = PERIOD_M[number] * stretch / 2
        surface = Fields(partial(_stream, rng, f"crown{number}"), grid.extent_m, (spacing,), np.ones((1, 1)))
        height = surface.sample(grid)[0]
        down, right = np.gradient(height)
        slope = (np.cos(sun) * right + np.sin(sun) * down) * np.float32(spacing / grid.resolution_m)
        shaded = 1 + np.float32(_CROWN_CONTRAST) * np.tanh(slope)
        light[inside] = shaded[inside]
    return light


def _stream(rng: Callable[[str], np.random.Generator], purpose: str, octave: int) -> np.random.Generator:
    return rng(f"{purpose}{octave}")


def develop(
    rng: np.random.Generator, colours: np.ndarray, light: np.ndarray, nm: np.ndarray, gain: float
) -> np.ndarray:
    """(C, H, W) brightness in 0–1 as a camera gives it, of reflectance ``colours`` (C, H, W) in ``light`` (H, W)."""
    exposure = gain * rng.uniform(0.8, 1.25) * np.where(nm > 700, 1.3, 3.2)
    balance = np.exp(0.10 * rng.standard_normal(len(nm)))
    image = colours * (exposure * balance).astype(np.float32)[:, None, None]
    image += np.float32(0.05)
    image *= light
    image += np.float32(0.015) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 1, out=image)
