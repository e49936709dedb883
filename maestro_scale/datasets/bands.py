"""Wavelengths of optical bands by name, and the names of radar polarisations, for statistics of any dataset."""

from __future__ import annotations

import re
from typing import Literal

from maestro_scale.datasets.synthetic.scene import BAND_NM

Group = Literal["visible", "nir", "swir"]

RADAR = frozenset({"VV", "VH", "HH", "HV"})

_ALIASES = {
    "BLUE": "B2",
    "GREEN": "B3",
    "RED": "B4",
    "SWIR1": "B11",
    "SWIR2": "B12",
    "SWIR16": "B11",
    "SWIR22": "B12",
}
# The groups that the presets normalise Sentinel-2 over: B5, at 705 nm, belongs to the visible bands.
_GROUPS_NM: tuple[tuple[Group, int, int], ...] = (
    ("visible", 400, 710),
    ("nir", 711, 1000),
    ("swir", 1500, 2400),
)


def wavelength_nm(band: str) -> int | None:
    """The central wavelength of a band named as in Sentinel-2 (B4, b04, red), Landsat (L4) or an image (R), or None."""
    name = re.sub(r"^B0(?=\d)", "B", band.strip().upper())
    return BAND_NM.get(_ALIASES.get(name, name))


def group_of(band: str) -> Group | None:
    """The group of a band: visible (400–710 nm), nir (711–1000 nm) or swir (1500–2400 nm); None if not known."""
    nm = wavelength_nm(band)
    if nm is None:
        return None
    return next((name for name, low, high in _GROUPS_NM if low <= nm <= high), None)


def is_radar(bands: tuple[str, ...]) -> bool:
    """Whether the bands are radar polarisations; bands derived from them may follow."""
    return bool(bands) and bands[0].strip().upper() in RADAR
