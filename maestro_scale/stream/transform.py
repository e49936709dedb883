"""Transforms a stored sample into a row of a batch: crop, dates, flips, masking noise and targets.

Training draws all of them as a pure function of (seed, epoch, sample); evaluation draws nothing. Each sensor has its
own random stream, keyed by its name, so that adding or removing another sensor does not change its numbers. The number
and order of draws within a stream must never change, or resumed runs and replayed batches differ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Sensor, Target
from maestro_scale.datasets.spec_check import source_problems
from maestro_scale.datasets.values import is_nodata
from maestro_scale.errors import dotted
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.compress import Window
from maestro_scale.shards.format.fields import (
    REF_DATE,
    REF_DATE_LAYOUT,
    Layout,
    dates_field,
    dates_layout,
    mask_field,
    mask_layout,
    modality_layout,
    stored_dates,
    target_field,
    target_layout,
)
from maestro_scale.stream import dates
from maestro_scale.stream.batch import num_noise
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.orientation import Orientation
from maestro_scale.stream.packing import Arrays, Field, check_dtype
from maestro_scale.stream.rng import CounterRNG, Purpose, stream_id

_COMMON = 0  # random stream of crop and orientation, which all sensors share; stream_id never returns 0


class StoredSample(Protocol):
    """The access to a sample that transforms need (implemented by shards.format.codec.Sample)."""

    key: str

    def array(self, name: str, window: Window | None = None) -> np.ndarray:
        """A field, or a window of its last two axes."""
        ...

    def rows(self, name: str, indices: np.ndarray, window: Window | None = None) -> np.ndarray:
        """Entries of a field's first axis, or a window of each; the others are not decoded."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a field."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a field."""
        ...


class Transform:
    """Writes transformed samples of one dataset into the rows of a batch's arrays.

    ``spec``: resolved, so that its sensors and crop are those of the run; ``dataset``: its index in the mixture;
    ``flips``: whether training flips and transposes samples; ``first_date``: as in ``dates.draw``; ``absent``: sensors
    of ``spec`` that the samples lack. ValueError if a sensor or the crop does not fit.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        seed: int = 0,
        dataset: int = 0,
        flips: bool = True,
        first_date: dates.FirstDate = "any",
        absent: Collection[str] = (),
    ) -> None:
        self.spec, self.flips = spec, flips
        # Of all sensors: tiles that lack the coarsest one have the same crops as the others.
        self.grid = CropGrid(spec)
        self._sensors = [
            _SensorTransform(spec, s, self.grid, first_date) for s in spec.sensors if s.name not in absent
        ]
        self._targets = [
            (Field("targets", t.name, *_batch_layout(t, spec, self.grid)), t) for t in spec.targets
        ]
        self._ref_date = Field("ref_date", "", (3,), "int16")
        self._rng = CounterRNG(seed, Purpose.SAMPLE, dataset)

    @property
    def fields(self) -> tuple[Field, ...]:
        """Layout of a sample in a batch."""
        per_sensor = [f for s in self._sensors for f in s.fields]
        return (*per_sensor, self._ref_date, *(f for f, _ in self._targets))

    def train(self, sample: StoredSample, epoch: int, number: int, out: Arrays, row: int) -> int:
        """Write sample ``number`` of the dataset with the random numbers of ``epoch`` into ``row`` of every array.

        Returns how many dates were repeated or imputed; CodecError if the sample does not match the spec.
        Order of draws: crop row, crop column, the three symmetries; then per sensor the dates and the noise.
        """
        # The position is (epoch, sample, stream): the same sample draws other numbers in every epoch and virtual copy.
        rng = self._rng.seek(epoch, number, _COMMON)
        row_offset, column_offset = rng.below(self.grid.num_offsets), rng.below(self.grid.num_offsets)
        flips = int(rng.words(1)[0]) >> 61 if self.flips else 0  # the three highest bits
        orientation = Orientation(bool(flips & 1), bool(flips & 2), bool(flips & 4))
        crop = self.grid.at(row_offset, column_offset, orientation)
        num_repeated_dates = 0
        for sensor in self._sensors:
            rng.seek(epoch, number, sensor.stream)
            num_repeated_dates += sensor.write(sample, crop, out, row, rng)
            # The noise of the masks is drawn here and travels in the batch: the model draws nothing (invariant 1).
            out[sensor.noise][row] = rng.uniforms(sensor.noise.shape[0])
        self._write_targets(sample, crop, out, row)
        return num_repeated_dates

    def evaluate(self, sample: StoredSample, index: int, out: Arrays, row: int) -> int:
        """Write crop ``index`` of ``grid.num_crops``: no flips, dates by the median rule, noise 0.

        Returns and raises as :meth:`train`.
        """
        return self.evaluate_crop(sample, self.grid.tiling(index), out, row)

    def evaluate_crop(self, sample: StoredSample, crop: Crop, out: Arrays, row: int) -> int:
        """As :meth:`evaluate`, of a crop anywhere on the tile."""
        num_repeated_dates = sum(sensor.write(sample, crop, out, row, None) for sensor in self._sensors)
        for sensor in self._sensors:
            out[sensor.noise][row] = 0
        self._write_targets(sample, crop, out, row)
        return num_repeated_dates

    def _write_targets(self, sample: StoredSample, crop: Crop, out: Arrays, row: int) -> None:
        _check(sample, REF_DATE, REF_DATE_LAYOUT)
        out[self._ref_date][row] = sample.array(REF_DATE)
        for field, target in self._targets:
            name = target_field(target.name)
            _check(sample, name, target_layout(target, self.spec))
            if target.is_map:
                crop.orientation.write(self._map(sample, target, crop), out[field][row])
                continue
            if target.of is None:
                values = sample.array(name)
            else:
                # Recounted per crop: the stored shares are those of the whole tile.
                values = self._class_shares(sample, target, self.spec.target(target.of), crop)
            out[field][row] = values

    def _map(self, sample: StoredSample, target: Target, crop: Crop) -> np.ndarray:
        """(side, side), before the orientation."""
        (size, _), _ = target_layout(target, self.spec)
        window = self.grid.window(crop, _resolution_m(target, self.spec), size)
        return sample.array(target_field(target.name), window)

    def _class_shares(self, sample: StoredSample, target: Target, source: Target, crop: Crop) -> np.ndarray:
        """(classes,) float32: share of the crop that each class covers in the segmentation ``source``."""
        _check(sample, target_field(source.name), target_layout(source, self.spec))
        classes = self._map(sample, source, crop)
        counts = np.bincount(classes.reshape(-1), minlength=256)
        return counts[[source.classes.index(c) for c in target.classes]] / np.float32(classes.size)


class _SensorTransform:
    """The part of a Transform that concerns one sensor."""

    def __init__(
        self, spec: DatasetSpec, sensor: Sensor, grid: CropGrid, first_date: dates.FirstDate
    ) -> None:
        self._first_date = first_date
        for path, reason in source_problems(sensor, spec.modalities):
            raise ValueError(f"{spec.name}.sensors.{sensor.name}.{dotted(path)}: {reason}")
        self.sensor, self.grid, self.modality = sensor, grid, spec.modality(sensor.source)
        check_dtype(self.modality.dtype, f"{spec.name}: modality {self.modality.name}")
        side = grid.side(self.modality.resolution_m, self.modality.size)
        shape = (sensor.num_dates, len(sensor.bands), side, side)
        self.pixels = Field("pixels", sensor.name, shape, self.modality.dtype)
        self.dates = Field("dates", sensor.name, (sensor.num_dates, 3), "int16")
        self.noise = Field("noise", sensor.name, (num_noise(sensor),), "float32")
        # Only of rasters that store nodata: other batches do not change.
        self.nodata = (
            None
            if self.modality.nodata_band is None
            else Field("nodata", sensor.name, (sensor.num_dates, sensor.grid**2), "bool")
        )
        self._resized = nearest_pixels(side, sensor.image_size)
        self.stream = stream_id(sensor.name)
        self._bands = _band_index(sensor.bands, self.modality)

    @property
    def fields(self) -> tuple[Field, ...]:
        """Layout of the sensor's part of a sample in a batch."""
        return (self.pixels, self.dates, self.noise, *(() if self.nodata is None else (self.nodata,)))

    def write(self, sample: StoredSample, crop: Crop, out: Arrays, row: int, rng: CounterRNG | None) -> int:
        """Write pixels and dates; dates are drawn from ``rng``, or chosen by the median rule without one.

        Returns how many dates were repeated or imputed.
        """
        name, num_dates = self.modality.name, self.sensor.num_dates
        window = self.grid.window(crop, self.modality.resolution_m, self.modality.size)
        usable: np.ndarray | None = None  # dates with a valid pixel; None: all

        def read(indices: np.ndarray) -> np.ndarray:
            return self._select_bands(sample.rows(name, _of(usable, indices), window))

        def whole() -> np.ndarray:
            return self._select_bands(_of(sample.array(name, window), usable))

        # From the header, before anything is decoded: the same checks, in the same order, as those of `verify`.
        stored = _num_stored(sample, self.modality)
        _check(sample, name, modality_layout(self.modality, stored))
        _check(sample, dates_field(name), dates_layout(stored))
        if self.modality.mask_bands:
            _check(sample, mask_field(name), mask_layout(self.modality, stored))
        nodata = self._nodata(sample, window)
        if nodata is not None:
            usable = dates.with_data(nodata)
            nodata = _of(nodata, usable)
            stored = len(nodata)
        if stored <= num_dates:
            # Nothing to choose from: all dates are used, whatever the masks say, and repeated if they are too few.
            chosen = dates.spread_evenly(stored, num_dates)
            pixels = whole() if stored == num_dates else whole()[chosen]
        elif rng is not None:
            marked = self._marked(sample, window, usable)
            if nodata is not None:
                marked = dates.rank(marked, nodata)
            chosen, pixels = dates.draw(stored, num_dates, marked, read, rng, self._first_date)
        else:
            series = whole()
            mask = self._mask(sample, window, usable)
            chosen = dates.nearest_to_median(series, mask, num_dates, self.sensor.mask_threshold, nodata)
            pixels = series[chosen]
        pixels, imputed = dates.fill_nan(pixels, chosen, whole, nodata)
        crop.orientation.write(pixels, out[self.pixels][row])
        out[self.dates][row] = sample.rows(dates_field(name), _of(usable, chosen))
        if self.nodata is not None:
            out[self.nodata][row] = (
                False if nodata is None else self._incomplete_patches(crop.orientation.apply(nodata[chosen]))
            )
        return imputed + max(num_dates - stored, 0)

    def _select_bands(self, pixels: np.ndarray) -> np.ndarray:
        return pixels if self._bands is None else pixels[:, self._bands]

    def _nodata(self, sample: StoredSample, window: Window | None) -> np.ndarray | None:
        """(T, H, W) bool; None if no pixel is invalid."""
        band = self.modality.nodata_band
        if band is None:
            return None
        nodata = is_nodata(sample.array(mask_field(self.modality.name), window)[:, band])
        return nodata if nodata.any() else None

    def _mask(
        self, sample: StoredSample, window: Window | None, usable: np.ndarray | None
    ) -> np.ndarray | None:
        """(T, M, H, W) of the dates ``usable``; None without a mask. With the band of nodata, which weighs more."""
        if not self.modality.mask_bands:
            return None
        return _of(sample.array(mask_field(self.modality.name), window), usable)

    def _incomplete_patches(self, nodata: np.ndarray) -> np.ndarray:
        """(D, H, W) bool → (D, patches): which patches of the network's input have an invalid pixel."""
        grid, patch = self.sensor.grid, self.sensor.patch
        resized = nodata[:, self._resized[:, None], self._resized]
        return resized.reshape(-1, grid, patch, grid, patch).any(axis=(2, 4)).reshape(len(nodata), -1)

    def _marked(
        self, sample: StoredSample, window: Window | None, usable: np.ndarray | None
    ) -> np.ndarray | None:
        mask = self._mask(sample, window, usable)
        return None if mask is None else dates.is_marked(mask, self.sensor.mask_threshold)


def nearest_pixels(old: int, new: int) -> np.ndarray:
    """(new,) indices of the pixels that the network's input takes from an axis of ``old`` pixels (model/embed.py)."""
    if old == new:
        return np.arange(old)
    positions = torch.arange(old, dtype=torch.float32)
    return F.interpolate(positions[None, None], size=new)[0, 0].long().numpy()


def _of(array: np.ndarray | None, indices: np.ndarray | None) -> np.ndarray:
    """The entries at ``indices``; all of them without indices, the indices themselves without an array."""
    if array is None or indices is None:
        found = indices if array is None else array
        assert found is not None
        return found
    return array[indices]


def _band_index(bands: Sequence[int], modality: Modality) -> slice | list[int] | None:
    """Index of the bands of a modality; None for all of them in order."""
    if tuple(bands) == tuple(range(len(modality.bands))):
        return None
    if tuple(bands) == tuple(range(bands[0], bands[-1] + 1)):
        return slice(bands[0], bands[-1] + 1)  # a view instead of a copy
    return list(bands)


def _resolution_m(target: Target, spec: DatasetSpec) -> float:
    if target.resolution_m is None:
        raise ValueError(
            f"{spec.name}: {target.kind} target {target.name} needs resolution_m in the manifest"
        )
    return target.resolution_m


def _batch_layout(target: Target, spec: DatasetSpec, grid: CropGrid) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a target as it is in a batch."""
    if target.kind == "segmentation":
        _resolution_m(target, spec)  # ValueError if it is missing
    shape, dtype = target_layout(target, spec)
    if target.is_map:
        shape = (grid.side(_resolution_m(target, spec), shape[0]),) * 2
    return shape, dtype


def _num_stored(sample: StoredSample, modality: Modality) -> int:
    """Number of dates that the sample has of a modality."""
    try:
        return stored_dates(sample.key, modality, (sample.shape(modality.name), modality.dtype))
    except (DatasetError, KeyError) as error:
        raise CodecError(str(error.args[0])) from None


def _check(sample: StoredSample, field: str, expected: Layout) -> None:
    # Assigning to the batch would silently broadcast or cast an array of another shape or dtype.
    try:
        shape, dtype = sample.shape(field), sample.dtype(field)
    except KeyError as error:
        raise CodecError(str(error.args[0])) from None
    if (shape, dtype) != expected:
        raise CodecError(
            f"sample {sample.key}: {field} is {dtype} {shape}, but by the manifest's spec {expected[1]} "
            f"{expected[0]}"
        )
