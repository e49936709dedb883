"""The unit of the coordinates of a file, and what it is on the ground where the file lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.datasets.scenes.ground import LON_LAT, ground_m, is_metric_at, is_on_earth
from maestro_scale.datasets.scenes.warp import transformer

METRES_PER_DEGREE = 111_320.0
"""Of a degree of latitude."""


@dataclass(frozen=True)
class Unit:
    """``name``: m, degrees, or units of a system that is not true to scale, such as Web Mercator. ``ground_m``: metres
    on the ground, of which ``digits`` are known."""

    name: str
    ground_m: float
    digits: int = 0

    @property
    def is_metre(self) -> bool:
        """Whether it is a metre on the ground."""
        return self.name == "m"

    def metres(self, length: float) -> float:
        """A length in metres on the ground."""
        return round(length, 6) if self.is_metre else float(f"{length * self.ground_m:.{self.digits}g}")


METRES = Unit("m", 1.0)


def unit_of(crs: str, bounds: Sequence[float]) -> Unit:
    """The unit of a coordinate system, at the middle of an extent (west, south, east, north) in it."""
    from pyproj import CRS

    x, y = middle_of(bounds)
    if not is_on_earth(crs) or is_metric_at(crs, x, y):
        return METRES
    if not CRS.from_user_input(crs).is_projected:
        return Unit("degrees", METRES_PER_DEGREE * math.sqrt(max(math.cos(math.radians(y)), 0.01)), 2)
    east, north = ground_m(crs, x, y)[0].tolist()
    return Unit("units", math.sqrt(east * north), 3) if math.isfinite(east * north) else METRES


def lon_lat(crs: str, bounds: Sequence[float]) -> tuple[float, float]:
    """Longitude and latitude of the middle of an extent."""
    lon, lat = transformer(crs, LON_LAT).transform(*middle_of(bounds))
    return lon, lat


def middle_of(bounds: Sequence[float]) -> tuple[float, float]:
    """The middle of an extent."""
    west, south, east, north = bounds
    return (west + east) / 2, (south + north) / 2
