"""One tile as a batch: of all its sensors and dates, without crop; or of its crops, prepared as in evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Sensor, Tile
from maestro_scale.datasets.spec_check import EXTENT_TOLERANCE_M
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.dates import fill_nan
from maestro_scale.stream.packing import BatchMetadata, arrays_in, num_bytes, unpack
from maestro_scale.stream.transform import Transform


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


def fitted_spec(tile: Tile, spec: DatasetSpec) -> DatasetSpec:
    """``spec`` without targets, for the extent and dtypes of ``tile``, and the masks and optional modalities it has.

    DatasetError where the tile lacks what a sensor reads and is not optional, has other bands, or is too small.
    """
    optional = {m.name for m in spec.modalities if m.optional}
    sensors = tuple(s for s in spec.sensors if s.source in tile.arrays or s.source not in optional)
    sources = dict.fromkeys(s.source for s in sensors)
    missing = [name for name in sources if name not in tile.arrays] or ([] if sources else [*optional])
    if missing:
        raise DatasetError(
            f"tile {tile.key}: has {', '.join(tile.arrays) or 'nothing'}, the model also reads {missing[0]}"
        )
    for m in spec.modalities:
        shape = tile.arrays[m.name].shape if m.name in sources else (0, len(m.bands), 1, 1)
        if len(shape) != 4 or shape[1] != len(m.bands) or shape[2] != shape[3]:
            raise DatasetError(
                f"tile {tile.key}: {m.name} is {shape}; the model reads (dates, {len(m.bands)}, size, size): "
                f"{', '.join(m.bands)}"
            )
    modalities = tuple(
        replace(
            m,
            size=tile.arrays[m.name].shape[-1],
            # Values are scaled as floats, so that a tile from a file of another dtype gives the same.
            dtype=tile.arrays[m.name].dtype.name,
            mask_bands=m.mask_bands if m.name in tile.masks else (),
        )
        for m in spec.modalities
        if m.name in sources
    )
    # The finest pixel tells the extent best: those of other sensors may not divide it.
    finest = min(modalities, key=lambda m: m.resolution_m)
    stored = spec.modality(finest.name).size
    tile_m = spec.tile_m if finest.size == stored else finest.size * finest.resolution_m
    if tile_m < spec.crop_m - EXTENT_TOLERANCE_M:
        raise DatasetError(
            f"tile {tile.key}: {finest.name} covers {tile_m:g} m ({finest.size} pixels of {finest.resolution_m:g} m); "
            f"the model reads {spec.crop_m:g} m"
        )
    return replace(spec, modalities=modalities, sensors=sensors, targets=(), tile_m=tile_m)


def evaluation_batch(tile: Tile, spec: DatasetSpec, num_crops: int) -> Batch:
    """The first ``num_crops`` crops of a tile, with the dates, that an evaluation of it stored in shards would give the
    model. ``spec``: resolved, as of ``fitted_spec``.

    DatasetError where the tile does not fit the spec.
    """
    names = {m.name for m in spec.modalities}
    kept = replace(
        tile,
        arrays={n: a for n, a in tile.arrays.items() if n in names},
        dates={n: d for n, d in tile.dates.items() if n in names},
        masks={n: m for n, m in tile.masks.items() if n in names},
        targets={},
    )
    try:
        sample, grid = Sample(encode(kept)), CropGrid(spec)
    except (CodecError, ValueError) as error:
        raise DatasetError(f"tile {tile.key}: {error}") from None
    return crops_batch(sample, spec, [grid.tiling(number) for number in range(num_crops)])


def crops_batch(sample: Sample, spec: DatasetSpec, crops: Sequence[Crop]) -> Batch:
    """Crops anywhere on a stored tile, prepared as in evaluation. ``spec``: resolved, with the sensors that the tile
    has, and no targets. DatasetError where the tile does not fit it."""
    try:
        transform = Transform(spec)
        block = torch.empty(num_bytes(transform.fields, len(crops)), dtype=torch.uint8)
        arrays = arrays_in(block, transform.fields, len(crops))
        repeated = sum(transform.evaluate_crop(sample, crop, arrays, row) for row, crop in enumerate(crops))
    except (CodecError, ValueError) as error:
        raise DatasetError(f"tile {sample.key}: {error}") from None
    keys = tuple(f"eval/{spec.name}/0/{row}" for row in range(len(crops)))
    metadata = BatchMetadata(spec.name, keys, (sample.key,) * len(crops), repeated, 0, (None,) * len(crops))
    return unpack(block, transform.fields, metadata)


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
