"""One tile as a batch of size one: all its sensors and dates, without crop, flips or random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetError, Sensor, Tile
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.dates import fill_nan


def tile_batch(tile: Tile, sensors: Iterable[Sensor], dataset: str = "", centre: float = 1.0) -> Batch:
    """The tile as input of those of ``sensors`` that it has data for. NaN is filled in, as in samples of the loader.

    ``centre``: share of the tile's side to keep, around its centre; 1: all of it.

    Raises:
        DatasetError: the tile has none of the sensors, or too few bands for one.
    """
    pixels, dates = {}, {}
    for s in sensors:
        if s.source not in tile.arrays:
            continue
        array = tile.arrays[s.source]
        if array.ndim != 4 or array.shape[1] <= max(s.bands) or len(array) != len(tile.dates[s.source]):
            raise DatasetError(
                f"tile {tile.key}: {s.source} is {array.shape} with {len(tile.dates[s.source])} dates; sensor {s.name} "
                f"needs (dates, bands, height, width) with more than {max(s.bands)} bands, and a date for each"
            )
        pixels[s.name] = _tensor(_without_nan(_middle(array, centre)[:, list(s.bands)]))
        dates[s.name] = _tensor(tile.dates[s.source])
    if not pixels:
        wanted = ", ".join(dict.fromkeys(s.source for s in sensors))
        raise DatasetError(
            f"tile {tile.key}: has {', '.join(tile.arrays) or 'nothing'}, the model reads {wanted}"
        )
    return Batch(
        dataset=dataset,
        pixels=pixels,
        dates=dates,
        ref_date=_tensor(tile.ref_date),
        noise={},
        targets={},
        keys=(tile.key,),
        tiles=(tile.key,),
    )


def _middle(array: np.ndarray, share: float) -> np.ndarray:
    size = array.shape[-1]
    side = max(round(size * share), 1)
    start = (size - side) // 2
    return array[..., start : start + side, start : start + side]


def _without_nan(series: np.ndarray) -> np.ndarray:
    filled, _ = fill_nan(series, np.arange(len(series)), lambda: series)
    return filled


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None]
