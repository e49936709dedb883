"""What windows are read from: the interface of sources, and the tiles of shards and raw datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from maestro_scale.datasets.scenes.cells import CellRuns
from maestro_scale.datasets.scenes.grid import Cell
from maestro_scale.datasets.spec import NODATA, DatasetSpec, GeoOrigin, RawDataset
from maestro_scale.datasets.values import is_nodata
from maestro_scale.inference.errors import InferenceError
from maestro_scale.inference.windows import Area, starts
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.shards.format.fields import dates_field, mask_field
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.source import OpenShards
from maestro_scale.stream.source import Source as Shards
from maestro_scale.stream.tile import crops_batch

_SHARDS_OPEN_BYTES = 2**30


@dataclass(frozen=True)
class Piece:
    """Some windows of an area, of one set of sensors.

    ``numbers``: of the windows; ``batch``: what the model is given. ``invalid``: per window, (n, n) bool where nothing
    was measured, at the pixels of the reference raster; None for nowhere. ``origin``: of the upper left corner of the
    area's pixel (0, 0). ``days``: per window, the first and the last day of its images, (year, day of the year).
    """

    numbers: tuple[int, ...]
    batch: Batch
    invalid: tuple[np.ndarray | None, ...]
    origin: GeoOrigin | None
    days: tuple[tuple[int, int], tuple[int, int]]


class Source(Protocol):
    """The areas that are mapped, and their windows. ``notes``: for the user, on what is not mapped."""

    spec: DatasetSpec
    notes: tuple[str, ...]

    @property
    def areas(self) -> Sequence[Area]: ...

    def read(self, area: int, numbers: np.ndarray, batch_size: int) -> Iterator[Piece]:
        """These windows of an area, each once, in an order that depends on the arguments alone; those without valid
        data may be missing."""
        ...

    def origin(self, area: int) -> GeoOrigin | None:
        """Where pixel (0, 0) of an area lies."""
        ...

    def digest(self) -> str:
        """SHA-256 of what is read: places, windows, names and sizes of files, not of values."""
        ...


@dataclass(frozen=True)
class Layout:
    """Pixels of the map, and the distance from window to window, in metres."""

    resolution_m: float
    stride_m: float


class TileSource:
    """Tiles of which each is a map of its own, with windows that lie within it.

    ``read_sample``: a stored tile by its number. ``offset``: moves all windows but the outermost, in strides.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        spec: DatasetSpec,
        keys: Sequence[str],
        read_sample: Callable[[int], Sample],
        layout: Layout,
        offset: float = 0.0,
    ) -> None:
        self.spec, self._sample = spec, read_sample
        self._grid = grid = CropGrid(spec)
        step_m, pixel_m = grid.step_m, layout.resolution_m
        stride = max(round(layout.stride_m / step_m), 1)
        num_steps = grid.num_offsets - 1  # of the last window
        whole = max(round(spec.crop_m / step_m), 1)
        along = [
            s * step_m
            for s in starts(num_steps + whole, whole, stride, round(offset * stride))
            if s <= num_steps
        ]
        self._crops = [Crop(row_m, column_m) for row_m in along for column_m in along]
        windows = CellRuns.rectangle(len(along), len(along))
        pixels = np.array([round(m / pixel_m) for m in along], np.int64)
        extent_m = min(spec.tile_m, along[-1] + spec.crop_m)
        size, side = round(extent_m / pixel_m), max(round(spec.crop_m / pixel_m), 1)
        self.areas = [
            Area(key, size, size, pixel_m, windows, Cell(0, 0), pixels, pixels, side) for key in keys
        ]

    def read(self, area: int, numbers: np.ndarray, batch_size: int) -> Iterator[Piece]:
        """As of Source."""
        sample = self._sample(area)
        for first in range(0, len(numbers), batch_size):
            part = numbers[first : first + batch_size].tolist()
            piece = read_piece(sample, self.spec, part, [self._crops[n] for n in part], sample.origin)
            if piece is not None:
                yield piece

    def origin(self, area: int) -> GeoOrigin | None:
        """As of Source."""
        return self._sample(area).origin

    def digest(self) -> str:
        """As of Source."""
        sha = hashlib.sha256(repr(self._crops).encode())
        for area in self.areas:
            sha.update(f"{area.name}\n".encode(errors="surrogatepass"))
        return sha.hexdigest()


def from_shards(
    spec: DatasetSpec,
    manifest: Manifest,
    store: Store,
    splits: Sequence[str],
    layout: Layout,
    offset: float = 0.0,
) -> TileSource:
    """The tiles of splits in shards; ``spec``: with the sensors of the model."""
    source = Shards(spec, tuple(manifest.shards_of(list(splits))), store)
    opened = OpenShards(source, min(store.cache_bytes // 2, _SHARDS_OPEN_BYTES))
    keys = [key for shard in source.shards for key in store.read_keys(shard)]
    return TileSource(spec, keys, lambda number: opened.sample(*opened.locate(number)), layout, offset)


def from_raw(spec: DatasetSpec, dataset: RawDataset, layout: Layout, offset: float = 0.0) -> TileSource:
    """The tiles of a raw dataset."""
    keys = dataset.keys()

    def read(number: int) -> Sample:
        return Sample(encode(replace(dataset.read(keys[number]), targets={})))

    return TileSource(spec, keys, read, layout, offset)


def read_piece(
    sample: Sample, spec: DatasetSpec, numbers: Sequence[int], crops: Sequence[Crop], origin: GeoOrigin | None
) -> Piece | None:
    """Crops of a stored tile, of the sensors that it has, without those where nothing was measured; None: all are.
    InferenceError where the tile has none of the sensors."""
    fitted = _fitted(sample, spec)
    found = [(n, crop, _invalid(sample, fitted, crop)) for n, crop in zip(numbers, crops, strict=True)]
    found = [(n, crop, invalid) for n, crop, invalid in found if invalid is None or not invalid.all()]
    if not found:
        return None
    return Piece(
        tuple(n for n, _, _ in found),
        crops_batch(sample, fitted, [crop for _, crop, _ in found]),
        tuple(invalid for _, _, invalid in found),
        origin,
        _days(sample, fitted),
    )


def _fitted(sample: Sample, spec: DatasetSpec) -> DatasetSpec:
    sensors = tuple(s for s in spec.sensors if s.source in sample.names)
    if not sensors:
        wanted = ", ".join(dict.fromkeys(s.source for s in spec.sensors))
        raise InferenceError(f"tile {sample.key}: has none of {wanted}, which the model reads")
    names = {s.source for s in sensors}
    modalities = []
    for m in spec.modalities:
        if m.name in names:
            masks = m.mask_bands if mask_field(m.name) in sample.names else ()
            modalities.append(replace(m, mask_bands=masks))
    return replace(spec, modalities=tuple(modalities), sensors=sensors)


def _invalid(sample: Sample, spec: DatasetSpec, crop: Crop) -> np.ndarray | None:
    """(n, n) bool where the reference raster, or the first that says, has no valid value on any date."""
    reference = next((s.source for s in spec.sensors if s.name == spec.ref_sensor), None)
    ordered = sorted(spec.modalities, key=lambda m: m.name != reference)
    modality = next((m for m in ordered if NODATA in m.mask_bands), None)
    if modality is None:
        return None
    window = CropGrid(spec).window(crop, modality.resolution_m, modality.size)
    try:
        marks = sample.array(mask_field(modality.name), window)[:, modality.mask_bands.index(NODATA)]
    except CodecError as error:
        raise InferenceError(f"tile {sample.key}: {error}") from None
    invalid: np.ndarray = np.asarray(is_nodata(marks).all(axis=0))
    return invalid if invalid.any() else None


def _days(sample: Sample, spec: DatasetSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    found = [
        (int(year), int(day))
        for m in spec.modalities
        for year, day, _ in sample.array(dates_field(m.name)).tolist()
    ]
    return min(found), max(found)
