"""Sensor and bands of a raster, by the names of files, those that the files give, or their number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Header
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.raster_masks import add_masks

S2_USED = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
_S2_L2A = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
_S2_L1C = (*_S2_L2A[:10], "B10", *_S2_L2A[10:])
_PLANET_4 = ("B", "G", "R", "NIR")  # PlanetScope and SkySat 4-band products: blue, green, red, near-infrared
_PLANET_8 = ("coastal", "B", "green_i", "G", "yellow", "R", "rededge", "NIR")


def sensor_of(family: Family) -> str | None:
    """The usual name of the sensor, by the words of the names, else by the names of the bands."""
    named = words.sensor_of(family.words)
    bands = {b.upper() for b in family.bands}
    if named is None and any(b.startswith(("SR_B", "ST_B")) for b in bands):
        return "landsat"
    if named is None and ("B8A" in bands or len({b for b in bands if re.fullmatch(r"B0\d", b)}) > 1):
        return "s2"
    return "s1" if named is None and bands and bands <= {"VV", "VH", "HH", "HV"} else named


def set_bands(draft: RasterDraft, family: Family, headers: Sequence[Header], sensor: str | None) -> None:
    """Set the bands: those in the names of files, those that the files name, or the usual ones of that number."""
    first = headers[0]
    count = first.count - first.has_alpha
    if first.has_alpha:
        draft.notes["bands"] = Note(
            "the last band of the files is an alpha channel, which marks invalid pixels"
        )
    if family.bands:
        named = [(canonical_band(b, sensor), b) for b in family.bands]
        used = [(name, b) for name, b in named if name in S2_USED]
        landsat = [(name, b) for name, b in named if not b.upper().startswith("ST_")]
        kept = named
        if len(used) >= 3 and len(used) < len(named) and sensor in (None, "s2"):
            kept = used
            draft.assume(
                "bands",
                f"without {_listed(b for p in named if p not in used for b in p[1:])}, of the atmosphere",
            )
        elif len(landsat) < len(named):
            kept = landsat
            draft.assume(
                "bands",
                f"without {_listed(b for p in named if p not in landsat for b in p[1:])} (temperature)",
            )
        draft.bands = [(name, b) for name, b in kept]
        return
    named_bands = first.band_names
    if named_bands:
        for i, band in enumerate(named_bands[:count]):
            rule = words.MASKS.get(band.lower())
            if rule is None:
                draft.bands.append((canonical_band(band, sensor), i + 1))
            else:
                add_masks(draft, rule, {"band": i + 1}, None)
        if len({n for n, _ in draft.bands}) == len(draft.bands) > 0:
            return
        draft.bands = []
    names, reason = _usual_bands(count, first.dtype, sensor, family.words)
    draft.bands = [(n, i + 1) for i, n in enumerate(names)]
    if reason:
        draft.assume("bands", reason)


def canonical_band(band: str, sensor: str | None) -> str:
    """The name that the shipped datasets use: B02 → B2, SR_B4 → L4, vv → VV, red → R."""
    up = band.upper()
    if sensor == "landsat":
        match = re.fullmatch(r"(?:SR_|ST_)?B(?:AND)?0?(\d+)", up)
        return f"L{match[1]}" if match else band
    if match := re.fullmatch(r"(?:SR_|ST_)B(\d+)", up):
        return f"L{match[1]}"
    if match := re.fullmatch(r"B0?(\d+A?)", up):
        return f"B{match[1]}"
    short = {"RED": "R", "GREEN": "G", "BLUE": "B", "NIR": "NIR", "N": "NIR"}
    if up in short and sensor != "s2":
        return short[up]
    return up if up in ("VV", "VH", "HH", "HV", "R", "G", "B") else band


def _usual_bands(
    count: int, dtype: str, sensor: str | None, constant: Sequence[str]
) -> tuple[Sequence[str], str]:
    """Names of unnamed bands, and what is assumed of them."""
    order = "that order of bands; change the names if the files have another"
    if count == 1:
        band = next((w for w in reversed(constant) if words.is_band(w) and len(w) > 1), None)
        if band is not None:
            return (canonical_band(band, sensor),), ""
        return ("elevation" if sensor == "dem" else "gray" if dtype == "uint8" else "value",), ""
    if sensor == "dem" and count == 2:
        return ("DSM", "DTM"), f"surface, then terrain: {order}"
    if (sensor or "").startswith("s1") and count in (2, 3):
        return ("VV", "VH", "ratio")[:count], order
    if count == 3:
        return ("R", "G", "B"), order
    if count == 4:
        photo = dtype == "uint8" and sensor != "planet"
        return (("R", "G", "B", "NIR"), order) if photo else (_PLANET_4, f"blue first: {order}")
    if count == 8 and sensor == "planet":
        return _PLANET_8, order
    for usual in (S2_USED, _S2_L2A, _S2_L1C):
        if count == len(usual):
            return usual, f"Sentinel-2, {order}"
    names = [f"band{i + 1}" for i in range(count)]
    stack = "; if they are the bands of one date after the other, set axes: [date, band, y, x] and name those of one"
    return names, f"the files name no bands{stack if count > 13 else ''}"


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)
