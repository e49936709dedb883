"""Where the windows of an area lie, and the chunks in which its map is computed, in whole pixels of the map.

A window is what the model sees at once. A chunk is computed from all the windows that touch it, in a fixed order, so
that it does not depend on the other chunks, on the number of ranks, or on where a job was killed. Windows that touch
two chunks are computed twice: with chunks of 8 windows per side, about a quarter of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maestro_scale.datasets.scenes.cells import CellRuns
from maestro_scale.datasets.scenes.grid import Cell

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

    ``windows``: cells of a lattice, ``side`` pixels per side, by which they may exceed the map. ``tops``, ``lefts``:
    the first pixel of each row and column of the lattice, from ``first``, ascending. Memory is by the sides of the
    map, not by the number of windows.
    """

    name: str
    height: int
    width: int
    resolution_m: float
    windows: CellRuns
    first: Cell
    tops: np.ndarray
    lefts: np.ndarray
    side: int

    def corner(self, number: int) -> tuple[int, int]:
        """Row and column of the upper left pixel of a window."""
        cell = self.windows[number]
        return int(self.tops[cell.row - self.first.row]), int(self.lefts[cell.col - self.first.col])

    def windows_of(self, box: Box) -> np.ndarray:
        """Numbers of the windows that touch a part of the map, ascending."""
        return self.windows.within(*self._lattice(box))

    def count(self, box: Box) -> int:
        """How many windows touch a part of the map."""
        return self.windows.count_within(*self._lattice(box))

    def _lattice(self, box: Box) -> tuple[range, range]:
        """Rows and columns of the lattice that touch a part of the map."""
        rows = _touching(self.tops, self.side, box.top, box.top + box.height, self.first.row)
        return rows, _touching(self.lefts, self.side, box.left, box.left + box.width, self.first.col)

    def chunks(self, side: int) -> list[Box]:
        """The map in parts of at most ``side`` pixels per side, row by row."""
        return [
            Box(top, left, min(side, self.height - top), min(side, self.width - left))
            for top in range(0, self.height, side)
            for left in range(0, self.width, side)
        ]


def _touching(starts: np.ndarray, side: int, begin: int, end: int, first: int) -> range:
    """Numbers, from ``first``, of the windows of which a pixel is in ``begin`` to ``end``."""
    low, high = np.searchsorted(starts, [begin - side + 1, end]).tolist()
    return range(first + low, first + high)


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


def stride_m(
    window_m: float, overlap: float, lengths_m: Sequence[float], tokens_m: Sequence[float] = ()
) -> float:
    """The distance of windows that overlap by at least the share ``overlap``: a multiple of all ``lengths_m`` (the
    pixels of sensors and map), or if that is too large, of the first of them.

    What a model sees at a place depends on where its tokens begin (``tokens_m``: sides of the tokens of each sensor),
    so windows that overlap should begin at different parts of a token. Chosen is, of the distances up to a token below
    the largest possible one, that whose windows leave the smallest gaps within a token; of equal ones the largest.
    """
    units = [max(round(length * _MICRO), 1) for length in lengths_m]
    window = round(window_m * _MICRO)
    most = round(window * (1 - overlap))
    unit = math.lcm(*units)
    if unit > most:
        unit = units[0]
    largest = max(most // unit, 1) * unit
    # A sensor with one or two tokens in a window sees the surroundings, not a place.
    tokens = [token for token in (round(t * _MICRO) for t in tokens_m) if 2 * token < window]
    if not overlap or not tokens:
        return largest / _MICRO
    # At most four times as many windows.
    candidates = range(largest, max(largest - max(tokens), (largest - 1) // 2), -unit)
    return min(candidates, key=lambda stride: _gap(stride, window, tokens)) / _MICRO


def _gap(stride: int, window: int, tokens: Sequence[int]) -> float:
    """The largest distance between neighbours among the places within a token at which overlapping windows begin, as a
    share of the token: 1 if all begin at the same place, 1/n if n of them divide it evenly. Mean over ``tokens``."""
    number = max(window // stride, 2)
    gaps = []
    for token in tokens:
        begins = sorted({i * stride % token for i in range(number)})
        gaps.append(max(b - a for a, b in itertools.pairwise([*begins, begins[0] + token])) / token)
    return sum(gaps) / len(gaps)
