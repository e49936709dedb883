"""What a raster measures, by its sensor and values: type, scale, nodata value and divisor follow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Header, Values
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft

_LANDSAT_SCALE = (0.275, -2000.0)
"""Collection 2 surface reflectance is 2.75e-5 · DN - 0.2 (usgs.gov/landsat-missions, scale factors of Collection 2
level 2); here times 10,000, as Sentinel-2's."""
_S2_OFFSET_SINCE = datetime(2022, 1, 25)  # processing baseline 04.00


def set_quantity(
    draft: RasterDraft, family: Family, sensor: str | None, values: Values | None, headers: Sequence[Header]
) -> None:
    """Set what is measured, and what follows from it: type, scale, nodata value, divisor."""
    first = headers[0]
    integer = np_kind(first.dtype) in "iu"
    if first.dtype in ("float64", "int64", "uint64"):
        draft.dtype = "float32" if not integer else "int32"
        draft.assume("dtype", f"the files have {first.dtype}, of which {draft.dtype} keeps enough digits")
    if (first.scale, first.offset) != (1.0, 0.0):
        draft.scale, draft.offset = first.scale, first.offset
        draft.dtype = "float32"
        draft.notes["scale"] = Note("scale and offset that the files declare")
    names = {n for n, _ in draft.bands}
    radar = bool(names & {"VV", "VH", "HH", "HV"}) or (sensor or "").startswith("s1")
    if values is None:
        draft.assume("quantity", "no valid value was found in the files that were read")
        draft.divisor = 1.0
        return
    span = f"2 to 98 % of the values are {values.p02:g} to {values.p98:g}"
    if radar:
        decibels = values.median < 0
        draft.quantity = "backscatter_db" if decibels else "backscatter_linear"
        draft.assume("quantity", f"{'decibels' if decibels else 'linear power'}, since {span}")
        if integer or (not decibels and values.p98 > 1e4):
            draft.quantity, draft.divisor = "any", _round_up(max(abs(values.p02), values.p98))
            draft.assume("quantity", f"neither decibels nor linear power, since {span}")
    elif sensor == "dem":
        draft.quantity = "elevation"
        draft.elevation = len(draft.bands) == 2
        if values.low < -500 or values.high > 9000:
            draft.assume("quantity", f"metres, but {span}: name fill values under nodata")
        else:
            draft.assume("quantity", f"metres, since {span}")
    elif first.dtype == "uint8":
        draft.quantity = "image"
        draft.notes["quantity"] = Note(span)
    elif (
        sensor == "landsat" or any(str(b).upper().startswith("SR_B") for _, b in draft.bands)
    ) and first.dtype == "uint16":
        draft.quantity = "reflectance"
        if values.median > 5000 or any(str(b).upper().startswith("SR_B") for _, b in draft.bands):
            (draft.scale, draft.offset), draft.dtype, draft.nodata = _LANDSAT_SCALE, "int16", (0.0,)
            draft.assume("scale", "Landsat Collection 2 level 2, stored as reflectance × 10,000")
        draft.notes["quantity"] = Note(span)
    else:
        _set_reflectance(draft, family, sensor, values, first, span)
    if first.nodata is None and not draft.nodata and integer and draft.quantity == "reflectance":
        draft.nodata = (0.0,)
        share = f"{values.zeros:.0%} of the values" if values.zeros else "none of the values read"
        draft.assume("nodata", f"0 is not measured, the files declare nothing ({share}); [] if 0 is a value")


def _set_reflectance(
    draft: RasterDraft, family: Family, sensor: str | None, values: Values, first: Header, span: str
) -> None:
    optical = sensor in ("s2", "landsat", "planet", "naip", "spot", "aerial") or bool(
        {n for n, _ in draft.bands} & {"B4", "B8", "R", "NIR", "red", "nir"}
    )
    if np_kind(first.dtype) == "f" and optical and 0 <= values.p98 <= 2:
        draft.quantity, draft.divisor = "reflectance", 1.0
        draft.assume("quantity", f"reflectance as fraction, since {span}")
    elif optical and 50 < values.p98 <= 30_000:
        draft.quantity = "reflectance"
        draft.assume("quantity", f"reflectance × 10,000, since {span}")
        _note_s2_offset(draft, family, sensor, values)
    else:
        draft.divisor = _round_up(max(abs(values.p02), abs(values.p98)))
        draft.assume("quantity", f"not known what is measured ({span})")


def _note_s2_offset(draft: RasterDraft, family: Family, sensor: str | None, values: Values) -> None:
    """Since processing baseline 04.00 of January 2022, Sentinel-2 products have 1000 added to reflectance × 10,000.

    Also older images that were processed again. The names of products say their baseline.
    """
    if sensor != "s2" or "S30" in family.words:  # HLS takes the 1000 away
        return
    baselines = sorted(m[1] for f in family.files if (m := re.search(r"_(N\d{4})_", f.path)))
    added = [b for b in baselines if b >= "N0400"]
    last = max((f.date for f in family.files if f.date), default=None)
    if not added and (baselines or last is None or last < _S2_OFFSET_SINCE):
        return
    mixed = (
        f", not to {baselines[0]}: put these images into a raster of their own" if added != baselines else ""
    )
    if added and (not mixed or 2 * len(added) >= len(baselines)):
        draft.offset, draft.dtype = -1000.0, "int16"
        draft.notes["offset"] = Note(f"processing baseline {added[0]} adds 1000{mixed}", bool(mixed))
    elif added:
        draft.assume("offset", f"processing baseline {added[0]} adds 1000{mixed}")
    elif values.p02 > 900:
        draft.offset, draft.dtype = -1000.0, "int16"
        draft.assume(
            "offset",
            f"1000 was added (baseline 04.00 and later): 98 % of the values are above {values.p02:g}",
        )
    else:
        draft.assume(
            "offset",
            "no 1000 was added; -1000 if these are products of baseline 04.00 and later (since 2022)",
        )


def np_kind(dtype: str) -> str:
    """The kind of a numpy type by its name: "f", "i" or "u"."""
    return "f" if dtype.startswith(("float", "complex")) else "u" if dtype.startswith("u") else "i"


def _round_up(value: float) -> float:
    """The number of one or two digits at or above ``value``: a divisor."""
    if value <= 0:
        return 1.0
    exponent = 10.0 ** (len(str(int(value))) - 1) if value >= 1 else 0.1
    return float(f"{-(-value // exponent) * exponent:g}") or 1.0
