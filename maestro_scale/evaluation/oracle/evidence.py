"""Likelihood of every variant of the classes in each cell of 10 m, from what one sensor measured.

A variant's values on the given dates are normally distributed, in logarithms: their mean and covariance over the
unknown properties of a tile come from the signatures of drawn tiles, the rest from :mod:`.simulation`.
Shapes: V variants, P drawn tiles, T dates, C bands, D = T·C, h×w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg import solve_triangular

from maestro_scale.datasets.synthetic.classes import Variant
from maestro_scale.datasets.synthetic.radar import backscatter_db
from maestro_scale.datasets.synthetic.vegetation import BAND_NM, NUISANCE, Nuisance, signatures
from maestro_scale.evaluation.oracle.simulation import (
    SceneKind,
    optical_differences,
    photo_differences,
    photo_features,
    radar_differences,
)

_DRAWS, _SEED = 128, 0
# Clouds and snow are brighter at 705 than at 1610 nm, and no ground is.
_VEIL_NM, _VEIL_RATIO = (705, 1610), 0.85
_MIN_CLEAR = 0.5  # share of the cells, for a date to be used; the others of that date take their median


@dataclass(frozen=True)
class Evidence:
    """``logs`` (V, h, w): log likelihood. ``misfit``: distance of a cell from the nearest variant, in standard
    deviations (root mean square over the dimensions, median over cells): about 1 for a scene of the generator."""

    logs: np.ndarray
    misfit: float


def optical_evidence(
    values: np.ndarray,
    days: np.ndarray,
    bands: tuple[str, ...],
    resolution_m: float,
    kind: SceneKind,
    variants: Sequence[Variant],
) -> Evidence | None:
    """From reflectance (T, C, h, w) on ``days`` (T,) of the year; None without a clear date."""
    nm = np.array([BAND_NM[b] for b in bands], float)
    logs, clear = np.log(np.maximum(values, 1e-4)), _clear(values, nm)
    used = np.flatnonzero(clear.mean(axis=(1, 2)) >= _MIN_CLEAR)
    if not len(used):
        return None
    logs, clear, days = logs[used], clear[used], days[used]
    for date, seen in zip(logs, clear, strict=True):
        date[:, ~seen] = np.median(date[:, seen], axis=1)[:, None]
    pure = np.log(signatures(_tiles(), days, nm, variants))
    found = optical_differences(kind, bands, resolution_m)
    draws = (pure + found.mean).reshape(_DRAWS, len(variants), -1)
    return _gaussian(logs, draws, found.covariance([len(days)]))


def radar_evidence(
    orbits: Sequence[tuple[str, np.ndarray, np.ndarray]],
    resolution_m: float,
    kind: SceneKind,
    variants: Sequence[Variant],
) -> Evidence | None:
    """From (orbit, dB (T, 2, h, w), days (T,)) of one or both orbits; None where nothing was measured."""
    found = radar_differences(kind, resolution_m)
    values, draws, counts = [], [], []
    for orbit, series, days in orbits:
        used = np.isfinite(series).all(axis=(1, 2, 3))
        if used.any():
            pure = backscatter_db(_tiles(), days[used], orbit, variants)
            values.append(series[used])
            draws.append((pure + found.mean).reshape(_DRAWS, len(variants), -1))
            counts.append(int(used.sum()))
    if not counts:
        return None
    return _gaussian(np.concatenate(values), np.concatenate(draws, axis=2), found.covariance(counts))


def photo_evidence(
    image: np.ndarray,
    day: int,
    bands: tuple[str, ...],
    resolution_m: float,
    cell: int,
    kind: SceneKind,
    variants: Sequence[Variant],
) -> Evidence:
    """From brightness (C, H, W) in 0–1, by colour and texture of its cells of ``cell`` pixels."""
    nm = np.array([BAND_NM[b] for b in bands], float)
    colour, features = photo_features(image, resolution_m, cell)
    differences, texture = photo_differences(kind, bands, resolution_m, cell)
    pure = np.log(signatures(_tiles(), np.array([day]), nm, variants))[:, :, 0]
    by_colour = _gaussian(colour[None], pure + differences.mean, differences.single)
    by_texture = np.stack(
        [
            _gaussian(features[None], mean[None, None], covariance).logs[0]
            for mean, covariance in zip(texture.mean, texture.covariance, strict=True)
        ]
    )
    logs = by_colour.logs + by_texture[[v.texture for v in variants]]
    return Evidence(logs, by_colour.misfit)


@lru_cache(maxsize=1)
def _tiles() -> Nuisance:
    """Properties of P tiles, drawn as the generator draws them."""
    rng = np.random.Generator(np.random.Philox(key=[_SEED, 0]))
    return Nuisance(**{name: rng.uniform(low, high, _DRAWS) for name, (low, high) in NUISANCE.items()})


def _gaussian(values: np.ndarray, draws: np.ndarray, covariance: np.ndarray) -> Evidence:
    """Of values (T, C, h, w) under means ``draws`` (P, V, D) and the ``covariance`` (D, D) of what else differs."""
    observed = values.reshape(-1, values.shape[2] * values.shape[3])  # (D, cells)
    logs, misfits = [], []
    for v in range(draws.shape[1]):
        mean = draws[:, v].mean(axis=0)
        centred = draws[:, v] - mean
        total = covariance + centred.T @ centred / len(draws)
        factor = np.linalg.cholesky(total)
        standard = solve_triangular(factor, observed - mean[:, None], lower=True, check_finite=False)
        distance = (standard**2).sum(axis=0)
        logs.append(-0.5 * distance - np.log(np.diag(factor)).sum())
        misfits.append(distance / len(mean))
    misfit = float(np.sqrt(np.median(np.min(misfits, axis=0))))
    return Evidence(np.stack(logs).reshape(-1, *values.shape[2:]), misfit)


def _clear(values: np.ndarray, nm: np.ndarray) -> np.ndarray:
    """(T, h, w) bool: neither cloud nor snow."""
    red_edge, infrared = (int(np.abs(nm - wanted).argmin()) for wanted in _VEIL_NM)
    return values[:, red_edge] < _VEIL_RATIO * values[:, infrared]
