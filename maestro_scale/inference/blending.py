"""Overlapping windows become one map without seams.

Each window counts with the weight w(i)·w(j) at its pixel (i, j), where w is the raised cosine (Hann) of n pixels::

    w(i) = sin²(π (i + ½) / n)

It is 1 in the middle of the window, where the model sees the surroundings of a pixel on all sides, and falls to 0 with
slope 0 at the edges, where it does not: a window fades in and out, so the map has no step where a window begins. Of
windows that overlap by a half, the weights of each pixel add up to 1 exactly. Whatever the overlap, sums are divided by
the sum of the weights: at the edge of a map, where one window is alone, its prediction stays as it is.

What is averaged are probabilities, numbers or embeddings, never classes. Additions happen in the order of the calls.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from maestro_scale.inference.windows import Box


def weights(side: int, device: torch.device | None = None) -> Tensor:
    """(side, side) float32, above 0 everywhere."""
    positions = torch.arange(side, dtype=torch.float64) + 0.5
    axis = torch.sin(math.pi * positions / side) ** 2
    return (axis[:, None] * axis).float().to(device or torch.device("cpu"))


class Blend:
    """The weighted mean of windows over a part of a map, ``box``; its sums (C, height, width) are all the memory."""

    def __init__(self, box: Box, num_channels: int, side: int, device: torch.device) -> None:
        self._box, self._side = box, side
        self._weights = weights(side, device)
        self._sums = torch.zeros(num_channels, box.height, box.width, device=device)
        self._total = torch.zeros(box.height, box.width, device=device)

    def add(self, values: Tensor, row: int, column: int, invalid: np.ndarray | None = None) -> None:
        """Add the window (C, side, side) whose upper left pixel is (row, column) of the map. ``invalid`` (side, side):
        pixels that do not count."""
        top, left = row - self._box.top, column - self._box.left
        rows = slice(max(top, 0), min(top + self._side, self._box.height))
        columns = slice(max(left, 0), min(left + self._side, self._box.width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        inside = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        weight = self._weights[inside]
        if invalid is not None:
            weight = weight * torch.from_numpy(~invalid[inside]).to(weight.device)
        self._sums[:, rows, columns] += values[:, inside[0], inside[1]].float() * weight
        self._total[rows, columns] += weight

    def finish(self) -> tuple[Tensor, Tensor]:
        """((C, height, width) float32, 0 where no window counts; (height, width) bool, where one does). The mean is in
        the memory of the sums: nothing can be added afterwards."""
        covered = self._total > 0
        return self._sums.div_(torch.where(covered, self._total, 1.0)), covered
