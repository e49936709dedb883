"""Quantities: what a raster measures, which values are valid, and what replaces the others.

:data:`QUANTITY_KINDS` is the public table: descriptions and ``Raster`` name its kinds by ``quantity:``. Readers of the
shipped datasets use the same kinds (``fill.py:QUANTITIES``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from maestro_scale.datasets.values import LARGEST

FILL_VALUES: Mapping[float, str] = {
    -9999.0: "the default of Arc/Info grids; elevation, radar",
    -10_000.0: "MAJA (Theia) L2A: cesbio.cnrs.fr/maja/sentinel-2-output-format; in PASTIS: torchgeo #4061",
    -99_999.0: "elevation models",
    -32_768.0: "the lowest int16: SRTM (lpdaac.usgs.gov/products/srtmgl1v003), gdalwarp without a nodata value",
    -32_767.0: "the default of netCDF for int16 (NC_FILL_SHORT)",
    -2_147_483_647.0: "the default of netCDF for int32 (NC_FILL_INT)",
    -2_147_483_648.0: "the lowest int32",
    float(np.finfo(np.float32).min): "the lowest float32: GDAL, ArcGIS",
    float(np.finfo(np.float32).max): "the highest float32: GDAL, ArcGIS",
    float(np.float32(9.969_209_968_386_869e36)): "the default of netCDF for floats (NC_FILL_FLOAT)",
    9.969_209_968_386_869e36: "the default of netCDF for doubles (NC_FILL_DOUBLE)",
    1e20: "missing_value of climate models (CMIP)",
    float(np.float32(1e20)): "missing_value of climate models (CMIP)",
}
"""Usual fill values and where they come from. They stand for "not measured" where they are outside of a quantity's
limits; within the limits only the file or the description can say that they are fill values."""


_LARGEST_VALID = float(np.nextafter(LARGEST, 0))


@dataclass(frozen=True)
class Quantity:
    """What is measured: valid values are finite, greater than ``above`` and at most ``up_to``, in the units in which
    they are stored.

    ``fill``: what replaces an invalid value. "zero": 0, and 100 % cloud where the modality has such a mask; "nan": NaN;
    "mean": the mean of the band's valid pixels. ``outside``: note on finite values outside of the limits.
    ``nonzero``: bands in which an exact 0 is nodata (``zeros``: note on it). ``usual``: the lowest and highest value
    that is not remarkable; others within the limits are stored, and noted. ``source``: where the fill values are
    documented, or were found. ``fills``: fill values beside :data:`FILL_VALUES` that are known to occur.
    """

    fill: Literal["zero", "nan", "mean"]
    source: str
    above: float = -LARGEST
    up_to: float = _LARGEST_VALID
    outside: str = "fill values"
    nonzero: tuple[str, ...] = ()
    zeros: str = ""
    usual: tuple[float, float] = (-np.inf, np.inf)
    fills: tuple[float, ...] = ()

    def within(self, low: float | None, high: float | None) -> Quantity:
        """The quantity with other limits: valid are ``low`` to ``high``, both included; None: the limit that it has."""
        above = self.above if low is None else float(np.nextafter(low, -np.inf))
        up_to = self.up_to if high is None else high
        text = f"values outside of {self.above if low is None else low:g} to {up_to:g}"
        return replace(self, above=above, up_to=up_to, outside=text, usual=(-np.inf, np.inf))

    def valid(self, values: np.ndarray) -> np.ndarray:
        """Which values are within the limits; NaN is not."""
        above, up_to = self.above, self.up_to
        if values.dtype.kind == "f":
            # numpy rounds the limit to the dtype of the array, perhaps up: 1e20 would be at most the number below it.
            above, up_to = _rounded_down(above, values.dtype), _rounded_down(up_to, values.dtype)
        return (values > above) & (values <= up_to)

    def is_fill(self, values: np.ndarray) -> np.ndarray:
        """Which values are usual fill values."""
        return np.isin(values.astype(np.float64), [*FILL_VALUES, *self.fills])


def _rounded_down(limit: float, dtype: np.dtype) -> float:
    """The highest value of a floating-point dtype that is not above ``limit``."""
    with np.errstate(over="ignore"):
        rounded = dtype.type(limit)
    return float(np.nextafter(rounded, dtype.type(-np.inf)) if float(rounded) > limit else rounded)


_POLARISATIONS = ("VV", "VH", "HH", "HV")

QUANTITY_KINDS: Mapping[str, Quantity] = {
    "any": Quantity("nan", "no value is reserved; every value is checked to be finite"),
    "image": Quantity("zero", "uint8 images: no value is reserved, only what the file declares"),
    "reflectance": Quantity(
        "zero",
        "MAJA (Theia) L2A: -10000 (cesbio.cnrs.fr/maja/sentinel-2-output-format); found in PASTIS (torchgeo #4061); "
        "-9999 is a usual nodata tag",
        above=-9999,
        outside="fill values (-9999 or lower, or from 1e20)",
        usual=(-5000, 65_000),
    ),
    "backscatter_linear": Quantity(
        "nan",
        "Sentinel-1 GRD: pixels outside of the swath are exactly 0; a power is positive, and bright targets reach 1e4",
        above=0,
        up_to=1e6,
        outside="fill values (negative or above 1e6)",
        nonzero=_POLARISATIONS,
        zeros="zeros, which in linear power are no measurement",
        usual=(0, 2e4),
    ),
    "backscatter_db": Quantity(
        "nan",
        "0 in linear power is -inf dB; rasters without NaN use 0; -9999 is a usual nodata tag; measured: -60 to 40 dB",
        above=-100,
        up_to=100,
        outside="fill values (outside -100 to 100 dB)",
        nonzero=_POLARISATIONS,
        zeros="zeros, which in decibels are no measurement",
        usual=(-70, 50),
        fills=(-np.inf,),
    ),
    "elevation": Quantity(
        "mean",
        "-9999, -99999 and 3.4e38 are usual nodata values of elevation models; on land: -430 to 8,849 m",
        above=-500,
        up_to=9000,
        outside="pixels without elevation",
        usual=(-450, 8900),
    ),
}
"""The kinds of quantities by name, for ``quantity:`` of a description."""
