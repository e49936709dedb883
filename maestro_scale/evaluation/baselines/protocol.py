"""The protocol of an encoder that is not ours: how it is built, what it receives and what it returns.

Shapes: B samples, D dates, C bands, H×W pixels, R token grids, L = cells of a square grid, E width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.results import EvaluationError

JOINT = "joint"
"""Key of tokens that are computed from several sensors together."""

_FEBRUARY_ENDS = 59  # day of a common year
_MONTH_ENDS = (31, _FEBRUARY_ENDS, 90, 120, 151, 181, 212, 243, 273, 304, 334)


class ExternalEncoder(Protocol):
    """An encoder that is not ours: any ``torch.nn.Module`` with these four members.

    It must not draw random numbers: it stays in eval mode when it is finetuned.
    """

    width: int  # E
    adaptation: str  # how bands, resolution and dates of the dataset are adapted; stored in results

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        """``sensors``: of the benchmark, by name. ``options``: of the command line, see ``parse_options``."""

    def tokens(self, images: Images) -> Mapping[str, Tensor] | Tensor:
        """{sensor: (B, R, L, E)}, any R and any square number L; or one vector per sample, (B, E).

        The numbers are real and floating-point; sensors, R and L are the same for every batch. A sensor that is not
        read is left out; tokens of several sensors together have the key ``JOINT``.
        """


@dataclass(frozen=True)
class SensorInput:
    """A sensor of the benchmark, as an external encoder receives it.

    ``instrument``: ``sentinel-1``, ``sentinel-2``, ``landsat``, ``elevation``, ``image`` (colours, aerial or satellite)
    or ``other``. Per band: its name in the dataset, its central wavelength (None for radar and what is not light), and
    the unit of its values: ``reflectance`` (0 to 1), ``brightness`` (of 8-bit images, 0 to 1), ``dB``, ``m``,
    ``degrees``, ``K``, ``1`` or ``raw`` (unknown: as stored). ``size``: pixels per side, of ``resolution_m`` each,
    after the recipe's resize; ``grid``: cells per side of the sensor's tokens.
    """

    name: str
    instrument: str
    bands: tuple[str, ...]
    wavelengths_nm: tuple[float | None, ...]
    units: tuple[str, ...]
    resolution_m: float
    size: int
    grid: int
    num_dates: int

    def band(self, name: str) -> int:
        """Index of a band. EvaluationError if the sensor does not have it."""
        if name not in self.bands:
            raise EvaluationError(f"sensor {self.name} has no band {name!r}{did_you_mean(name, self.bands)}")
        return self.bands.index(name)


@dataclass(frozen=True)
class Images:
    """A batch as an external encoder receives it.

    ``pixels[sensor]``: (B, D, C, H, W) float32 in the units of the sensor. ``dates[sensor]``: (B, D, 3) int16 of year,
    day of year, hour. ``latlon``: (B, 2) float32, latitude and longitude of the tile's centre in degrees (WGS 84), NaN
    where the shards do not have it.
    """

    pixels: Mapping[str, Tensor]
    dates: Mapping[str, Tensor]
    latlon: Tensor

    def months(self, sensor: str) -> Tensor:
        """(B, D) int64: calendar month of each date, 0 to 11."""
        dates = self.dates[sensor].long()
        year, day = dates[..., 0], dates[..., 1]
        leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
        day = day - (leap & (day > _FEBRUARY_ENDS)).long()
        return sum(((day > end).long() for end in _MONTH_ENDS), torch.zeros_like(day))


def sensors_of(sensors: Mapping[str, SensorInput], instruments: Iterable[str]) -> list[SensorInput]:
    """The sensors of these instruments, in the order of the benchmark. EvaluationError if there is none."""
    wanted = tuple(instruments)
    found = [s for s in sensors.values() if s.instrument in wanted]
    if not found:
        listed = ", ".join(f"{s.name} ({s.instrument})" for s in sensors.values())
        raise EvaluationError(
            f"reads sensors of {' or '.join(wanted)}, and the dataset has none of them: {listed}"
        )
    return found


def parse_options(argument: str) -> tuple[str, dict[str, str]]:
    """``WEIGHTS,key=value,…`` → ("WEIGHTS", {key: value}): options follow the argument after commas.

    A part without ``=`` belongs to the argument, so that paths may contain commas.
    """
    head, *parts = argument.split(",")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key.isidentifier():
            options[key] = value
        else:
            head += f",{part}"
    return head, options


def check_options(options: Mapping[str, str], known: Iterable[str]) -> None:
    """EvaluationError for an option that the encoder does not have."""
    names = tuple(known)
    for key in options:
        if key not in names:
            raise EvaluationError(f"there is no option {key!r}{did_you_mean(key, names)}")
