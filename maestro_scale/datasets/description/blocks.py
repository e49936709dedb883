"""Splits drawn by blocks of ground, with a distance between the tiles of different splits.

The draw of a block depends on the seed and its place alone: it is the same on any machine, and stays when tiles are
added. Blocks are drawn in groups of 4×4: within a group, the draws are a stratified sample, so that small regions get
all splits, too, and nearly the fractions that were asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.index import SectionImages
from maestro_scale.datasets.description.sections.splits import SplitBlocks
from maestro_scale.datasets.scenes.ground import is_metric_at
from maestro_scale.datasets.sources.table import source_of
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import did_you_mean, shorten

_THREADS = 8
_GROUP = 4  # blocks per side of a group
_EARTH_M = 6_371_000.0
_SLACK = 1.01  # of distances on a sphere, and in projections
_MICRO = 6  # decimals of metres: differences of floats below that do not decide


@dataclass(frozen=True)
class BlockSplits:
    """The split of each tile, in the order given, None for tiles that are too near to another split, and their number
    by split."""

    splits: tuple[str | None, ...]
    dropped: dict[str, int]


def draw_blocks(
    bounds: np.ndarray,
    *,
    size_m: float,
    fractions: Mapping[str, float],
    distance_m: float = 0.0,
    seed: int = 0,
    systems: Sequence[str] | None = None,
) -> BlockSplits:
    """Draw the splits of tiles by the block in which their centre lies.

    Args:
        bounds: (N, 4) west, south, east, north of the tiles, in metres.
        size_m: side of a block; blocks begin at 0 of the coordinates.
        fractions: of the blocks, by split; they add up to 1.
        distance_m: tiles nearer than this to a tile of another split (edge to edge), or overlapping one, are left out:
            those of the split with the larger fraction.
        systems: (N,) coordinate system of each tile, where they differ. Distances between tiles of different systems
            are those of their centres on a sphere less their half diagonals, and 1 %: never too long.

    Raises:
        DatasetError: the fractions do not add up to 1, a block is smaller than a tile, or a split gets no tile.
    """
    bounds = np.round(np.asarray(bounds, float).reshape(-1, 4), _MICRO)
    _check(bounds, size_m, fractions)
    names = list(fractions)
    centres = (bounds[:, :2] + bounds[:, 2:]) / 2
    places = np.floor(np.round(centres / size_m, 9)).astype(np.int64)
    systems = [""] * len(bounds) if systems is None else systems
    draws: dict[tuple[str, int, int], float] = {}
    chosen = np.empty(len(bounds), np.int64)
    edges = np.cumsum([fractions[name] for name in names])
    for i, (system, (col, row)) in enumerate(zip(systems, places.tolist(), strict=True)):
        place = (system, col, row)
        if place not in draws:
            draws[place] = _draw(seed, *place)
        chosen[i] = min(int(np.searchsorted(edges, draws[place], side="right")), len(names) - 1)
    num_drawn = np.bincount(chosen, minlength=len(names))
    # The split with the larger fraction loses tiles to the smaller one; of equal ones, the one that is named first.
    order = sorted(range(len(names)), key=lambda k: (fractions[names[k]], -k))
    splits, kept = np.full(len(bounds), -1), np.zeros(len(bounds), bool)
    dropped = {}
    for split in order:
        mine = np.flatnonzero(chosen == split)
        others = np.flatnonzero(kept)
        near = _near(bounds, mine, others, distance_m, systems)
        if len(set(systems)) > 1:
            near |= _near_across(bounds, mine, others, distance_m, systems)
        dropped[names[split]] = int(near.sum())
        kept[mine[~near]] = True
        splits[mine[~near]] = split
    for k, name in enumerate(names):
        if not (splits == k).any():
            why = (
                f"all its {num_drawn[k]} tiles are nearer than {distance_m:g} m to another split"
                if num_drawn[k]
                else f"there are {len(draws)} blocks of {size_m:g} m"
            )
            raise DatasetError(
                f"splits.blocks: split {name} gets no tile: {why}; use a smaller size_m or distance_m, or another seed",
                "a split is empty",
            )
    return BlockSplits(tuple(names[k] if k >= 0 else None for k in splits), dropped)


def tiles_of_split(
    section: SplitBlocks,
    split: str,
    keys: Sequence[str],
    rasters: Sequence[SectionImages],
    description: Description,
) -> tuple[list[str], dict[str, int]]:
    """The tiles of ``split``, and how many are left out, by reason.

    Opens one file of every tile, for where it lies: of the first of ``rasters`` whose files say so. DatasetError if a
    tile has none, or if there is no such split.
    """
    if split not in section.fractions:
        raise DatasetError(
            f"splits.blocks.fractions: has no split {split!r}{did_you_mean(split, section.fractions)}"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        places = list(pool.map(lambda key: _corner(key, rasters), keys))
    missing = [key for key, place in zip(keys, places, strict=True) if place is None]
    if missing:
        raise DatasetError(
            f"splits.blocks: {len(missing)} of {len(keys)} tiles do not say where they lie in metres on the "
            f"ground, the first: {shorten(missing[0])}; split them by lists or a column",
            "no place on the ground",
        )
    known = [place for place in places if place is not None]
    corners = np.array([(west, north) for _, west, north in known], float)
    tile_m = description.tile_m
    bounds = np.stack([corners[:, 0], corners[:, 1] - tile_m, corners[:, 0] + tile_m, corners[:, 1]], axis=1)
    drawn = draw_blocks(
        bounds,
        size_m=section.size_m,
        fractions=section.fractions,
        distance_m=section.distance_m,
        seed=section.seed,
        systems=[crs for crs, _, _ in known],
    )
    chosen = [key for key, of in zip(keys, drawn.splits, strict=True) if of == split]
    return chosen, left_out(section, split, drawn)


def left_out(section: SplitBlocks, split: str, drawn: BlockSplits) -> dict[str, int]:
    """Number of tiles of a split that are left out for the distance, with the reason."""
    num = drawn.dropped[split]
    return {f"of {split} are nearer than {section.distance_m:g} m to another split": num} if num else {}


def _corner(key: str, rasters: Sequence[SectionImages]) -> tuple[str, float, float] | None:
    """Coordinate system and upper left corner of a tile, from the first file that says; None if none does."""
    for raster in rasters:
        section = raster.section
        for ref in raster.by_key.get(key, ())[:1]:
            with source_of(section).open_file(ref.address, section) as file:
                image = file.image(file.images(ref)[0])
                crs, transform = section.crs or image.crs, image.transform
                if crs is None or transform is None or not is_metric_at(crs, transform[2], transform[5]):
                    continue
                a, _, west, _, e, north = transform
                row, column = getattr(section, "window", None) or (0, 0)
                north += e * image.height if e > 0 else 0.0
                return crs, west + a * column, north - abs(e) * row
    return None


def _check(bounds: np.ndarray, size_m: float, fractions: Mapping[str, float]) -> None:
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6:
        raise DatasetError(f"splits.blocks.fractions: add up to {total:g}, not to 1; change them")
    # A tile of 294.4 m has 294.4000001 m between its corners, which are large numbers.
    if len(bounds) and size_m * (1 + 1e-6) < (largest := float((bounds[:, 2:] - bounds[:, :2]).max())):
        raise DatasetError(
            f"splits.blocks.size_m: {size_m:g} m is less than a tile of {largest:g} m; use several tiles, for example "
            f"{4 * largest:g}"
        )


def _draw(seed: int, system: str, col: int, row: int) -> float:
    """A number from 0 to below 1 for a block; those of a group of 4×4 blocks lie in different sixteenths."""
    group = f"{seed}/{system}/{col // _GROUP}/{row // _GROUP}"
    inside = row % _GROUP * _GROUP + col % _GROUP
    ranks = sorted(range(_GROUP**2), key=lambda k: _hash(f"{group}/{k}"))
    jitter = _hash(f"{group}/{inside}/draw") / 2**64
    return (ranks.index(inside) + jitter) / _GROUP**2


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _near(
    bounds: np.ndarray, mine: np.ndarray, others: np.ndarray, distance_m: float, systems: Sequence[str]
) -> np.ndarray:
    """Which tiles of ``mine`` overlap a tile of ``others``, or are nearer to one than ``distance_m``.

    By buckets of the size of the largest tile and the distance, so that only neighbours are compared.
    """
    near = np.zeros(len(mine), bool)
    if not len(mine) or not len(others):
        return near
    side = float((bounds[:, 2:] - bounds[:, :2]).max()) + distance_m
    buckets: dict[tuple[str, int, int], list[int]] = {}
    for k in others.tolist():
        buckets.setdefault(_bucket(bounds[k], systems[k], side), []).append(k)
    for position, k in enumerate(mine.tolist()):
        system, col, row = _bucket(bounds[k], systems[k], side)
        found = [
            j for dc in (-1, 0, 1) for dr in (-1, 0, 1) for j in buckets.get((system, col + dc, row + dr), ())
        ]
        if found:
            near[position] = bool((_gaps(bounds[k], bounds[found]) < max(distance_m, 0.0)).any()) or _overlap(
                bounds[k], bounds[found]
            )
    return near


def _near_across(
    bounds: np.ndarray, mine: np.ndarray, others: np.ndarray, distance_m: float, systems: Sequence[str]
) -> np.ndarray:
    """Which tiles of ``mine`` may be nearer than ``distance_m`` to a tile of ``others`` of another system."""
    from scipy.spatial import cKDTree

    near = np.zeros(len(mine), bool)
    if not len(mine) or not len(others):
        return near
    points = _on_sphere((bounds[:, :2] + bounds[:, 2:]) / 2, systems)
    radius = np.hypot(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]) / 2
    reach = (distance_m + radius[mine] + radius[others].max()) * _SLACK
    found = cKDTree(points[others]).query_ball_point(points[mine], reach)
    for i, (k, candidates) in enumerate(zip(mine.tolist(), found, strict=True)):
        for j in others[candidates].tolist():
            apart = float(np.linalg.norm(points[k] - points[j]))
            if systems[j] != systems[k] and apart < (distance_m + radius[k] + radius[j]) * _SLACK:
                near[i] = True
                break
    return near


def _on_sphere(centres: np.ndarray, systems: Sequence[str]) -> np.ndarray:
    """(N, 3) metres from the centre of the Earth."""
    from pyproj import Transformer

    lon_lat = np.zeros(centres.shape)
    names = np.array(list(systems), object)
    for system in sorted(set(systems)):
        here = names == system
        transformer = Transformer.from_crs(system, "EPSG:4326", always_xy=True)
        lon_lat[here] = np.stack(transformer.transform(*centres[here].T), axis=1)
    lon, lat = np.radians(lon_lat).T
    return _EARTH_M * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def _bucket(box: np.ndarray, system: str, side: float) -> tuple[str, int, int]:
    return system, math.floor(box[0] / side), math.floor(box[1] / side)


def _gaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of a box to others, edge to edge; 0 where they touch or overlap."""
    x = np.maximum(np.maximum(others[:, 0] - box[2], box[0] - others[:, 2]), 0)
    y = np.maximum(np.maximum(others[:, 1] - box[3], box[1] - others[:, 3]), 0)
    return np.round(np.hypot(x, y), _MICRO)


def _overlap(box: np.ndarray, others: np.ndarray) -> bool:
    return bool(
        (
            (others[:, 0] < box[2])
            & (box[0] < others[:, 2])
            & (others[:, 1] < box[3])
            & (box[1] < others[:, 3])
        ).any()
    )
