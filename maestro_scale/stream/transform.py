"""Transforms a stored sample into a row of a batch: crop, dates, flips, masking noise and targets.

Training draws all of them as a pure function of (seed, epoch, sample); evaluation draws nothing. Each sensor has its
own random stream, keyed by its name, so that adding or removing another sensor does not change its numbers. The number
and order of draws within a stream must never change, or resumed runs and replayed batches differ.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from weakref import WeakKeyDictionary

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.shards.format.fields import REF_DATE, REF_DATE_LAYOUT, target_field, target_layout
from maestro_scale.stream import dates
from maestro_scale.stream.crops import Crop, CropGrid
from maestro_scale.stream.orientation import ORIENTATIONS
from maestro_scale.stream.packing import Arrays, Field
from maestro_scale.stream.rng import CounterRNG, Purpose, scaled, uniforms
from maestro_scale.stream.sensor_transform import SensorTransform
from maestro_scale.stream.stored_sample import StoredSample, check_field, check_modality

_COMMON = 0  # random stream of crop and orientation, which all sensors share; stream_id never returns 0


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
            SensorTransform(spec, s, self.grid, first_date) for s in spec.sensors if s.name not in absent
        ]
        self._targets = [
            (Field("targets", t.name, *_batch_layout(t, spec, self.grid)), t) for t in spec.targets
        ]
        self._ref_date = Field("ref_date", "", (3,), "int16")
        self._rng = CounterRNG(seed, Purpose.SAMPLE, dataset)
        # By layout of the sample: the dates that it has for each sensor. Most samples have the layout of another one.
        self._checked: WeakKeyDictionary[Hashable, tuple[int, ...]] = WeakKeyDictionary()

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
        num_repeated_dates = self.write_train(sample, epoch, number, out, row)
        self.finish_noise(out, slice(row, row + 1))
        return num_repeated_dates

    def write_train(self, sample: StoredSample, epoch: int, number: int, out: Arrays, row: int) -> int:
        """As :meth:`train`, but the noise is left to :meth:`finish_noise`, once for all rows of a batch."""
        stored = self._stored_dates(sample)
        # The position is (epoch, sample, stream): the same sample draws other numbers in every epoch and virtual copy.
        rng = self._rng.seek(epoch, number, _COMMON)
        first, second, third = rng.words(3).tolist()
        limit = self.grid.num_offsets
        flips = third >> 61 if self.flips else 0  # the three highest bits
        crop = self.grid.at(scaled(first, limit), scaled(second, limit), ORIENTATIONS[flips])
        num_repeated_dates = 0
        for sensor, num_dates in zip(self._sensors, stored, strict=True):
            rng.seek(epoch, number, sensor.stream)
            num_repeated_dates += sensor.write(sample, num_dates, crop, out, row, rng)
            # The noise of the masks is drawn here and travels in the batch: the model draws nothing (invariant 1).
            out[sensor.noise].view(np.uint32)[row] = rng.half_words(sensor.noise.shape[0])
        self._write_targets(sample, crop, out, row)
        return num_repeated_dates

    def finish_noise(self, out: Arrays, rows: slice = slice(None)) -> None:
        """Turn the random words that :meth:`write_train` has put into the noise of ``rows`` into numbers."""
        for sensor in self._sensors:
            noise = out[sensor.noise][rows]
            noise[...] = uniforms(noise.view(np.uint32))

    def evaluate(self, sample: StoredSample, index: int, out: Arrays, row: int) -> int:
        """Write crop ``index`` of ``grid.num_crops``: no flips, dates by the median rule, noise 0.

        Returns and raises as :meth:`train`.
        """
        return self.evaluate_crop(sample, self.grid.tiling(index), out, row)

    def evaluate_crop(self, sample: StoredSample, crop: Crop, out: Arrays, row: int) -> int:
        """As :meth:`evaluate`, of a crop anywhere on the tile."""
        stored = zip(self._sensors, self._stored_dates(sample), strict=True)
        num_repeated_dates = sum(s.write(sample, num_dates, crop, out, row, None) for s, num_dates in stored)
        for sensor in self._sensors:
            out[sensor.noise][row] = 0
        self._write_targets(sample, crop, out, row)
        return num_repeated_dates

    def _stored_dates(self, sample: StoredSample) -> tuple[int, ...]:
        """Of each sensor, the dates that a sample has. CodecError unless its fields are as the spec says."""
        stored = self._checked.get(sample.layout)
        if stored is None:
            check_field(sample, REF_DATE, REF_DATE_LAYOUT)
            stored = tuple(check_modality(sample, s.modality) for s in self._sensors)
            for _, target in self._targets:
                for read in (target, *(() if target.of is None else (self.spec.target(target.of),))):
                    check_field(sample, target_field(read.name), target_layout(read, self.spec))
            self._checked[sample.layout] = stored
        return stored

    def _write_targets(self, sample: StoredSample, crop: Crop, out: Arrays, row: int) -> None:
        out[self._ref_date][row] = sample.array(REF_DATE)
        for field, target in self._targets:
            name = target_field(target.name)
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
        classes = self._map(sample, source, crop)
        counts = np.bincount(classes.reshape(-1), minlength=256)
        return counts[[source.classes.index(c) for c in target.classes]] / np.float32(classes.size)


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
