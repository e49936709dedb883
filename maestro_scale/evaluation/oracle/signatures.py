"""The generator of synthetic scenes inverted: from a noisy time series to the shares of the classes in each pixel.

Known are the classes' signatures and the ranges of the parameters that all classes of a tile share (light, soil,
vigour, season). These five numbers are found by search, then every pixel is unmixed.
Shapes: T dates, C bands, N pixels, K classes, A optical appearances of classes, P candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from maestro_scale.datasets.synthetic.classes import Variant, appearances, variants_of
from maestro_scale.datasets.synthetic.ground import deviation
from maestro_scale.datasets.synthetic.optical import ABSOLUTE_NOISE, CALIBRATION_SIGMA, HAZE, RELATIVE_NOISE
from maestro_scale.datasets.synthetic.vegetation import NUISANCE, Nuisance, signatures

_ROUNDS, _CANDIDATES, _NUM_BEST = (
    5,
    192,
    16,
)  # of the search; the best are the ones the next round is drawn around
_SEARCHED = ("tilt", "soil", "soil_tilt", "understorey", "vigour", "delay_days")
_SEED = 0

_HAZE = HAZE / 2  # deviation of the haze at 490 nm, falling with the square of the wavelength
# Clouds and snow are brighter at 705 than at 1610 nm, and no ground is.
_VEIL_NM, _VEIL_RATIO = (705, 1610), 0.75
_HAZY_NM = 600  # haze is negligible in bands above
_UNMIXING_ROUNDS = 2


@dataclass(frozen=True)
class ReflectanceSeries:
    """``values`` (T, C, N) reflectance of N pixels on ``days`` (T,) of the year in bands at ``nm`` (C,)."""

    values: np.ndarray
    days: np.ndarray
    nm: np.ndarray

    @property
    def clear(self) -> np.ndarray:
        """(T, N) bool: neither cloud nor snow."""
        red_edge, infrared = (int(np.abs(self.nm - nm).argmin()) for nm in _VEIL_NM)
        return self.values[:, red_edge] < _VEIL_RATIO * self.values[:, infrared]

    @property
    def noise(self) -> np.ndarray:
        """(C,): standard deviation of the logarithm of a value."""
        level = np.maximum(np.median(self.values, axis=(0, 2)), 1e-3)
        haze = _HAZE * (490 / self.nm) ** 2
        relative = RELATIVE_NOISE**2 + CALIBRATION_SIGMA**2 + deviation(self.nm) ** 2
        return np.sqrt(relative + (ABSOLUTE_NOISE**2 + haze**2) / level**2)


def unmix(series: ReflectanceSeries, num_classes: int, min_share: float) -> tuple[np.ndarray, float]:
    """(K, N) shares of the classes in each pixel, which sum to one, and the misfit.

    The misfit is the distance of the best match in standard deviations of the noise (median over pixels): below 3 for a
    scene of the generator. A class with less than ``min_share`` of the tile after the first unmixing is taken to be
    absent, since noise spreads small shares over all classes.
    """
    clear, noise = series.clear, series.noise
    if not clear.any():
        return np.full((num_classes, series.values.shape[2]), 1 / num_classes), 0.0
    # Variants that differ in texture or radar alone look alike: they are unmixed as one, which is divided afterwards.
    looks, likely = appearances(variants_of(num_classes), "family", "season")
    tile, misfit = _search(series, clear, noise, looks)
    pure = _pure_reflectance(tile, series, looks)[0]  # (A, T, C)
    shares = np.eye(len(looks))[:, _nearest(series, clear, noise, pure)]
    chosen = np.arange(len(looks))
    for _ in range(_UNMIXING_ROUNDS):
        light = _normalise_light(series, clear, noise, np.einsum("ktc,kn->tcn", pure, shares))
        shares = np.zeros_like(shares)
        shares[chosen] = _shares(light, clear, noise, pure, chosen)
        means = shares.mean(axis=1)
        chosen = np.flatnonzero(means > min(min_share, means.max() / 2))
    return likely @ shares, misfit


def _nearest(series: ReflectanceSeries, clear: np.ndarray, noise: np.ndarray, pure: np.ndarray) -> np.ndarray:
    """(N,) the class whose signature is closest to each pixel."""
    observed = _centred(_log(series.values).transpose(0, 2, 1), noise)
    model = _centred(np.log(pure), noise)
    chi2 = ((observed[None] - model[:, :, None]) ** 2).sum(axis=3)  # (K, T, N)
    return (chi2 * clear).sum(axis=1).argmin(axis=0)


def _search(
    series: ReflectanceSeries, clear: np.ndarray, noise: np.ndarray, looks: Sequence[Variant]
) -> tuple[Nuisance, float]:
    """The parameters that all classes of the tile share, and the misfit, by the cross-entropy method: candidates are
    redrawn around the best of the round before."""
    rng = np.random.Generator(np.random.Philox(key=[_SEED, 0]))
    low, high = np.array([NUISANCE[name] for name in _SEARCHED]).T
    drawn = rng.uniform(low, high, (_CANDIDATES, len(_SEARCHED)))
    observed = _centred(_log(series.values).transpose(0, 2, 1), noise)  # (T, N, C)
    observed = observed * clear[:, :, None]
    count = np.maximum(clear.sum(axis=0) * (len(noise) - 1), 1)
    for _ in range(_ROUNDS):
        tile = _as_tile(drawn)
        pure = np.log(_pure_reflectance(tile, series, looks))  # (P, A, T, C)
        model = _centred(pure, noise)
        flat = model.reshape(-1, model.shape[2] * model.shape[3])
        cross = flat @ observed.transpose(0, 2, 1).reshape(flat.shape[1], -1)
        norms = (model**2).sum(axis=3).reshape(-1, len(clear)) @ clear
        chi2 = ((observed**2).sum(axis=(0, 2)) - 2 * cross + norms) / count
        nearest = np.maximum(chi2.reshape(len(drawn), len(looks), -1).min(axis=1), 0)
        score = np.log1p(nearest).mean(axis=1)  # logarithm: mixed pixels match no class and must not dominate
        best = drawn[np.argsort(score)[:_NUM_BEST]]
        misfit = float(np.sqrt(np.median(nearest[score.argmin()])))
        spread = np.maximum(best.std(axis=0), 1e-3 * (high - low))
        around = rng.normal(best.mean(axis=0), 1.5 * spread, (_CANDIDATES - 1, len(low)))
        drawn = np.clip(np.concatenate([best[:1], around]), low, high)
    return _as_tile(best[:1]), misfit


def _pure_reflectance(tile: Nuisance, series: ReflectanceSeries, looks: Sequence[Variant]) -> np.ndarray:
    """(P, A, T, C) reflectance of pure classes in the light of the tile, without its brightness."""
    pure = signatures(tile, series.days, series.nm, looks)
    return pure * (1 + np.atleast_1d(tile.tilt)[:, None] * np.log(series.nm / 800.0))[:, None, None]


def _as_tile(drawn: np.ndarray) -> Nuisance:
    given = dict(zip(_SEARCHED, drawn.T, strict=True))
    return Nuisance(**{name: given.get(name, 0.0) for name in NUISANCE})


def _centred(log_values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(…, C) without the brightness of each date and pixel, in standard deviations of the noise."""
    weight = noise**-2 / (noise**-2).sum()
    return (log_values - (log_values @ weight)[..., None]) / noise


def _normalise_light(
    series: ReflectanceSeries, clear: np.ndarray, noise: np.ndarray, expected: np.ndarray
) -> np.ndarray:
    """(T, C, N) values with the light of ``expected``: brightness and haze of a date are removed, estimated over all
    pixels."""
    weight = noise**-2 / (noise**-2).sum()
    ratio = np.einsum("tcn,c->tn", _log(series.values) - _log(expected), weight)
    light = series.values / np.exp(_median(ratio, clear))[:, None, None]
    fall = (490 / series.nm) ** 2
    short = series.nm < _HAZY_NM
    if not short.any():
        return light
    excess = ((light - expected)[:, short] / fall[short, None]).mean(axis=1)
    haze = np.maximum(_median(excess, clear), 0)
    return np.maximum(light - haze[:, None, None] * fall[:, None], 1e-4)


def _median(values: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """(T,) over the clear pixels of (T, N); 0 where there are none."""
    return np.array([np.median(v[c]) if c.any() else 0.0 for v, c in zip(values, clear, strict=True)])


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, 1e-4))


def _shares(
    light: np.ndarray, clear: np.ndarray, noise: np.ndarray, pure: np.ndarray, classes: np.ndarray
) -> np.ndarray:
    """(len(classes), N) by non-negative least squares, each value weighted by its noise."""
    scale = 1 / (noise * np.median(light, axis=(0, 2)))
    basis = (pure[classes] * scale).transpose(1, 2, 0)  # (T, C, K)
    shares = np.empty((len(classes), light.shape[2]))
    for n in range(light.shape[2]):
        usable = clear[:, n]
        solved = np.zeros(len(classes))
        if usable.any():
            solved, _ = nnls(
                basis[usable].reshape(-1, len(classes)),
                (light[usable, :, n] * scale).ravel(),
                maxiter=30 * len(classes),
            )
        total = solved.sum()
        shares[:, n] = solved / total if total else 1 / len(classes)
    return shares
