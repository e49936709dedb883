"""The map of a scene: stands of forest with bent borders, or fields with straight ones, and the classes in them.

Shapes: S parcels (stands or fields), K classes, V variants, H×W pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from maestro_scale.datasets.synthetic.classes import Variant, variants_of
from maestro_scale.datasets.synthetic.fields import Grid, plane_wave

_COUNTED_M = 1.0  # shares of pixels are counted on pixels of about this size
_CUT = (0.35, 0.65)  # where a field is divided in two, as a share of its length
_BEND_STANDS, _BEND_FIELDS = 0.06, 0.008  # amplitude of the waves in borders, relative to their period


class _Cut(NamedTuple):
    """A line that divides fields: positions beyond ``at`` along ``axis`` (0 or 1) are in the second part."""

    axis: int
    at: float
    first: int | _Cut
    second: int | _Cut


class Landscape:
    """The parcels of a square of ``extent_m`` metres: 2–6 stands of 1–3 classes or, if ``num_fields`` is not 0, that
    many fields of a sixth as many classes. ``rng`` draws all of it."""

    def __init__(self, extent_m: float, num_classes: int, num_fields: int, rng: np.random.Generator) -> None:
        variants = variants_of(num_classes)
        self._extent_m, self._num_classes = extent_m, num_classes
        present = rng.permutation(num_classes)
        few = int(rng.choice([1, 2, 3], p=[0.60, 0.30, 0.10]))
        present = present[: -(-num_fields // 6) or few]
        count = max(len(present) + int(rng.integers(1, 4)), num_fields)
        classes = np.concatenate([present, rng.choice(present, count - len(present))])
        self.classes = rng.permutation(classes)
        """(S,) class of each parcel."""
        # All parcels of a class in a tile have one variant: a tile is one place under one management.
        share = rng.random(num_classes)
        of_class = [[v for v in variants if v.label == k] for k in range(num_classes)]
        self.variant_of_class: tuple[Variant, ...] = tuple(
            of[int(u * len(of))] for of, u in zip(of_class, share, strict=True)
        )
        period = rng.uniform(0.25, 0.8, 4) * extent_m
        angle = rng.uniform(0, 2 * np.pi, 4)
        bend = period * (_BEND_FIELDS if num_fields else _BEND_STANDS)
        self._waves = np.stack(
            [np.cos(angle) / period, np.sin(angle) / period, rng.uniform(0, 1, 4), bend], axis=1
        )
        self._sites = rng.uniform(0, extent_m, (count, 2))
        self._direction = rng.uniform(0, np.pi)
        half = 0.75 * extent_m  # fields are laid out in a turned square that covers the scene
        self._cuts = _divide(rng, count, (-half, -half), (half, half)) if num_fields else None
        self._known: dict[Grid, np.ndarray] = {}

    def parcels(self, grid: Grid) -> np.ndarray:
        """(H, W) uint8 number of the parcel at each pixel's centre."""
        if grid not in self._known:
            x, y = self._bent(grid)
            self._known[grid] = self._stands(x, y) if self._cuts is None else self._fields(x, y)
        return self._known[grid]

    def cover(self, grid: Grid) -> np.ndarray:
        """(H, W) uint8 class at each pixel's centre."""
        return self.classes.astype(np.uint8)[self.parcels(grid)]

    def parcel_shares(self, grid: Grid) -> np.ndarray:
        """(S, H, W) float32 share of every parcel in each pixel; sums to one over S."""
        fine = max(1, math.ceil(grid.resolution_m / _COUNTED_M))
        size, count = grid.size, len(self.classes)
        parcels = self.parcels(Grid(grid.extent_m, grid.resolution_m / fine, grid.margin_m)).astype(np.int64)
        pixel = np.repeat(np.arange(size), fine)
        numbers = (pixel[:, None] * size + pixel) + parcels * (size * size)
        counted = np.bincount(numbers.ravel(), minlength=count * size * size)
        return (counted.astype(np.float32) / np.float32(fine * fine)).reshape(count, size, size)

    def class_shares(self, parcel_shares: np.ndarray) -> np.ndarray:
        """(K, H, W) shares of the classes from those of the parcels."""
        shares = np.zeros((self._num_classes, *parcel_shares.shape[1:]), np.float32)
        np.add.at(shares, self.classes, parcel_shares)
        return shares

    def _bent(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) x and y of the pixels, bent in turn by waves that depend on the position alone, so that borders are
        the same at every resolution."""
        at = grid.centres
        x = np.broadcast_to(at, (len(at), len(at))).astype(np.float32)
        y = np.broadcast_to(at[:, None], (len(at), len(at))).astype(np.float32)
        for i, (fx, fy, phase, amplitude) in enumerate(self._waves):
            wave = plane_wave(at, at, fx, fy, phase) * np.float32(amplitude)
            x, y = (x + wave, y) if i % 2 else (x, y + wave)
        return x, y

    def _stands(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The number of the nearest site."""
        nearest = np.full(x.shape, np.inf, np.float32)
        found = np.zeros(x.shape, np.uint8)
        for number, (sx, sy) in enumerate(self._sites):
            distance = (x - np.float32(sx)) ** 2 + (y - np.float32(sy)) ** 2
            found[distance < nearest] = number
            np.minimum(nearest, distance, out=nearest)
        return found

    def _fields(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The number of the part that the cuts leave around each position."""
        middle = np.float32(self._extent_m / 2)
        cos, sin = np.float32(math.cos(self._direction)), np.float32(math.sin(self._direction))
        turned = (
            (cos * (x - middle) + sin * (y - middle)).ravel(),
            (cos * (y - middle) - sin * (x - middle)).ravel(),
        )
        found = np.zeros(x.size, np.uint8)
        _number(self._cuts, turned, np.arange(x.size), found)
        return found.reshape(x.shape)


def _divide(
    rng: np.random.Generator, count: int, low: tuple[float, float], high: tuple[float, float], first: int = 0
) -> int | _Cut:
    """Divide a rectangle across its longer side until ``count`` parts are numbered from ``first``."""
    if count == 1:
        return first
    sides = (high[0] - low[0], high[1] - low[1])
    axis = int(sides[1] > sides[0] * rng.uniform(0.6, 1.6))
    at = low[axis] + sides[axis] * rng.uniform(*_CUT)
    share = (at - low[axis]) / sides[axis]
    in_first = min(max(round(count * share), 1), count - 1)
    upper = (at, high[1]) if axis == 0 else (high[0], at)
    lower = (at, low[1]) if axis == 0 else (low[0], at)
    return _Cut(
        axis,
        at,
        _divide(rng, in_first, low, upper, first),
        _divide(rng, count - in_first, lower, high, first + in_first),
    )


def _number(
    cut: int | _Cut | None, position: tuple[np.ndarray, np.ndarray], pixels: np.ndarray, found: np.ndarray
) -> None:
    """Write the number of its part to each of ``pixels`` of ``found``."""
    if isinstance(cut, _Cut):
        beyond = position[cut.axis][pixels] > cut.at
        _number(cut.first, position, pixels[~beyond], found)
        _number(cut.second, position, pixels[beyond], found)
    elif cut is not None:
        found[pixels] = cut
