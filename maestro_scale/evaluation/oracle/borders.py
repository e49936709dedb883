"""Borders between classes, sharpened with the image of highest resolution.

Shapes: C bands, K classes, H×W pixels of the labels, h×w cells.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter, zoom

_SMOOTHING_M = 1.0  # of the image, against its noise
_COLOUR_NOISE = (
    0.3  # of the logarithm of a band relative to the brightness, after smoothing: pigments of the ground
)
_MIN_PRIOR = 1e-3  # of a class at a pixel, so that colour can outweigh blurred shares
_ROUNDS = 3


def class_map(shares: np.ndarray, side: int, image: np.ndarray | None, crop_m: float) -> np.ndarray:
    """(side, side) uint8 index of the class with the largest of the ``shares`` (K, h, w) of a crop.

    Where pixels are finer than cells, the shares are interpolated, and the borders refined with ``image`` (C, H, W) of
    the crop, if there is one.
    """
    factor = side / shares.shape[-1]
    prior = (
        zoom(shares, (1, factor, factor), order=1, mode="nearest", grid_mode=True) if factor != 1 else shares
    )
    if factor <= 1 or image is None:
        return prior.argmax(axis=0).astype(np.uint8)
    size = max(round(_SMOOTHING_M * image.shape[-1] / crop_m), 1)
    smooth = np.stack([uniform_filter(band, size, mode="nearest") for band in image.astype(np.float32)])
    if smooth.shape[-1] != side:
        scale = side / smooth.shape[-1]
        smooth = zoom(smooth, (1, scale, scale), order=1, grid_mode=True)
    return refine_borders(np.log(np.maximum(smooth, 1.0)), prior).astype(np.uint8)


def refine_borders(logs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(H, W) classes from log values of an image (C, H, W) and blurred shares (K, H, W).

    Alternates between the median colour of each class and the most probable class of each pixel. Brightness is removed,
    because the light varies over the tile.
    """
    colour = logs - logs.mean(axis=0)
    belief = np.log(np.maximum(prior, _MIN_PRIOR))
    present = np.flatnonzero(prior.mean(axis=(1, 2)) > 0)
    classes = prior.argmax(axis=0)
    for _ in range(_ROUNDS):
        posterior = np.full(prior.shape, -np.inf, np.float32)
        for k in present:
            inside = (classes == k) & (prior[k] > 0.5)
            if inside.any():
                offset = colour - np.median(colour[:, inside], axis=1)[:, None, None]
                posterior[k] = belief[k] - 0.5 * (offset**2).sum(axis=0) / _COLOUR_NOISE**2
            else:
                posterior[k] = belief[k] - 0.5 * len(colour)
        classes = posterior.argmax(axis=0)
    return classes
