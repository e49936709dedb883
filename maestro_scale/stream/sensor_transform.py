"""Transforms one sensor of a stored sample: its dates, bands, crop and nodata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from maestro_scale.datasets.spec import DatasetSpec, Modality, Sensor
from maestro_scale.datasets.spec_check import source_problems
from maestro_scale.datasets.values import is_nodata
from maestro_scale.errors import dotted
from maestro_scale.shards.format.compress import Window
from maestro_scale.shards.format.fields import dates_field, mask_field
from maestro_scale.stream import dates
from maestro_scale.stream.batch import num_noise
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.packing import Arrays, Field, check_dtype
from maestro_scale.stream.rng import CounterRNG, stream_id
from maestro_scale.stream.stored_sample import StoredSample


class SensorTransform:
    """Writes one sensor of samples into the rows of a batch's arrays; the arguments are those of ``Transform``."""

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
        self._dates_name, self._mask_name = dates_field(self.modality.name), mask_field(self.modality.name)
        self._each = np.arange(sensor.num_dates)
        self._nodata_band, self._has_nan = self.modality.nodata_band, "float" in self.modality.dtype
        self._bands = _band_index(sensor.bands, self.modality)

    @property
    def fields(self) -> tuple[Field, ...]:
        """Layout of the sensor's part of a sample in a batch."""
        return (self.pixels, self.dates, self.noise, *(() if self.nodata is None else (self.nodata,)))

    def write(
        self, sample: StoredSample, stored: int, crop: Crop, out: Arrays, row: int, rng: CounterRNG | None
    ) -> int:
        """Write pixels and dates; dates are drawn from ``rng``, or chosen by the median rule without one.

        ``stored``: dates that the sample has (``check_modality``). Returns how many were repeated or imputed.
        """
        name, num_dates = self.modality.name, self.sensor.num_dates
        window = self.grid.window(crop, self.modality.resolution_m, self.modality.size)
        usable: np.ndarray | None = None  # dates with a valid pixel; None: all

        def read(indices: np.ndarray) -> np.ndarray:
            stored_indices = indices if usable is None else usable[indices]
            return self._select_bands(sample.rows(name, stored_indices, window))

        def whole() -> np.ndarray:
            series = sample.array(name, window)
            return self._select_bands(series if usable is None else series[usable])

        nodata = None if self._nodata_band is None else self._nodata(sample, window, self._nodata_band)
        if nodata is not None:
            usable = dates.with_data(nodata)
            nodata = nodata if usable is None else nodata[usable]
            stored = len(nodata)
        if stored == num_dates:
            # Nothing to choose from: all dates are used, whatever the masks say, and repeated if they are too few.
            chosen, pixels = self._each, whole()
        elif stored < num_dates:
            chosen = dates.spread_evenly(stored, num_dates)
            pixels = whole()[chosen]
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
        imputed = 0
        if self._has_nan or nodata is not None:
            pixels, imputed = dates.fill_nan(pixels, chosen, whole, nodata)
        crop.orientation.write(pixels, out[self.pixels][row])
        out[self.dates][row] = sample.rows(self._dates_name, chosen if usable is None else usable[chosen])
        if self.nodata is not None:
            out[self.nodata][row] = (
                False if nodata is None else self._incomplete_patches(crop.orientation.apply(nodata[chosen]))
            )
        return imputed + max(num_dates - stored, 0)

    def _select_bands(self, pixels: np.ndarray) -> np.ndarray:
        return pixels if self._bands is None else pixels[:, self._bands]

    def _nodata(self, sample: StoredSample, window: Window | None, band: int) -> np.ndarray | None:
        """(T, H, W) bool; None if no pixel is invalid."""
        nodata = is_nodata(sample.array(self._mask_name, window)[:, band])
        return nodata if nodata.any() else None

    def _mask(
        self, sample: StoredSample, window: Window | None, usable: np.ndarray | None
    ) -> np.ndarray | None:
        """(T, M, H, W) of the dates ``usable``; None without a mask. With the band of nodata, which weighs more."""
        if not self.modality.mask_bands:
            return None
        mask = sample.array(self._mask_name, window)
        return mask if usable is None else mask[usable]

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


def _band_index(bands: Sequence[int], modality: Modality) -> slice | list[int] | None:
    """Index of the bands of a modality; None for all of them in order."""
    if tuple(bands) == tuple(range(len(modality.bands))):
        return None
    if tuple(bands) == tuple(range(bands[0], bands[-1] + 1)):
        return slice(bands[0], bands[-1] + 1)  # a view instead of a copy
    return list(bands)
