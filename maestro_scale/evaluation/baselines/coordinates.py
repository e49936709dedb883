"""Latitude and longitude of tiles, for encoders that are given coordinates; without a projection library.

Known reference systems: WGS 84 (EPSG:4326), UTM on WGS 84 and ETRS89 (EPSG:326zz, 327zz, 258zz), Lambert-93
(EPSG:2154). ETRS89 and RGF93 differ from WGS 84 by less than 1 m.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from maestro_scale.shards.format.codec import parse_place
from maestro_scale.stream.batch import Batch

_A, _F = (
    6378137.0,
    1 / 298.257222101,
)  # semi-major axis in m and flattening of GRS 80; WGS 84 is the same within 0.1 mm
_E = math.sqrt(_F * (2 - _F))
_UTM = re.compile(r"EPSG:(326|327|258)(\d\d)")


def latlon(batch: Batch, tile_m: float, device: torch.device) -> Tensor:
    """(B, 2) latitude and longitude of the centres of a batch's tiles in degrees; NaN where they are not known."""
    places = batch.places or (None,) * len(batch)
    values = torch.tensor([_centre(place, tile_m) for place in places], dtype=torch.float32)
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)  # so that the host does not wait for the copy


@lru_cache(maxsize=100_000)
def _centre(place: str | None, tile_m: float) -> tuple[float, float]:
    origin = parse_place("of the batch", place)
    if origin is None:
        return math.nan, math.nan
    if origin.crs == "EPSG:4326":  # its values are degrees, and the tile is small
        return origin.north_m, origin.west_m
    centre = origin.shifted(tile_m / 2, tile_m / 2)
    return to_degrees(origin.crs, centre.west_m, centre.north_m) or (math.nan, math.nan)


def to_degrees(crs: str, east_m: float, north_m: float) -> tuple[float, float] | None:
    """(latitude, longitude) of a place in a projected reference system; None for an unknown system."""
    if crs == "EPSG:2154":
        return _lambert_93(east_m, north_m)
    found = _UTM.fullmatch(crs)
    if found is None or not 1 <= int(found[2]) <= 60:
        return None
    south = found[1] == "327"
    return _utm(int(found[2]), east_m - 500_000.0, north_m - (10_000_000.0 if south else 0.0))


def _utm(zone: int, east_m: float, north_m: float) -> tuple[float, float]:
    """Inverse transverse Mercator: Krüger's series to the third power of n (Karney, arXiv 1002.1417, eq. 35 and 36)."""
    n = _F / (2 - _F)
    radius = 0.9996 * _A / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    xi, eta = north_m / radius, east_m / radius
    beta = (n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96, n**2 / 48 + n**3 / 15, 17 * n**3 / 480)
    xi0, eta0 = xi, eta
    for j, b in enumerate(beta, 1):
        xi0 -= b * math.sin(2 * j * xi) * math.cosh(2 * j * eta)
        eta0 -= b * math.cos(2 * j * xi) * math.sinh(2 * j * eta)
    conformal = math.asin(max(min(math.sin(xi0) / math.cosh(eta0), 1.0), -1.0))
    longitude = 6 * zone - 183 + math.degrees(math.atan2(math.sinh(eta0), math.cos(xi0)))
    return math.degrees(
        _geodetic(math.atanh(min(max(math.sin(conformal), -1 + 1e-15), 1 - 1e-15)))
    ), longitude


def _lambert_93(east_m: float, north_m: float) -> tuple[float, float]:
    """Inverse Lambert conformal conic with two standard parallels (Snyder, USGS PP 1395, p. 107 to 109)."""
    first, second, origin = (math.radians(v) for v in (49.0, 44.0, 46.5))

    def m(phi: float) -> float:
        return math.cos(phi) / math.sqrt(1 - (_E * math.sin(phi)) ** 2)

    cone = math.log(m(first) / m(second)) / (_isometric(second) - _isometric(first))
    scale = _A * m(first) / cone * math.exp(cone * _isometric(first))
    east, north = east_m - 700_000.0, scale * math.exp(-cone * _isometric(origin)) - (north_m - 6_600_000.0)
    isometric = math.log(scale / math.hypot(east, north)) / cone
    return math.degrees(_geodetic(isometric)), 3.0 + math.degrees(math.atan2(east, north) / cone)


def _isometric(phi: float) -> float:
    """The isometric latitude of a geodetic one, in radians."""
    return math.atanh(math.sin(phi)) - _E * math.atanh(_E * math.sin(phi))


def _geodetic(isometric: float) -> float:
    """The inverse of ``_isometric``."""
    phi = 0.0
    for _ in range(10):  # each step reduces the error by 1/150
        phi = math.asin(math.tanh(isometric + _E * math.atanh(_E * math.sin(phi))))
    return phi
