"""Photographs of a scene: colours of the classes, crowns or rows whose period follows the class, light and noise.

Shapes: C bands, V variants, S parcels, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from maestro_scale.datasets.synthetic.classes import Variant
from maestro_scale.datasets.synthetic.fields import MARGIN_M, Fields, Grid

PERIOD_M = (2.4, 3.8, 6.4)  # of rows and crowns by texture
_ROW_CONTRAST, _GRAIN_CONTRAST = 0.22, 0.13
# Of crowns: brightness between them and of their tops, of the side to the sun; size and place in shares of the period.
_GAP, _BRIGHT, _SHADE = 0.44, (1.05, 1.4), 0.28
_RADIUS, _MOVED = (0.5, 0.75), 0.33
_HEDGE = 0.55  # brightness of the borders of fields
_CAMERA_NOISE = 0.015
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
    grain = Fields(rng("grain"), grid.extent_m, _GRAIN_M, np.ones((1, len(_GRAIN_M))))
    light = 1 + np.float32(_GRAIN_CONTRAST) * grain.sample(grid)[0]
    period = np.array([PERIOD_M[v.texture] for v in variant_of_parcel]) * stretch
    if rows:
        light += np.float32(_ROW_CONTRAST) * _rows(rng("rows"), grid, parcels, period)
        light[_borders(parcels)] *= np.float32(_HEDGE)
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


def _borders(parcels: np.ndarray) -> np.ndarray:
    """(H, W) whether a pixel is beside another parcel: hedges and tracks."""
    beside = np.zeros(parcels.shape, bool)
    across, down = parcels[:, 1:] != parcels[:, :-1], parcels[1:] != parcels[:-1]
    for part, differs in (
        (beside[:, 1:], across),
        (beside[:, :-1], across),
        (beside[1:], down),
        (beside[:-1], down),
    ):
        part |= differs
    return beside


def _crowns(
    rng: Callable[[str], np.random.Generator],
    grid: Grid,
    parcels: np.ndarray,
    variant_of_parcel: Sequence[Variant],
    stretch: float,
) -> np.ndarray:
    """(H, W) crowns with a sunlit and a shaded side, and darkness between them."""
    light = np.ones(parcels.shape, np.float32)
    sun = (
        rng("sun").uniform(0.25, 0.75) * np.pi
    )  # azimuth, between south-east and south-west, as at the hours of flights
    textures = np.array([v.texture for v in variant_of_parcel])
    present = np.unique(textures[np.unique(parcels)])
    for number in present:
        spacing = PERIOD_M[number] * stretch
        crowns = _domes(rng(f"crown{number}"), grid, spacing, np.cos(sun), np.sin(sun))
        if len(present) == 1:
            return crowns
        inside = np.isin(parcels, np.flatnonzero(textures == number))
        light[inside] = crowns[inside]
    return light


def _domes(rng: np.random.Generator, grid: Grid, spacing: float, east: float, south: float) -> np.ndarray:
    """(H, W) brightness of round crowns, one in each square of ``spacing``, lit from a direction.

    A crown's centre is in the middle of its square, moved by at most a third of it, and no crown reaches farther than
    the next square: a pixel can be in the crowns of the four nearest squares alone.
    """
    count = int(np.ceil((grid.extent_m + 2 * MARGIN_M) / spacing)) + 2
    east_by, south_by = rng.uniform(-_MOVED, _MOVED, (2, count, count))
    curved = rng.uniform(*_RADIUS, (count, count)) ** -2.0
    bright = rng.uniform(*_BRIGHT, (count, count))
    table = np.stack([east_by, south_by, curved, bright]).reshape(4, -1).astype(np.float32)
    # A crown of more than ten pixels is drawn at every other pixel, and interpolated between them.
    step = 2 if spacing > 10 * grid.resolution_m else 1
    centres = (
        np.append(grid.centres, grid.centres[-1] + grid.resolution_m)[::step] if step > 1 else grid.centres
    )
    at = (centres + MARGIN_M) / spacing + 0.5  # middles of squares are whole numbers
    square = np.floor(at).astype(int)
    within = (at - square).astype(np.float32)
    highest = np.zeros((len(at), len(at)), np.float32)
    light = np.full(highest.shape, np.float32(_GAP))
    gap, south_shade, east_shade = (np.float32(f) for f in (_GAP, _SHADE * south, _SHADE * east))
    for down in (0, 1):
        for right in (0, 1):
            cell = (square[:, None] + down) * count + (square + right)
            x, y, curve, lit = table.take(cell, axis=1)
            np.subtract(within - right, x, out=x)
            np.subtract((within - down)[:, None], y, out=y)
            height = 1 - curve * (x * x + y * y)
            lit *= gap + (1 - gap) * height
            lit += east_shade * x
            lit += south_shade * y
            np.copyto(light, lit, where=height > highest)
            np.maximum(highest, height, out=highest)
    return light if step == 1 else _doubled(_doubled(light, grid.size).T, grid.size).T


def _doubled(values: np.ndarray, size: int) -> np.ndarray:
    """(size, W) rows of ``values`` and, between them, the means of their neighbours."""
    doubled = np.empty((size, values.shape[1]), np.float32)
    doubled[::2] = values[: (size + 1) // 2]
    doubled[1::2] = values[: size // 2]
    doubled[1::2] += values[1 : size // 2 + 1]
    doubled[1::2] *= np.float32(0.5)
    return doubled


def develop(
    rng: np.random.Generator,
    colours: Sequence[np.ndarray],
    light: np.ndarray,
    nm: np.ndarray,
    gain: float,
) -> np.ndarray:
    """(C, H, W) brightness in 0–1 as a camera gives it, of reflectance ``colours`` (C, H, W) in ``light`` (H, W)."""
    exposure = gain * rng.uniform(0.8, 1.25) * np.where(nm > 700, 1.3, 3.2)
    balance = (exposure * np.exp(0.10 * rng.standard_normal(len(nm)))).astype(np.float32)
    image = rng.standard_normal((len(nm), *light.shape), np.float32)
    image *= np.float32(_CAMERA_NOISE)
    for band, colour, factor in zip(image, colours, balance, strict=True):
        exposed = colour * factor
        exposed += np.float32(0.05)
        exposed *= light
        band += exposed
    return np.clip(image, 0, 1, out=image)
