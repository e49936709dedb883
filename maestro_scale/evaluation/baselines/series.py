"""Sensors as the pixel series of Presto and Galileo: bands by their names, cells in space and steps in time.

Shapes: B samples, D dates, T steps, C bands, G cells per side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.evaluation.baselines.protocol import Images, SensorInput
from maestro_scale.evaluation.results import EvaluationError

UNTRAINED = "untrained"
"""In place of the path of the weights: random ones."""

MAX_STEPS = 24  # of Presto and Galileo: the positions that they know
_MONTHS = 12
_INSTRUMENTS = ("sentinel-2", "sentinel-1", "other")  # in the order in which a sensor gives cells and months
_ELEVATION = ("elevation", "DTM", "DEM", "DSM")  # the first that a dataset has
_OPTIONS = ("auto", "monthly", "steps")


class BandSeries(NamedTuple):
    """``values`` (B, T, C, G, G), 0 where ``valid`` (B, T) is False; ``valid`` None: every step has data."""

    values: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class BandGroup:
    """Bands that an encoder reads together, with what it subtracts and divides by in the units of ``SensorInput``."""

    name: str
    bands: tuple[str, ...]
    shift: tuple[float, ...]
    divisor: tuple[float, ...]

    def normalised(self, values: Tensor) -> Tensor:
        """(…, C, G, G) in physical units -> as the encoder expects it."""
        shift, divisor = (
            torch.tensor(v, device=values.device)[:, None, None] for v in (self.shift, self.divisor)
        )
        return (values - shift) / divisor


class SeriesReader:
    """Reads the band groups of a dataset's sensors. ``found``: the groups of which it has every band.

    ``dates``: ``monthly``: means per calendar month, whatever the year; ``steps``: every date is a step, for sensors
    with the same number of dates; ``auto``: steps where that holds. EvaluationError if no group is found.
    """

    def __init__(
        self, sensors: Mapping[str, SensorInput], groups: Sequence[BandGroup], dates: str = "auto"
    ) -> None:
        if dates not in _OPTIONS:
            raise EvaluationError(f"dates={dates}: use one of {', '.join(_OPTIONS)}")
        # Landsat's bands have the names of Sentinel-2's and other wavelengths.
        usable = {n: s for n, s in sensors.items() if s.instrument in _INSTRUMENTS}
        self.found: dict[str, tuple[BandGroup, tuple[SensorInput, ...]]] = {}
        for group in groups:
            having = tuple(s for s in usable.values() if set(group.bands) <= set(s.bands))
            if having:
                self.found[group.name] = (group, having)
        if not self.found:
            bands = ", ".join(f"{s.name} ({s.instrument}: {', '.join(s.bands)})" for s in sensors.values())
            raise EvaluationError(
                f"reads none of the dataset's sensors: {bands}; it reads {', '.join(g.name for g in groups)}"
            )
        self.sensors = tuple(dict.fromkeys(s for _, having in self.found.values() for s in having))
        self.main = min(self.sensors, key=lambda s: _INSTRUMENTS.index(s.instrument))
        self.elevation = next(
            ((s, s.band(b)) for b in _ELEVATION for s in sensors.values() if b in s.bands), None
        )
        counts = {s.num_dates for s in self.sensors}
        if dates == "steps" and (len(counts) > 1 or max(counts) > MAX_STEPS):
            raise EvaluationError(
                f"dates=steps needs the same number of dates of every sensor, at most {MAX_STEPS}: "
                + ", ".join(f"{s.name} {s.num_dates}" for s in self.sensors)
            )
        self.monthly = dates == "monthly" or len(counts) > 1 or max(counts) > MAX_STEPS
        self.num_steps = _MONTHS if self.monthly else self.main.num_dates

    def read(self, images: Images, group: str, grid: int) -> BandSeries:
        """A group's bands, normalised, as means of ``grid``² cells."""
        bands, having = self.found[group]
        totals, counts = [], []
        for s in having:
            pixels = images.pixels[s.name][:, :, [s.band(b) for b in bands.bands]]
            cells = pool(pixels, grid)
            weights = self._steps_of(images, s).to(cells)
            totals.append(torch.einsum("bdt,bdcgh->btcgh", weights, cells))
            counts.append(weights.sum(dim=1))
        total, count = torch.stack(totals).sum(dim=0), torch.stack(counts).sum(dim=0)
        values = bands.normalised(total / count.clamp_min(1)[:, :, None, None, None])
        return BandSeries(values, count > 0 if self.monthly else None)

    def months(self, images: Images) -> Tensor:
        """(B, T) int64: calendar month of every step, 0 to 11."""
        months = images.months(self.main.name)
        if not self.monthly:
            return months
        return torch.arange(_MONTHS, device=months.device).expand(len(months), -1)

    def terrain(self, images: Images, grid: int, extent_m: float) -> Tensor | None:
        """(B, 2, G, G) elevation in m and slope in degrees; None where the dataset has no elevation."""
        if self.elevation is None:
            return None
        sensor, band = self.elevation
        pixels = images.pixels[sensor.name]
        height = pool(pixels[:, :, band : band + 1], grid).mean(dim=1)
        if "slope" in sensor.bands:
            slope = pool(pixels[:, :, sensor.band("slope")][:, :, None], grid).mean(dim=1)
        elif grid > 1:
            down, right = torch.gradient(height, spacing=extent_m / grid, dim=(2, 3))
            slope = torch.rad2deg(torch.atan(torch.sqrt(down.square() + right.square())))
        else:  # a single cell: its slope cannot be computed
            slope = torch.zeros_like(height)
        return torch.cat([height, slope], dim=1)

    def describe(self, sensors: Iterable[SensorInput], also: Sequence[str] = ()) -> str:
        """What is read and how, for ``adaptation``. ``also``: names of further sensors that are read."""
        read = {s.name for s in self.sensors} | set(also)
        parts = ", ".join(
            f"{name} from {'+'.join(s.name for s in having)}" for name, (_, having) in self.found.items()
        )
        unread = ", ".join(s.name for s in sensors if s.name not in read) or "nothing"
        dates = (
            "means per calendar month, months without data masked" if self.monthly else "every date is a step"
        )
        return f"reads {parts}; leaves out {unread}; dates: {dates}"

    def _steps_of(self, images: Images, sensor: SensorInput) -> Tensor:
        """(B, D, T) 0 or 1: the step of every date."""
        size, num_dates = images.dates[sensor.name].shape[:2]
        months = images.months(sensor.name)
        if self.monthly:
            return F.one_hot(months, _MONTHS)
        return torch.eye(num_dates, dtype=torch.int64, device=months.device).expand(size, -1, -1)


def pool(pixels: Tensor, grid: int) -> Tensor:
    """(B, D, C, H, W) -> (B, D, C, G, G): means of the pixels of each cell; a finer grid repeats pixels."""
    return F.adaptive_avg_pool2d(pixels.flatten(0, 1), grid).unflatten(0, pixels.shape[:2])


def cartesian(latlon: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3) on the unit sphere from (B, 2) degrees, 0 where they are not known; and (B,) bool: where they are."""
    known = torch.isfinite(latlon).all(dim=1)
    lat, lon = torch.deg2rad(torch.where(known[:, None], latlon, 0.0)).unbind(dim=1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1), known


def ndvi(values: Tensor) -> Tensor:
    """(B, T, 2, …) near infrared and red -> (B, T, 1, …), 0 where their sum is not positive."""
    nir, red = values[:, :, :1], values[:, :, 1:]
    total = nir + red
    return torch.where(total > 0, (nir - red) / torch.where(total > 0, total, 1.0), 0.0)


def month_table(width: int) -> Tensor:
    """(12, width): the sine, then the cosine, of the month's angle in the year."""
    angles = (torch.arange(12).double() * (2 * math.pi / 12))[:, None].expand(-1, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
