"""Synthetic scenes: a land cover map, imaged by any optical or radar sensor on any date.

A :class:`Scene` is a pure function of (seed, index). It is defined in metres on the ground and nanometres of the
spectrum and then sampled, so that sensors of different resolution and bands are consistent.

The signal to learn, and the nuisances that hide it:

- A class is a *family* (spectrum and mean backscatter) and a *phenology* (time of greening): class k has family
  k // 5 and phenology k % 5. Phenologies are one curve shifted in time, so that no statistic without the dates
  separates the classes of a family. Two pairs of the five phenologies look alike in an aerial image of June, texture
  included: only the time series separates them.
- Texture at sub-metre scale: the period of rows or crowns depends on the class, their orientation on the tile.
- Every tile has its own illumination, soil, vigour and season (nuisances common to its classes), every date its own
  atmosphere or moisture: means over dates carry little information, the time course carries much.

Shapes: T dates, C bands or polarisations, K classes, H×W pixels (row 0 is north). All values float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

NUM_PHENOLOGIES = 5
DAYS = 365.25
BAND_NM = {
    "B": 490, "G": 560, "R": 660, "NIR": 835,
    "B2": 490, "B3": 560, "B4": 665, "B5": 705, "B6": 740, "B7": 783, "B8": 842, "B8A": 865,
    "B11": 1610, "B12": 2190,
    "L1": 443, "L2": 482, "L3": 561, "L4": 655, "L5": 865, "L6": 1609, "L7": 2201, "L8": 590, "L9": 1373,
    "L10": 10895, "L11": 12005,
}  # fmt: skip

_NM = (450, 490, 560, 665, 705, 740, 783, 842, 1000, 1610, 2190)
_SOIL = (0.06, 0.07, 0.10, 0.14, 0.15, 0.16, 0.17, 0.19, 0.22, 0.30, 0.25)
# Full vegetation by family. They differ in shape (red edge, SWIR), little in brightness.
_LEAVES = (
    (0.02, 0.025, 0.060, 0.025, 0.090, 0.28, 0.38, 0.42, 0.43, 0.19, 0.08),
    (0.02, 0.025, 0.045, 0.030, 0.065, 0.20, 0.31, 0.38, 0.42, 0.14, 0.06),
    (0.03, 0.040, 0.085, 0.045, 0.130, 0.27, 0.32, 0.36, 0.38, 0.24, 0.13),
    (0.03, 0.035, 0.070, 0.060, 0.110, 0.23, 0.29, 0.33, 0.36, 0.27, 0.17),
)
_SNOW = (0.90, 0.90, 0.89, 0.87, 0.86, 0.85, 0.84, 0.82, 0.70, 0.12, 0.10)
_CLOUD = (0.62, 0.62, 0.61, 0.60, 0.60, 0.60, 0.60, 0.60, 0.58, 0.45, 0.35)
# One greening curve with its peak at five times of the year: equal in mean, spread and shape.
_PEAK_DAYS = (65, 115, 165, 215, 265)
_PEAK_WIDTH_DAYS = 36.0
_BARE_GREEN = 0.10
_TEXTURE = (0, 1, 2, 1, 0)  # by phenology: pairs that look alike in June share one
_PERIOD_M = (2.2, 4.0, 7.0)
_BACKSCATTER_DB = ((-8.5, -14.5), (-9.5, -14.0), (-9.0, -16.5), (-10.5, -16.5))  # VV, VH by family
_SEASONAL_DB = (0.8, 4.0)  # VV, VH gained from bare to green: volume scattering
_LOOKS = 5.0


@dataclass(frozen=True)
class Scene:
    """A square of ``extent_m`` metres with 1–3 dominant classes out of ``num_classes`` (at most 20).

    ``num_parcels``: for large scenes, this many parcels, of a third as many classes, instead.
    Every method is deterministic and independent of earlier calls. Raises ValueError for more classes than there are
    signatures.
    """

    seed: int
    index: int
    extent_m: float
    num_classes: int
    num_parcels: int = 0

    def __post_init__(self) -> None:
        most = len(_LEAVES) * NUM_PHENOLOGIES
        if not 1 <= self.num_classes <= most:
            raise ValueError(
                f"num_classes is {self.num_classes}; scenes have signatures for 1 to {most} classes"
            )

    def rng(self, purpose: str) -> np.random.Generator:
        """The random stream of this scene for one purpose; purposes do not affect each other (first 8 bytes count)."""
        counter = int.from_bytes(purpose.encode()[:8].ljust(8), "little")
        key = np.array([self.seed, self.index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)))

    # ---- the map

    @cached_property
    def _tile(self) -> Nuisance:
        return Nuisance.draw(self.rng("nuisance"))

    @cached_property
    def _regions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sites (S, 2) in metres, their classes (S,), and waves (4, 4) that bend the borders."""
        rng = self.rng("regions")
        mixed = rng.permutation(self.num_classes)
        few = rng.choice([1, 2, 3], p=[0.60, 0.30, 0.10])
        present = mixed[: -(-self.num_parcels // 3) or few]
        num_sites = max(len(present) + int(rng.integers(1, 4)), self.num_parcels)
        sites = rng.uniform(0, self.extent_m, (num_sites, 2))
        classes = np.concatenate([present, rng.choice(present, num_sites - len(present))])
        period = rng.uniform(0.25, 0.8, 4) * self.extent_m
        angle = rng.uniform(0, 2 * np.pi, 4)
        waves = np.stack(
            [np.cos(angle) / period, np.sin(angle) / period, rng.uniform(0, 1, 4), period * 0.06]
        )
        return sites, classes, waves.T

    def cover(self, resolution_m: float, margin_m: float = 0.0) -> np.ndarray:
        """(H, W) uint8 class at each pixel's centre; ``margin_m`` widens the view on every side."""
        row, col = self._grid(resolution_m, margin_m)
        sites, classes, waves = self._regions
        x, y = np.broadcast_to(col, (len(row), len(row))), np.broadcast_to(row[:, None], (len(row), len(row)))
        x, y = x.astype(np.float32), y.astype(np.float32)
        for i, (fx, fy, phase, amplitude) in enumerate(waves):
            # x and y are bent in turn, as a function of position, so that borders are the same at every resolution.
            wave = _plane_wave(row, col, fx, fy, phase) * np.float32(amplitude)
            x, y = (x + wave, y) if i % 2 else (x, y + wave)
        nearest = np.full(x.shape, np.inf, np.float32)
        cover = np.zeros(x.shape, np.uint8)
        for (sx, sy), k in zip(sites, classes, strict=True):
            distance = (x - np.float32(sx)) ** 2 + (y - np.float32(sy)) ** 2
            cover[distance < nearest] = k
            np.minimum(nearest, distance, out=nearest)
        return cover

    def fractions(self, resolution_m: float) -> np.ndarray:
        """(K, H, W) share of every class in each pixel; sums to one over K."""
        if resolution_m not in self._known_fractions:
            self._known_fractions[resolution_m] = self._fractions(resolution_m)
        return self._known_fractions[resolution_m]

    @cached_property
    def _known_fractions(self) -> dict[float, np.ndarray]:
        return {}

    def _fractions(self, resolution_m: float) -> np.ndarray:
        fine = max(1, math.ceil(resolution_m))  # about one metre
        pixels = round(self.extent_m / resolution_m)
        cover = self.cover(resolution_m / fine).reshape(pixels, fine, pixels, fine)
        one_hot = cover == np.arange(self.num_classes, dtype=np.uint8)[:, None, None, None, None]
        return one_hot.mean(axis=(2, 4), dtype=np.float32)

    def shares(self) -> np.ndarray:
        """(K,) area share of every class; sums to one."""
        return self.fractions(self.extent_m / 60).mean(axis=(1, 2))

    # ---- optical sensors

    def optical(
        self, days: np.ndarray, bands: Sequence[str], resolution_m: float, snow: np.ndarray, cloud: np.ndarray
    ) -> np.ndarray:
        """(T, C, H, W) reflectance on ``days`` (T,), under ``snow`` and ``cloud`` (T, H, W) in 0–1."""
        tile, rng = self._tile, self.rng("optical")
        nm = np.array([BAND_NM[b] for b in bands], np.float32)
        # (K, T, C) by class, then mixed into pixels.
        pure = self._spectra(days, nm)
        fractions = self.fractions(resolution_m)
        present = fractions.any(axis=(1, 2)).nonzero()[0]
        ground = np.einsum("ktc,khw->tchw", pure[present], fractions[present])
        relief = 1 + 0.06 * rng.standard_normal(ground.shape[2:], np.float32)
        gain = tile.gain * (1 + 0.15 * rng.standard_normal((len(days), 1), np.float32))
        tilt = 1 + tile.tilt * np.log(nm / 800.0)
        ground *= (gain * tilt)[:, :, None, None] * relief
        haze = 0.08 * rng.random((len(days), 1), np.float32) ** 2 * (490.0 / nm) ** 2
        ground += haze[:, :, None, None]
        for veil, colour in ((snow, _SNOW), (cloud, _CLOUD)):
            bright = np.interp(nm, _NM, colour).astype(np.float32)[None, :, None, None]
            bright = bright * (1 + 0.15 * rng.standard_normal((len(days), 1, 1, 1), np.float32))
            ground += veil[:, None] * (bright - ground)
        ground *= 1 + 0.02 * rng.standard_normal(ground.shape, np.float32)
        ground += 0.003 * rng.standard_normal(ground.shape, np.float32)
        return np.maximum(ground, 0.0001)

    def weather(self, days: np.ndarray, resolution_m: float) -> tuple[np.ndarray, np.ndarray]:
        """Snow and cloud cover (T, H, W) in 0–1: clear, broken or overcast by date, more in winter."""
        rng = self.rng("weather")
        pixels = round(self.extent_m / resolution_m)
        winter = 0.5 + 0.5 * np.cos(2 * np.pi * (days - 15) / DAYS)
        kind = rng.random(len(days)) - 0.15 * winter
        level = np.select([kind < 0.28, kind < 0.42], [1.0, 0.5], 0.0).astype(np.float32)
        slope = rng.uniform(-0.8, 0.8, (2, len(days), 1, 1)).astype(np.float32)
        x = np.linspace(-0.5, 0.5, pixels, dtype=np.float32)
        cloud = level[:, None, None] * (1 + slope[0] * x + slope[1] * x[:, None]) * 1.2
        snowy = (rng.random(len(days)) < 0.25 * (winter > 0.85)).astype(np.float32)
        snow = snowy[:, None, None] * rng.uniform(0.4, 1.0, (len(days), pixels, pixels)).astype(np.float32)
        return snow, np.clip(cloud, 0, 1)

    def photo(self, day: int, bands: Sequence[str], resolution_m: float, margin_m: float = 0.0) -> np.ndarray:
        """(C, H, W) brightness in 0–1 as a camera gives it: cover, texture, light, balance and noise."""
        tile, rng = self._tile, self.rng("photo")
        nm = np.array([BAND_NM[b] for b in bands], np.float32)
        pure = self._spectra(np.array([day]), nm)[:, 0]
        cover = self.cover(resolution_m, margin_m)
        light = self._texture(cover, resolution_m, margin_m, rng)
        row, col = self._grid(resolution_m, margin_m)
        fx, fy = rng.uniform(-0.6, 0.6, 2) / self.extent_m
        light *= 1 + 0.15 * _plane_wave(row, col, fx, fy, rng.uniform())
        exposure = tile.gain * rng.uniform(0.8, 1.25) * np.where(nm > 700, 1.3, 3.2)
        balance = np.exp(0.10 * rng.standard_normal(len(bands)))
        colours = (pure * exposure * balance + 0.05).astype(np.float32)
        image = colours.T[:, cover] * light
        image += 0.02 * rng.standard_normal(image.shape, np.float32)
        return np.clip(image, 0, 1)

    def _texture(
        self, cover: np.ndarray, resolution_m: float, margin_m: float, rng: np.random.Generator
    ) -> np.ndarray:
        """(H, W) relative brightness around 1: rows or crowns whose period follows the class."""
        light = np.ones(cover.shape, np.float32)
        row, col = self._grid(resolution_m, margin_m)
        angles, phases = rng.uniform(0, np.pi, self.num_classes), rng.uniform(0, 1, (self.num_classes, 2))
        stretch = rng.uniform(0.9, 1.1)
        for k in np.flatnonzero(np.bincount(cover.ravel(), minlength=1)):
            frequency = 1 / (_PERIOD_M[_TEXTURE[k % NUM_PHENOLOGIES]] * stretch)
            fx, fy = frequency * math.cos(angles[k]), frequency * math.sin(angles[k])
            pattern = _plane_wave(row, col, fx, fy, phases[k, 0])
            if (k // NUM_PHENOLOGIES) % 2:  # crowns: a second wave across the first
                pattern = 0.7 * (pattern + _plane_wave(row, col, -fy, fx, phases[k, 1]))
            inside = cover == k
            light[inside] += 0.30 * pattern[inside]
        return light

    def _spectra(self, days: np.ndarray, nm: np.ndarray) -> np.ndarray:
        """(K, T, C) reflectance of pure classes under this tile's soil, vigour and season."""
        return signatures(self._tile, days, nm, self.num_classes)[0].astype(np.float32)

    # ---- radar

    def radar(self, days: np.ndarray, orbit: str, resolution_m: float) -> np.ndarray:
        """(T, 2, H, W) VV and VH backscatter in linear power with speckle; ``orbit``: "asc" or "des"."""
        tile, rng = self._tile, self.rng(f"s1-{orbit}")
        k = np.arange(self.num_classes)
        green = tile.vigour * phenology(days - tile.delay_days)[k % NUM_PHENOLOGIES]
        base = np.array(_BACKSCATTER_DB)[k // NUM_PHENOLOGIES][:, None, :]
        pure = base + (green[:, :, None] - 0.3) * np.array(_SEASONAL_DB)
        side = 1.0 if orbit == "asc" else -1.0
        rain = 1.0 * rng.standard_normal((len(days), 1))
        offset = tile.radar_db + side * tile.slope_db + rain + 0.2 * rng.standard_normal((len(days), 2))
        fractions = self.fractions(resolution_m)
        present = fractions.any(axis=(1, 2)).nonzero()[0]
        power = (10 ** ((pure[present] + offset) / 10)).astype(np.float32)
        ground = np.einsum("ktc,khw->tchw", power, fractions[present])
        return ground * rng.standard_gamma(_LOOKS, ground.shape, np.float32) / np.float32(_LOOKS)

    def _grid(self, resolution_m: float, margin_m: float) -> tuple[np.ndarray, np.ndarray]:
        pixels = round((self.extent_m + 2 * margin_m) / resolution_m)
        centres = (np.arange(pixels) + 0.5) * resolution_m - margin_m
        return centres, centres


@dataclass(frozen=True)
class Nuisance:
    """Properties of a tile that are independent of its classes. Numbers, or arrays (P,) of candidates."""

    gain: float | np.ndarray
    tilt: float | np.ndarray
    soil: float | np.ndarray
    soil_tilt: float | np.ndarray
    vigour: float | np.ndarray
    delay_days: float | np.ndarray
    radar_db: float | np.ndarray
    slope_db: float | np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Nuisance:
        """Draw those of one tile, uniform in the ranges of ``NUISANCE``."""
        return cls(**{name: float(rng.uniform(low, high)) for name, (low, high) in NUISANCE.items()})


NUISANCE = {
    "gain": (0.65, 1.4),
    "tilt": (-0.15, 0.15),
    "soil": (0.6, 1.4),
    "soil_tilt": (-0.3, 0.3),
    "vigour": (0.75, 1.1),
    "delay_days": (-8, 8),
    "radar_db": (-2, 2),
    "slope_db": (-1.5, 1.5),
}


def signatures(tile: Nuisance, days: np.ndarray, nm: np.ndarray, num_classes: int) -> np.ndarray:
    """(P, K, T, C) reflectance of pure classes on ``days`` (T,) at ``nm`` (C,), under a tile's soil, vigour and season.

    P is 1 for a tile of numbers.
    """
    soil, soil_tilt, vigour, delay = (
        np.atleast_1d(v) for v in (tile.soil, tile.soil_tilt, tile.vigour, tile.delay_days)
    )
    tilted = 1 + soil_tilt[:, None].astype(nm.dtype) * np.log(nm / 800.0)
    ground = np.interp(nm, _NM, _SOIL) * soil[:, None] * tilted
    leaves = np.stack([np.interp(nm, _NM, leaf) for leaf in _LEAVES])
    k = np.arange(num_classes)
    days = (days - delay[:, None]).ravel()
    curves = phenology(days).reshape(NUM_PHENOLOGIES, len(delay), -1)
    green = (vigour[:, None] * curves)[k % NUM_PHENOLOGIES].swapaxes(0, 1)[..., None]
    leaf = leaves[k // NUM_PHENOLOGIES][:, None, :]
    return green * leaf + (1 - green) * ground[:, None, None, :]


def phenology(days: np.ndarray) -> np.ndarray:
    """(5, T) greenness in 0–1 on ``days`` of the year: one periodic curve, shifted."""
    kappa = (DAYS / (2 * np.pi * _PEAK_WIDTH_DAYS)) ** 2
    shifted = 2 * np.pi * (np.asarray(days, float) - np.array(_PEAK_DAYS)[:, None]) / DAYS
    return _BARE_GREEN + (1 - _BARE_GREEN) * np.exp(kappa * (np.cos(shifted) - 1))


def _plane_wave(row: np.ndarray, col: np.ndarray, fx: float, fy: float, phase: float) -> np.ndarray:
    """(H, W) float32 sin(2π(fx·x + fy·y + phase)), as products of short vectors by the addition theorem."""
    along_x = 2 * np.pi * (fx * col + phase)
    along_y = (2 * np.pi * fy * row)[:, None]
    sin_x, cos_x = np.sin(along_x).astype(np.float32), np.cos(along_x).astype(np.float32)
    sin_y, cos_y = np.sin(along_y).astype(np.float32), np.cos(along_y).astype(np.float32)
    return sin_x * cos_y + cos_x * sin_y
