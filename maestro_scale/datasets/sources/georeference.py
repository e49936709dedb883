"""Where arrays lie on the ground: coordinates of pixels and attributes of grid mappings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from maestro_scale.datasets.spec import DatasetError

Affine = tuple[float, float, float, float, float, float]

_MAX_WKT = 100_000  # characters
# Texts of other kinds may name files or addresses, which PROJ and GDAL would open.
_WKT = re.compile(
    r"\s*(?:PROJ|GEOG|GEOD|GEOC|BOUND|COMPOUND|LOCAL_|ENG|VERT|COMPD_|DERIVED|TIME|PARAM)\w*\s*[\[(]"
)
_CODE = re.compile(r"EPSG:\d{4,6}", re.IGNORECASE)
_TOLERANCE = 0.02  # of a pixel: coordinates are often stored as float32


@dataclass(frozen=True)
class Georeference:
    """``transform``: of the pixels after the flips, which turn row 0 to the north and column 0 to the west."""

    crs: str | None = None
    transform: Affine | None = None
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of_positions(
        cls,
        rows: tuple[float, float] | None,
        columns: tuple[float, float] | None,
        geotransform: Any,
        crs: str | None,
        shape: tuple[int, int],
    ) -> Georeference:
        """Of the first position and distance of the centres of rows and columns; ``geotransform``: of GDAL, used where
        there are no positions."""
        if rows is None or columns is None:
            transform = _parse_geotransform(geotransform)
            if transform is None or transform[1] or transform[3]:
                return cls(crs, transform)
            a, _, c, _, e, f = transform
            rows, columns = (f + e / 2, e), (c + a / 2, a)
        (y, dy), (x, dx) = rows, columns
        flip_rows, flip_columns = dy > 0, dx < 0
        if flip_rows:
            y, dy = y + dy * (shape[0] - 1), -dy
        if flip_columns:
            x, dx = x + dx * (shape[1] - 1), -dx
        return cls(crs, (dx, 0.0, x - dx / 2, 0.0, dy, y - dy / 2), flip_rows, flip_columns)


def spaced(values: np.ndarray) -> tuple[float, float] | None:
    """First value and distance of evenly spaced numbers; None if they are not, or only count pixels from 0 or 1."""
    numbers = values.astype(np.float64)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        return None
    step = (numbers[-1] - numbers[0]) / (len(numbers) - 1)
    if step == 0 or np.abs(numbers - (numbers[0] + step * np.arange(len(numbers)))).max() > _TOLERANCE * abs(
        step
    ):
        return None
    if step == 1 and numbers[0] in (0, 1):
        return None
    return float(numbers[0]), float(step)


def crs_of_attributes(attribute: Callable[[str], Any], where: str) -> str | None:
    """The coordinate system that attributes of a grid mapping (CF) or of GDAL's Zarr declare; None if there is none.

    DatasetError if it cannot be understood.
    """
    for name in ("crs_wkt", "spatial_ref", "proj:code", "proj:wkt2", "epsg_code"):
        value = attribute(name)
        if isinstance(value, str) and value.strip():
            return parse_crs(value, f"{where}: {name}")
    gdal = attribute("_CRS")
    if isinstance(gdal, dict) and isinstance(gdal.get("wkt"), str):
        return parse_crs(gdal["wkt"], f"{where}: _CRS")
    if isinstance(attribute("grid_mapping_name"), str):
        return _of_cf(attribute, where)
    return None


def parse_crs(text: str, where: str) -> str:
    """``EPSG:n`` or WKT as rasterio writes it. DatasetError for anything else."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    text = text.strip()
    try:
        if _CODE.fullmatch(text):
            return CRS.from_epsg(int(text[5:])).to_string()
        if _WKT.match(text) and len(text) <= _MAX_WKT:
            return CRS.from_wkt(text).to_string()
    except CRSError as error:
        cause = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{where}: is no coordinate system ({cause}); set crs", "no coordinate system"
        ) from error
    raise DatasetError(f"{where}: is no coordinate system: {text[:60]!r}; set crs", "no coordinate system")


_CF_NUMBERS = (
    "semi_major_axis", "semi_minor_axis", "inverse_flattening", "earth_radius", "longitude_of_prime_meridian",
    "longitude_of_projection_origin", "latitude_of_projection_origin", "longitude_of_central_meridian",
    "scale_factor_at_central_meridian", "scale_factor_at_projection_origin", "false_easting", "false_northing",
    "standard_parallel", "straight_vertical_longitude_from_pole", "grid_north_pole_latitude",
    "grid_north_pole_longitude", "north_pole_grid_longitude", "perspective_point_height", "azimuth_of_central_line",
)  # fmt: skip


def _of_cf(attribute: Callable[[str], Any], where: str) -> str:
    import pyproj
    from rasterio.crs import CRS

    # Numbers and known names only: see _WKT.
    values: dict[str, Any] = {"grid_mapping_name": attribute("grid_mapping_name")}
    for name in _CF_NUMBERS:
        if (value := attribute(name)) is not None:
            numbers = np.asarray(value, dtype=np.float64).reshape(-1).tolist()
            values[name] = numbers[0] if len(numbers) == 1 else numbers
    try:
        return CRS.from_wkt(pyproj.CRS.from_cf(values).to_wkt()).to_string()
    except (pyproj.exceptions.CRSError, KeyError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{where}: its grid mapping is no coordinate system ({cause}); set crs", "no coordinate system"
        ) from error


def _parse_geotransform(value: Any) -> Affine | None:
    """``"x0 dx rx y0 ry dy"`` as GDAL and rioxarray write it."""
    if not isinstance(value, str):
        return None
    try:
        c, a, b, f, d, e = (float(v) for v in value.split())
    except ValueError:
        return None
    return (a, b, c, d, e, f)
