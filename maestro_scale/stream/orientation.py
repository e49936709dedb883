"""The eight symmetries of a square image, and copies of images in them: a large part of preparing a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows a multiple of this apart share few places in the cache of the processor (L1: 64 sets of 12 lines), so that the
# pixels of a column evict each other: as many columns at a time as stay in it.
_CACHE_STRIDE = 512
_COLUMNS_BYTES = 32 * 1024


@dataclass(frozen=True)
class Orientation:
    """One of the eight symmetries of the square: flips, then a transposition."""

    flip_rows: bool = False
    flip_columns: bool = False
    transpose: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of (…, H, W), or of (…, W, H) if transposed."""
        if self.flip_rows:
            pixels = pixels[..., ::-1, :]
        if self.flip_columns:
            pixels = pixels[..., ::-1]
        return pixels.swapaxes(-1, -2) if self.transpose else pixels

    def write(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write :meth:`apply` of ``pixels`` into ``out``."""
        if self.transpose:
            _write_columns(self.apply(pixels), out, pixels.strides[-2])
        elif self.flip_columns and (size := _word(pixels, out)):
            # numpy copies reversed rows pixel by pixel; words of the other byte order are reversed as a whole.
            words = pixels.view(f"<u{size}")[..., ::-1]
            out.view(f">u{size}")[...] = words[..., ::-1, :] if self.flip_rows else words
        else:
            out[...] = self.apply(pixels) if self.flip_rows or self.flip_columns else pixels


ORIENTATIONS = tuple(Orientation(bool(i & 1), bool(i & 2), bool(i & 4)) for i in range(8))
"""By a number of three bits: flips of rows and columns, transposition."""
UPRIGHT = ORIENTATIONS[0]


def _word(pixels: np.ndarray, out: np.ndarray) -> int:
    """Pixels of one byte that a word holds, so that rows are whole words; 0 if there is no such word."""
    # Not of broadcast rows, which have no bytes of their own to view as words.
    if pixels.itemsize != 1 or pixels.dtype != out.dtype or pixels.strides[-1] != 1 or out.strides[-1] != 1:
        return 0
    return next((size for size in (8, 4) if pixels.shape[-1] % size == 0), 0)


def _write_columns(view: np.ndarray, out: np.ndarray, stride: int) -> None:
    """Write a transposed image, whose columns are ``stride`` bytes apart in memory, into ``out``."""
    if stride % _CACHE_STRIDE:
        out[...] = view
        return
    width = max(16, min(64, _COLUMNS_BYTES // max(abs(stride), 1)))
    for first in range(0, out.shape[-1], width):
        out[..., first : first + width] = view[..., first : first + width]
