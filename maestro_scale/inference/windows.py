"""Where the windows of an area lie, and the chunks in which its map is computed, in whole pixels of the map.

A window is what the model sees at once. A chunk is computed from all the windows that touch it, in a fixed order, so
that it does not depend on the other chunks, on the number of ranks, or on where a job was killed. Windows that touch
two chunks are computed twice: with chunks of 8 windows per side, about a quarter of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK = 128
"""Sides of chunks are multiples of it."""
_WINDOWS = 8  # per side of a chunk, if they fit into memory
_LEAST = (
    1024  # pixels per side, if they fit into memory: the maps of small windows would have very many chunks
)

_MICRO = 1_000_000  # lengths in metres are compared in micrometres


class Box(NamedTuple):
    """A part of a map, in pixels; rows count southwards."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Area:
    """One map: ``height`` × ``width`` pixels of ``resolution_m``, named ``name``.

    ``rows``, ``columns`` (N,): upper left pixels of the windows, ``side`` pixels per side. Windows may exceed the map.
    """

    name: str
    height: int
    width: int
    resolution_m: float
    rows: np.ndarray
    columns: np.ndarray
    side: int

    def windows_of(self, box: Box) -> np.ndarray:
        """Numbers of the windows that touch a part of the map, ascending."""
        hit = (self.rows < box.top + box.height) & (self.rows + self.side > box.top)
        hit &= (self.columns < box.left + box.width) & (self.columns + self.side > box.left)
        return np.flatnonzero(hit)

    def chunks(self, side: int) -> list[Box]:
        """The map in parts of at most ``side`` pixels per side, row by row."""
        return [
            Box(top, left, min(side, self.height - top), min(side, self.width - left))
            for top in range(0, self.height, side)
            for left in range(0, self.width, side)
        ]


def starts(length: int, window: int, stride: int, offset: int = 0) -> list[int]:
    """First positions of the windows that cover an axis of ``length``: the first and the last at its ends, the others
    at ``offset`` plus multiples of ``stride``."""
    last = max(length - window, 0)
    inner = range(offset % stride, last, stride)
    return sorted({0, last, *inner})


def chunk_side(num_channels: int, window: int, most_bytes: int) -> int:
    """Pixels per side of a chunk whose sums of ``num_channels`` float32 and weights fit into ``most_bytes``."""
    fits = math.isqrt(max(most_bytes // (4 * (num_channels + 1)), 1))
    return max(min(fits, max(_WINDOWS * window, _LEAST)) // BLOCK * BLOCK, BLOCK)


def stride_m(window_m: float, overlap: float, lengths_m: Sequence[float]) -> float:
    """The largest distance of windows that overlap by at least the share ``overlap``, of which all ``lengths_m`` (the
    pixels of sensors and map) are divisors, or if there is none up to a window, the first of them."""
    units = [max(round(length * _MICRO), 1) for length in lengths_m]
    window = round(window_m * _MICRO)
    unit = math.lcm(*units)
    if unit > window:
        unit = units[0]
    return max(int(window * (1 - overlap) / unit + 1e-9), 1) * unit / _MICRO
