"""Proposed sizes: the ground extent of tiles and crops, patches, dates per sample, so that a sample has some hundred
to two thousand tokens, as in the presets of the shipped datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_TOKENS = 2048
"""Of a sample, over all rasters and dates, before masking."""
_GRIDS = (16, 15, 14, 12, 10, 8, 6)  # patches per side of the finest raster, the best first
_MAX_GRID = 20
_DATES = (16, 12, 8, 6, 4, 3, 2, 1)
_MAX_SIDE = 320  # pixels per side of a raster in a sample
_UNIT = 1000  # resolutions are compared as whole millimetres


@dataclass(frozen=True)
class Input:
    """One raster: pixel size in metres, dates of a typical tile (1: no series), and pixels per side of its files."""

    resolution_m: float
    num_dates: int
    side: int


@dataclass(frozen=True)
class Sized:
    """What is proposed for one raster. ``resolution_m`` is coarser than that of the files where these are too fine."""

    resolution_m: float
    patch: int
    num_dates: int
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """``crop_m`` equals ``tile_m`` where a sample is a whole tile."""

    tile_m: float
    crop_m: float
    rasters: tuple[Sized, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a sample, of all rasters."""
        return sum(r.tokens for r in self.rasters)


def usual_patch(resolution_m: float) -> int:
    """Pixels per side of a token, as in the presets: 16 up to 2 m (FLAIR-HUB, S2-NAIP), 2 at 10 m."""
    for up_to, patch in ((2.5, 16), (4, 8), (6, 4), (40, 2)):
        if resolution_m <= up_to:
            return patch
    return 1


def sizes_of_scenes(rasters: Sequence[Input]) -> Sizes:
    """Tiles to cut from scenes; a sample is a whole tile.

    A tile is a whole number of pixels of every raster, and at least six of the coarsest. As scenes are warped in any
    case, a resolution that does not fit is changed a little.
    """
    resolutions = [_millimetres(r.resolution_m) for r in rasters]
    coarsest, finest = max(resolutions), min(resolutions)
    at_least = 6 * coarsest
    sizes = None
    for grid in _GRIDS:
        wanted = max(grid * usual_patch(finest / _UNIT) * finest, at_least)
        whole = math.lcm(*resolutions, *(usual_patch(r / _UNIT) * r for r in resolutions))
        unit = next((u for u in (whole, math.lcm(*resolutions)) if u <= 1.5 * wanted), coarsest)
        tile_m = unit * max(-(-at_least // unit), round(wanted / unit)) / _UNIT
        sizes = _sized([_fitted(r, tile_m) for r in rasters], tile_m, tile_m)
        if sizes.tokens <= MAX_TOKENS:
            break
    assert sizes is not None
    return sizes


def _fitted(raster: Input, tile_m: float) -> Input:
    """The raster with pixels of which a whole number fits into a tile, and not too many."""
    side = tile_m / raster.resolution_m
    if side > _MAX_SIDE * 1.5:
        resolution_m = tile_m / 240
    elif abs(side - round(side)) > 1e-6:
        resolution_m = tile_m / round(side)
    else:
        return raster
    return Input(round(resolution_m, 9), raster.num_dates, raster.side)


def sizes_of_tiles(rasters: Sequence[Input], tile_m: float) -> Sizes:
    """Of tiles that are files: the crop is the tile, unless that has too many tokens."""
    whole = _sized(rasters, tile_m, tile_m)
    if _is_usual(whole):
        return whole
    step = max(_millimetres(r.resolution_m) for r in rasters)
    for crop in range(_millimetres(tile_m) // step * step, 0, -step):
        if all(crop % _millimetres(r.resolution_m) == 0 for r in rasters):
            sizes = _sized(rasters, tile_m, crop / _UNIT)
            if _is_usual(sizes):
                return sizes
    return whole


def _is_usual(sizes: Sizes) -> bool:
    """Whether there are not too many tokens, of patches that differ from the usual ones by a factor of at most two."""
    usual = [(r.patch, usual_patch(r.resolution_m)) for r in sizes.rasters]
    return sizes.tokens <= MAX_TOKENS and all(u <= 2 * p and p <= 2 * u for p, u in usual)


def _sized(rasters: Sequence[Input], tile_m: float, crop_m: float) -> Sizes:
    sides = [max(1, round(crop_m / r.resolution_m)) for r in rasters]
    patches = [_patch(side, r.resolution_m) for side, r in zip(sides, rasters, strict=True)]
    per_date = [(side // patch) ** 2 for side, patch in zip(sides, patches, strict=True)]
    dates = [max(d for d in _DATES if d <= max(1, r.num_dates)) for r in rasters]
    while sum(n * d for n, d in zip(per_date, dates, strict=True)) > MAX_TOKENS and max(dates) > 4:
        longest = dates.index(max(dates))
        dates[longest] = next(d for d in _DATES if d < dates[longest])
    sized = [
        Sized(r.resolution_m, patch, num, num * tokens)
        for r, patch, num, tokens in zip(rasters, patches, dates, per_date, strict=True)
    ]
    return Sizes(tile_m, crop_m, tuple(sized))


def _patch(side: int, resolution_m: float) -> int:
    """The divisor of ``side`` nearest to the usual patch that gives at most 20 patches per side, if there is one."""
    usual = usual_patch(resolution_m)
    divisors = [d for d in range(1, side + 1) if side % d == 0]
    few = [d for d in divisors if side // d <= _MAX_GRID and d <= 2 * usual] or [
        d for d in divisors if d <= max(usual, 1)
    ]
    return min(few, key=lambda d: (abs(Fraction(d, usual) - 1) if d >= usual else Fraction(usual, d) - 1, -d))


def _millimetres(resolution_m: float) -> int:
    return max(1, round(resolution_m * _UNIT))
