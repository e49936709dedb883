"""How coordinate systems relate to the ground: whether a metre of a projection is a metre there.

No plane keeps all distances of the Earth. A UTM zone changes them by less than 0.1 %, national and continental systems
by up to 4 %; but Web Mercator (EPSG:3857) stretches them by 1 / cos(latitude): at 60° a metre on the ground has two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from maestro_scale.datasets.scenes.warp import transformer
from maestro_scale.datasets.spec import DatasetError

LON_LAT = "EPSG:4326"
_TOLERANCE = 0.05  # relative: continental systems are within it, and pixels keep their size well enough
_STEP = 100.0  # metres of a projection over which distances are measured
_MIDDLE_OF_FRANCE = (3.0, 45.0)


@lru_cache(maxsize=64)
def is_on_earth(crs: str) -> bool:
    """Whether a CRS is related to the Earth: not the local system of a drawing or a camera."""
    from pyproj import CRS

    return CRS.from_user_input(crs).geodetic_crs is not None


@lru_cache(maxsize=1000)
def in_metres(crs: str) -> bool:
    """Whether a CRS is a plane with coordinates in metres."""
    from pyproj import CRS

    parsed = CRS.from_user_input(crs)
    return parsed.is_projected and all(axis.unit_conversion_factor == 1.0 for axis in parsed.axis_info[:2])


def ground_m(crs: str, x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """(N, 2) metres on the ground to the east and to the north per unit of a projection, at N places.

    By geodesics on the WGS84 ellipsoid. NaN where a place is outside of the domain of the system.
    """
    x, y = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
    to_lon_lat, geod = transformer(crs, LON_LAT), _geod()
    ends = [(x, y), (x + _STEP, y), (x, y + _STEP)]
    here, east, north = (np.stack(to_lon_lat.transform(*end)) for end in ends)
    known = np.isfinite(np.stack([here, east, north])).all(axis=(0, 1))
    found = np.full((len(x), 2), np.nan)
    for i, there in enumerate((east, north)):
        found[known, i] = geod.inv(*here[:, known], *there[:, known])[2] / _STEP
    return found


def is_metric_at(crs: str, x: float, y: float) -> bool:
    """Whether a unit of a CRS is a metre on the ground at a place, within 5 %."""
    return in_metres(crs) and not _is_distorted(ground_m(crs, x, y)).any()


def check_metric(crs: str, places: np.ndarray) -> None:
    """DatasetError unless a CRS is a plane in metres, and its metre is one on the ground where the scenes lie.

    Args:
        places: (N, 2) longitude and latitude of the scenes.
    """
    from pyproj import CRS

    places = places[np.isfinite(places).all(axis=1)]
    parsed = CRS.from_user_input(crs)
    if not in_metres(crs):
        what = f"is {'in ' + parsed.axis_info[0].unit_name if parsed.axis_info else 'not metric'}"
        raise _not_metric(parsed.name, f"{what}, and tiles are squares in metres", places)
    found = ground_m(crs, *transformer(LON_LAT, crs).transform(*places.T)) if len(places) else np.ones((0, 2))
    found[np.isnan(found)] = 1.0  # outside of the domain, which is another problem
    if _is_distorted(found).any():
        worst = int(np.abs(np.log(found)).max(axis=1).argmax())
        east, north = found[worst] * 1000
        raise _not_metric(
            parsed.name,
            f"is not true to scale where the scenes lie: 1000 m in it are {east:.0f} m to the east and {north:.0f} m "
            "to the north on the ground, and tiles are squares on the ground",
            places[worst:],
        )


def _not_metric(name: str, what: str, places: np.ndarray) -> DatasetError:
    zone = utm_crs(*(places[0].tolist() if len(places) else _MIDDLE_OF_FRANCE))
    return DatasetError(
        f"grid.crs: {name} {what}; set grid.crs to a projected system in metres, for example {zone} (the UTM zone of "
        "the scenes), and they are warped to it",
        "CRS is not metric",
    )


def _is_distorted(found: np.ndarray) -> np.ndarray:
    return np.abs(np.log(found)) > np.log1p(_TOLERANCE)


def utm_crs(lon: float, lat: float) -> str:
    """The UTM zone of a place, without the exceptions of Norway and Svalbard."""
    zone = int((lon + 180) // 6) % 60 + 1
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


@lru_cache(maxsize=1)
def _geod() -> Any:
    from pyproj import Geod

    return Geod(ellps="WGS84")
