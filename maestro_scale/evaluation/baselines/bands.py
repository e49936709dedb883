"""Bands of sensors as encoders of other libraries name them, and the statistics of their values.

Optical bands have the names of Sentinel-2: R, G, B and NIR of images are B4, B3, B2 and B8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.evaluation.baselines.protocol import SensorInput
from maestro_scale.evaluation.results import EvaluationError

Statistics = Mapping[str, tuple[float, float]]
"""Mean and standard deviation by band, in the unit of the pixels."""

Reads = Mapping[str, tuple[str, ...] | None]
"""The bands that a model reads of each instrument, in its order; None: any bands of known wavelength."""

RADAR = ("VV", "VH")
RGB = ("B4", "B3", "B2")
SENTINEL_2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
SENTINEL_2_L2A = tuple(b for b in SENTINEL_2 if b != "B10")
_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sentinel-1": {b: b for b in RADAR},
        "sentinel-2": {b: b for b in SENTINEL_2},
        "image": {"B": "B2", "G": "B3", "R": "B4", "NIR": "B8"},
        # Landsat 8 and 9; the narrow NIR of Landsat is at the wavelengths of B8A.
        "landsat": {"B1": "B1", "B2": "B2", "B3": "B3", "B4": "B4", "B5": "B8A", "B6": "B11", "B7": "B12"},
    }
)
# Bands of fixed lists that archives often leave out, and the nearest one by wavelength.
NEAREST: Mapping[str, str] = MappingProxyType({"B1": "B2", "B9": "B8A"})
ZERO = ("B10",)  # cirrus: the surface reflects nothing at its wavelength


def scaled(
    divisor: float, mean: Sequence[float], deviation: Sequence[float], bands: Sequence[str]
) -> Statistics:
    """Statistics of values that were stored times ``divisor``."""
    pairs = zip(bands, mean, deviation, strict=True)
    return MappingProxyType({b: (m / divisor, d / divisor) for b, m, d in pairs})


# TerraMesh (terratorch 1.2.11, terramind_register.py, v1_pretraining_mean and v1_pretraining_std): Sentinel-2 L2A,
# Sentinel-1 GRD; and 8-bit aerial images (v1_5_pretraining_mean, naip@512).
TERRAMESH_REFLECTANCE = scaled(
    1e4,
    (
        1390.458,
        1503.317,
        1718.197,
        1853.91,
        2199.1,
        2779.975,
        2987.011,
        3083.234,
        3132.22,
        3162.988,
        2424.884,
        1857.648,
    ),
    (
        2106.761,
        2141.107,
        2038.973,
        2134.138,
        2085.321,
        1889.926,
        1820.257,
        1871.918,
        1753.829,
        1797.379,
        1434.261,
        1334.311,
    ),
    SENTINEL_2_L2A,
)
TERRAMESH_RADAR = scaled(1, (-12.599, -20.293), (5.195, 5.890), RADAR)
NAIP = scaled(255, (107.203, 112.385, 93.290, 133.817), (47.338, 39.109, 34.851, 47.326), (*RGB, "B8"))
COMMON: Mapping[str, Statistics] = MappingProxyType(
    {"reflectance": TERRAMESH_REFLECTANCE, "dB": TERRAMESH_RADAR, "brightness": NAIP}
)
"""By unit: for models whose authors publish no statistics, or those of data in other units."""


@dataclass(frozen=True)
class Reading:
    """How a model reads a sensor. ``bands``: in the order of the model; ``channels``: their indices in the sensor's
    pixels, None where the value is 0. ``unit``: of the pixels. ``replaced``: for messages, which bands are not those
    of the sensor, in brackets."""

    sensor: SensorInput
    bands: tuple[str, ...]
    channels: tuple[int | None, ...]
    unit: str
    replaced: str = ""

    @property
    def is_radar(self) -> bool:
        """Whether the bands are polarisations."""
        return self.sensor.instrument == "sentinel-1"

    @property
    def orbit(self) -> str:
        """``ascending``, ``descending``, or empty where the name of the sensor does not tell."""
        parts = self.sensor.name.split("_")
        return next((o for o in ("ascending", "descending") if o[:3] in parts), "")

    def pixel_m(self, side: int) -> float:
        """Ground extent in metres of a pixel of an image that was resized to ``side`` pixels."""
        return self.sensor.resolution_m * self.sensor.size / side

    @property
    def wavelengths_nm(self) -> tuple[float, ...]:
        """Of optical bands that are not filled."""
        found = (self.sensor.wavelengths_nm[c] for c in self.channels if c is not None)
        return tuple(w for w in found if w is not None)


def find_readings(
    sensors: Mapping[str, SensorInput], reads: Reads, units: Mapping[str, Statistics], subset: bool
) -> tuple[list[Reading], list[str]]:
    """(how a model reads each sensor that it can read, why it does not read the others).

    ``units``: statistics by unit of pixels. ``subset``: the model accepts a part of its bands; otherwise bands of
    ``NEAREST`` are replaced, ``ZERO`` filled, and any other missing one excludes the sensor. EvaluationError where no
    sensor is left: it names the missing bands.
    """
    readings, excluded = [], []
    for sensor in sensors.values():
        found = _reading(sensor, reads, units, subset)
        if isinstance(found, Reading):
            readings.append(found)
        else:
            excluded.append(f"{sensor.name} {found}")
    if not readings:
        raise EvaluationError(f"it can read no sensor of the dataset: {'; '.join(excluded)}")
    return readings, excluded


def _reading(
    sensor: SensorInput, reads: Reads, units: Mapping[str, Statistics], subset: bool
) -> Reading | str:
    """The reading of a sensor, or why there is none."""
    names = _NAMES.get(sensor.instrument, {})
    index = {names[b]: i for i, b in enumerate(sensor.bands) if b in names}
    is_read = sensor.instrument in reads
    # For the message: an image may lack some of the bands that the model reads of Sentinel-2.
    alike = "sentinel-2" if sensor.instrument == "image" else sensor.instrument
    wanted = reads.get(sensor.instrument if is_read else alike)
    bands = tuple(index) if wanted is None else wanted
    if subset:
        bands = tuple(b for b in bands if b in index)
    at = {b: index.get(b, index.get(NEAREST.get(b, ""))) for b in bands}
    missing = [b for b, i in at.items() if i is None and b not in ZERO]
    if missing:
        return f"({sensor.instrument}) lacks {', '.join(missing)}"
    if not is_read:
        return f"({sensor.instrument}) is not read by it"
    if not bands:
        return f"({sensor.instrument}) lacks {', '.join(wanted or ('bands of known wavelength',))}"
    unit = next(sensor.units[i] for i in at.values() if i is not None)
    if unit not in units:
        return f"has values in {unit}, and the statistics of the model are for {' and '.join(units)}"
    notes = [f"{b} is {0 if i is None else NEAREST[b]}" for b, i in at.items() if b not in index]
    replaced = f" ({', '.join(notes)})" if notes else ""
    return Reading(sensor, bands, tuple(at.values()), unit, replaced)


def model_input(reading: Reading, pixels: Tensor, statistics: Statistics, side: int) -> Tensor:
    """(B, D, C, H, W) in the unit of the reading -> (B, D, bands, side, side): standardised, resized by bicubic
    interpolation."""
    x = pixels[:, :, [c or 0 for c in reading.channels]]
    # Tables are of fp32, like the pixels.
    table = torch.tensor([statistics.get(b, (0.0, 1.0)) for b in reading.bands], device=x.device)
    x = (x - table[:, 0, None, None]) / table[:, 1, None, None]
    x = x * torch.tensor([c is not None for c in reading.channels], device=x.device)[:, None, None]
    images = F.interpolate(x.flatten(0, 1), size=(side, side), mode="bicubic", antialias=True)
    return images.unflatten(0, x.shape[:2])
