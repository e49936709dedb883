"""How far pixels of synthetic scenes are from the signatures of their classes, measured on scenes of a seed of its own.

The signatures (:mod:`maestro_scale.datasets.synthetic`) are exact for a pure class in a known tile. Pixels differ from
them by light, haze, patterns of the ground, speckle, mixing and sensor noise. The mean and covariance of these
differences are measured here, so that the oracle follows the generator without a second description of it.

Shapes: C bands or polarisations, F texture features, n measured differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

from maestro_scale.datasets.synthetic.radar import backscatter_db
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.datasets.synthetic.vegetation import BAND_NM, signatures

_SEED = 2**40 + 7  # no seed of a dataset that anyone would choose
_NUM_SCENES, _NUM_PHOTOS = 96, 32
_PHOTO_CELLS = 6  # per side: photographs are expensive
_DAYS = np.arange(10, 366, 45)  # so far apart that the changing patterns of two dates are independent
_PHOTO_DAY = 180
_PURE = 0.95
_TEXTURE_M = (0.45, 0.75, 1.2, 1.9, 3.0)  # radii of the filters, around those of crowns and rows
_FLOOR = 1e-4  # of brightness and power, before the logarithm


@dataclass(frozen=True)
class SceneKind:
    """What a dataset's scenes have in common: number of classes, extent in metres, and whether they are fields."""

    num_classes: int
    extent_m: float
    fields: bool

    def scene(self, index: int) -> Scene:
        """A scene of this kind that no dataset contains."""
        return Scene(_SEED, index, self.extent_m, self.num_classes, 4 if self.fields else 0)


@dataclass(frozen=True)
class Differences:
    """Of logarithms from signatures. ``single`` (C, C): covariance within a date; ``common`` (C, C): that
    between dates, of what stays. ``between``: of what is common to both orbits of a radar."""

    mean: np.ndarray
    single: np.ndarray
    common: np.ndarray
    between: np.ndarray

    def covariance(self, dates_of_orbits: Sequence[int]) -> np.ndarray:
        """(T·C, T·C) of a pixel on all dates of all orbits, the bands of a date beside each other."""
        orbit = np.repeat(np.arange(len(dates_of_orbits)), dates_of_orbits)
        same = (orbit[:, None] == orbit)[:, None, :, None]
        full = np.where(same, self.common[None, :, None, :], self.between[None, :, None, :])
        count, bands = len(orbit), len(self.mean)
        full = full.reshape(count * bands, count * bands)
        return full + np.kron(np.eye(count), self.single - self.common)


@dataclass(frozen=True)
class Texture:
    """Features of cells by texture: ``mean`` (textures, F), ``covariance`` (textures, F, F)."""

    mean: np.ndarray
    covariance: np.ndarray


@lru_cache(maxsize=8)
def optical_differences(kind: SceneKind, bands: tuple[str, ...], resolution_m: float) -> Differences:
    """Of log reflectance on clear dates."""
    nm = np.array([BAND_NM[b] for b in bands], float)
    series = []
    for index in range(_NUM_SCENES):
        scene = kind.scene(index)
        clear = np.zeros((len(_DAYS), *2 * [round(kind.extent_m / resolution_m)]), np.float32)
        values = np.log(scene.optical(_DAYS, bands, resolution_m, clear, clear))
        pure = np.log(signatures(scene.tile, _DAYS, nm, scene.variants)[0])
        series.append(_of_pure(values, pure, scene.fractions(resolution_m)))
    return _moments([series])


@lru_cache(maxsize=8)
def radar_differences(kind: SceneKind, resolution_m: float) -> Differences:
    """Of dB in VV and VH, of both orbits."""
    orbits: list[list[np.ndarray]] = [[], []]
    for index in range(_NUM_SCENES):
        scene = kind.scene(index)
        for series, orbit in zip(orbits, ("asc", "des"), strict=True):
            values = decibels(scene.radar(_DAYS, orbit, resolution_m))
            pure = backscatter_db(scene.tile, _DAYS, orbit, scene.variants)[0]
            series.append(_of_pure(values, pure, scene.fractions(resolution_m)))
    return _moments(orbits)


@lru_cache(maxsize=8)
def photo_differences(
    kind: SceneKind, bands: tuple[str, ...], resolution_m: float, cell: int
) -> tuple[Differences, Texture]:
    """Of the log brightness of cells of ``cell`` pixels from the log reflectance, and their texture."""
    nm = np.array([BAND_NM[b] for b in bands], float)
    colours: list[np.ndarray] = []
    textures: dict[int, list[np.ndarray]] = {}
    kind = replace(kind, extent_m=_PHOTO_CELLS * cell * resolution_m)
    for index in range(_NUM_PHOTOS):
        scene = kind.scene(index)
        colour, features = photo_features(scene.photo(_PHOTO_DAY, bands, resolution_m), resolution_m, cell)
        pure = np.log(signatures(scene.tile, np.array([_PHOTO_DAY]), nm, scene.variants)[0])
        shares = scene.fractions(resolution_m * cell)
        colours.append(_of_pure(colour[None], pure, shares))
        for k, variant in enumerate(scene.variants):
            textures.setdefault(variant.texture, []).append(features[:, shares[k] > _PURE])
    found = [np.concatenate(textures[t], axis=1) for t in sorted(textures)]
    covariance = np.stack([np.cov(f) + 1e-3 * np.eye(len(f)) for f in found])
    return _moments([colours]), Texture(np.stack([f.mean(axis=1) for f in found]), covariance)


def decibels(power: np.ndarray) -> np.ndarray:
    """dB of linear power."""
    return 10 * np.log10(np.maximum(power, _FLOOR))


def photo_features(image: np.ndarray, resolution_m: float, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """(C, h, w) mean log brightness and (F, h, w) log energies of texture, in cells of ``cell`` pixels of an image.

    The energies are of differences of Gaussian blurs of the brightness, at radii that the pixels resolve.
    """
    logs = np.log(np.maximum(image, 0.01))
    grey = logs.mean(axis=0)
    radii = [0.0, *(r / resolution_m for r in _TEXTURE_M if r / resolution_m >= 0.7)]
    blurred = [gaussian_filter(grey, r, mode="nearest") for r in radii]
    energies = np.stack([(a - b) ** 2 for a, b in itertools.pairwise(blurred)])
    return _cells(logs, cell), np.log(_cells(energies, cell) + 1e-5)


def _cells(values: np.ndarray, cell: int) -> np.ndarray:
    """Means of (C, H, W) over squares of ``cell`` pixels; pixels beyond the last full square are left out."""
    count = values.shape[-1] // cell
    values = values[:, : count * cell, : count * cell]
    return values.reshape(len(values), count, cell, count, cell).mean(axis=(2, 4))


def _of_pure(values: np.ndarray, pure: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(T, C, n) differences of values (T, C, H, W) from signatures (K, T, C), where one class has the pixel."""
    return np.concatenate(
        [values[:, :, shares[k] > _PURE] - pure[k][:, :, None] for k in range(len(pure))], axis=2
    )


def _moments(orbits: list[list[np.ndarray]]) -> Differences:
    """Over all scenes of (T, C, n) differences of one or two orbits."""
    joined = [np.concatenate(series, axis=2).astype(float) for series in orbits]
    num_dates, bands, count = joined[0].shape
    mean = np.mean([d.mean(axis=(0, 2)) for d in joined], axis=0)
    centred = [d - mean[None, :, None] for d in joined]
    single = np.mean([np.einsum("tan,tbn->ab", d, d) for d in centred], axis=0) / (num_dates * count)
    sums = [d.sum(axis=0) for d in centred]
    pairs = max(num_dates * (num_dates - 1), 1) * count
    common = np.mean([s @ s.T for s in sums], axis=0) - single * num_dates * count
    common = common / pairs if num_dates > 1 else np.zeros((bands, bands))
    between = common
    if len(orbits) > 1:
        between = sums[0] @ sums[1].T / (num_dates**2 * count)
        between = (between + between.T) / 2
    return Differences(mean, single, _positive(common), between)


def _positive(matrix: np.ndarray) -> np.ndarray:
    """The nearest covariance: estimates can have slightly negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0)) @ vectors.T
