"""The evidence of the kinds of sensors about a crop: optical series, radar series, image of highest resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import zoom

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.datasets.synthetic.classes import Variant
from maestro_scale.datasets.synthetic.vegetation import BAND_NM
from maestro_scale.evaluation.oracle.evidence import (
    Evidence,
    optical_evidence,
    photo_evidence,
    radar_evidence,
)
from maestro_scale.evaluation.oracle.simulation import SceneKind, decibels
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.stream.batch import Batch

KINDS = ("optical", "radar", "image")
_CELL_M = 10.0
_REFLECTANCE, _BRIGHTNESS = 10_000, 255  # stored values of a reflectance, and of a brightness, of 1
_RADAR = ("VV", "VH")


@dataclass(frozen=True)
class SensorKinds:
    """The sensors of a dataset by kind; None, or empty, where it has none of the kind."""

    spec: DatasetSpec
    optical: Sensor | None
    radar: tuple[Sensor, ...]
    image: Sensor | None

    @classmethod
    def of(cls, spec: DatasetSpec) -> SensorKinds:
        """Those in use of a dataset. EvaluationError if scenes contain none of them."""
        series = [s for s in spec.sensors if spec.modality(s.source).series]
        optical = [s for s in series if set(_bands(spec, s)) <= set(BAND_NM)]
        radar = [s for s in series if _bands(spec, s) == _RADAR]
        images = [s for s in spec.sensors if s not in series and {"R", "G", "B"} <= set(_bands(spec, s))]
        found = cls(
            spec,
            optical[0] if optical else None,
            tuple(radar),
            min(images, key=lambda s: spec.modality(s.source).resolution_m, default=None),
        )
        if not found.kinds:
            raise EvaluationError(
                f"{spec.name}: the oracle needs an optical or radar series or an image, which are not among the sensors"
            )
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of :data:`KINDS` that there are."""
        return tuple(kind for kind, s in zip(KINDS, (self.optical, self.radar, self.image), strict=True) if s)

    def evidence(
        self, batch: Batch, row: int, kind: SceneKind, variants: Sequence[Variant], crop_m: float
    ) -> Mapping[str, Evidence]:
        """By kind, about the cells of 10 m of one crop; a kind that measured nothing there is left out."""
        cells = round(crop_m / _CELL_M)
        found: dict[str, Evidence | None] = {}
        if self.optical is not None:
            values = batch.pixels[self.optical.name][row].numpy().astype(np.float64) / _REFLECTANCE
            days = batch.dates[self.optical.name][row, :, 1].numpy()
            bands = _bands(self.spec, self.optical)
            found["optical"] = optical_evidence(
                values, days, bands, self._resolution(self.optical), kind, variants
            )
        if self.radar:
            orbits = [self._orbit(batch, row, sensor) for sensor in self.radar]
            found["radar"] = radar_evidence(orbits, self._resolution(self.radar[0]), kind, variants)
        if self.image is not None:
            image = self.picture(batch, row) / _BRIGHTNESS
            day = int(batch.dates[self.image.name][row, 0, 1])
            bands, cell = _bands(self.spec, self.image), image.shape[-1] // cells
            found["image"] = photo_evidence(
                image, day, bands, self._resolution(self.image), cell, kind, variants
            )
        return {name: _on_cells(e, cells) for name, e in found.items() if e is not None}

    def picture(self, batch: Batch, row: int) -> np.ndarray:
        """(C, H, W) stored values of the image of a crop."""
        assert self.image is not None  # only asked for where ``kinds`` has it
        return batch.pixels[self.image.name][row, 0].numpy().astype(np.float32)

    def _resolution(self, sensor: Sensor) -> float:
        return self.spec.modality(sensor.source).resolution_m

    def _orbit(self, batch: Batch, row: int, sensor: Sensor) -> tuple[str, np.ndarray, np.ndarray]:
        values = batch.pixels[sensor.name][row].numpy().astype(np.float64)
        if sensor.scale.kind == "log":  # linear power; otherwise the dataset stores decibels
            values = np.where(np.isfinite(values), decibels(values), np.nan)
        return "des" if "des" in sensor.source else "asc", values, batch.dates[sensor.name][row, :, 1].numpy()


def _bands(spec: DatasetSpec, sensor: Sensor) -> tuple[str, ...]:
    bands = spec.modality(sensor.source).bands
    return tuple(bands[b] for b in sensor.bands)


def _on_cells(evidence: Evidence, cells: int) -> Evidence:
    """On a grid that all kinds share: the nearest cell of the sensor's own."""
    factor = cells / evidence.logs.shape[-1]
    if factor == 1:
        return evidence
    logs = zoom(evidence.logs, (1, factor, factor), order=0, mode="nearest", grid_mode=True)
    return Evidence(logs, evidence.misfit)
