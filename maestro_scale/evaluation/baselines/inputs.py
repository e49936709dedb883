"""The inputs of external encoders: what a sensor measures, by the names of its bands, and pixels in physical units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor
from maestro_scale.evaluation.baselines.protocol import Images, SensorInput
from maestro_scale.model.embed import network_input
from maestro_scale.stream.batch import Batch

# Central wavelengths in nm. Sentinel-2A: sentiwiki.copernicus.eu/web/s2-mission; Landsat 8 and 9:
# usgs.gov/faqs/what-are-best-landsat-spectral-bands-use-my-research.
_SENTINEL_2 = {
    "B1": 443.0,
    "B2": 492.0,
    "B3": 560.0,
    "B4": 665.0,
    "B5": 704.0,
    "B6": 741.0,
    "B7": 783.0,
    "B8": 833.0,
    "B8A": 865.0,
    "B9": 945.0,
    "B10": 1374.0,
    "B11": 1614.0,
    "B12": 2202.0,
}
_LANDSAT = {
    "B1": 443.0,
    "B2": 482.0,
    "B3": 561.0,
    "B4": 655.0,
    "B5": 865.0,
    "B6": 1609.0,
    "B7": 2201.0,
    "B8": 590.0,
    "B9": 1373.0,
    "B10": 10895.0,
    "B11": 12005.0,
}
# Colours of aerial and SPOT images: the middle of the usual filters.
_COLOURS = {"B": 485.0, "G": 560.0, "R": 660.0, "NIR": 830.0, "PAN": 600.0}
_RADAR = ("VV", "VH", "HH", "HV", "VV-VH")
_ELEVATION = ("DSM", "DTM", "DEM", "elevation", "slope", "aspect")
_UNITS = {
    "DSM": "m",
    "DTM": "m",
    "DEM": "m",
    "elevation": "m",
    "slope": "degrees",
    "aspect": "degrees",
    "NDVI": "1",
    "temperature_2m": "K",
    "total_precipitation": "m",
}
_STORED_REFLECTANCE = 1e4  # reflectance of 1 in 16-bit products of Sentinel-2, Landsat and SPOT
_RAW = Scale("linear", 1.0)


def sensor_inputs(spec: DatasetSpec) -> dict[str, SensorInput]:
    """The sensors of a resolved spec as external encoders receive them, by name."""
    return {s.name: _sensor_input(spec, s) for s in spec.sensors}


class PhysicalUnits:
    """Converts batches of a dataset to ``Images``: raw values to physical units, resized as the recipe says."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.sensors = sensor_inputs(spec)
        # The raw values are converted here, so the sensor's own scaling and elevation difference are left out.
        self._raw = [dataclasses.replace(s, scale=_RAW, elevation=False) for s in spec.sensors]
        self._factors = {s.name: _factors(spec.modality(s.source), s) for s in spec.sensors}
        self._linear_power = {
            s.name: torch.tensor([b in _RADAR and s.scale.kind == "log" for b in self.sensors[s.name].bands])
            for s in spec.sensors
        }

    def convert(self, batch: Batch, latlon: Tensor) -> Images:
        """The images of a batch; ``latlon`` as of ``Images``."""
        return Images({s.name: self._pixels(s, batch.pixels[s.name]) for s in self._raw}, batch.dates, latlon)

    def _pixels(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, C, H, W) raw -> float32 in physical units."""
        x = network_input(sensor, pixels)
        x = x * self._factors[sensor.name].to(x.device)[:, None, None]
        power = self._linear_power[sensor.name]
        if power.any():
            decibels = 10 * x.clamp_min(1e-10).log10()
            x = torch.where(power.to(x.device)[:, None, None], decibels, x)
        return x


def _sensor_input(spec: DatasetSpec, sensor: Sensor) -> SensorInput:
    modality = spec.modality(sensor.source)
    bands = tuple(modality.bands[b] for b in sensor.bands)
    instrument = _instrument(modality)
    wavelengths: Mapping[str, float] = {
        **_COLOURS,
        **(_LANDSAT if instrument == "landsat" else _SENTINEL_2),
    }
    return SensorInput(
        name=sensor.name,
        instrument=instrument,
        bands=bands,
        wavelengths_nm=tuple(wavelengths.get(b) for b in bands),
        units=tuple(_unit(modality, b) for b in bands),
        resolution_m=spec.crop_m / sensor.image_size,
        size=sensor.image_size,
        grid=sensor.grid,
        num_dates=sensor.num_dates,
    )


def _instrument(modality: Modality) -> str:
    """By the names of the modality and its bands: a manifest does not name the instrument."""
    bands = set(modality.bands)
    if modality.name.startswith("landsat"):
        return "landsat"
    for instrument, known in (
        ("sentinel-1", _RADAR),
        ("sentinel-2", tuple(_SENTINEL_2)),
        ("elevation", _ELEVATION),
        ("image", tuple(_COLOURS)),
    ):
        if bands <= set(known):
            return instrument
    return "other"


def _unit(modality: Modality, band: str) -> str:
    if band in _RADAR:
        return "dB"
    if band in _UNITS:
        return _UNITS[band]
    if band in _SENTINEL_2 or band in _COLOURS:  # Landsat's names are among them
        return "brightness" if modality.dtype == "uint8" else "reflectance"
    return "raw"


def _factors(modality: Modality, sensor: Sensor) -> Tensor:
    """(C,): raw values times these are in the units of ``_unit`` (before decibels)."""
    # Floating point reflectance is stored from 0 to 1, or as the integers of the product; the sensor's scale, which
    # maps it to about 1, tells which.
    integers = np.dtype(modality.dtype).kind in "iu" or sensor.scale.divisor >= 100
    factors = {
        "reflectance": 1 / _STORED_REFLECTANCE if integers else 1.0,
        "brightness": 1 / 255,
    }
    return torch.tensor([factors.get(_unit(modality, modality.bands[b]), 1.0) for b in sensor.bands])
