"""From files with like names to a raster of a description."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from statistics import median_high

from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Header, Prober, Values
from maestro_scale.datasets.describe.raster_bands import sensor_of, set_bands
from maestro_scale.datasets.describe.raster_draft import RasterDraft
from maestro_scale.datasets.describe.raster_quantity import set_quantity

_USUAL_RESOLUTION_M = {
    "s2": 10.0,
    "s1": 10.0,
    "landsat": 30.0,
    "planet": 3.0,
    "naip": 1.0,
    "spot": 1.5,
    "aerial": 0.2,
}


def draft_raster(family: Family, prober: Prober, name: str) -> RasterDraft | None:
    """The draft for the images of a family; None if none of its files that were tried can be read."""
    paths = _one_band_each(family)
    headers = prober.headers(paths)
    if not headers:
        return None
    first = headers[0]
    sensor = sensor_of(family)
    draft = RasterDraft(
        name=name,
        files=family.pattern,
        key=family.key_template,
        bands=[],
        resolution_m=min(
            (h.resolution_m for h in headers if h.resolution_m), default=usual_resolution_m(sensor)
        ),
        dtype=first.dtype,
        found="",
        num_bands=first.count - first.has_alpha,
        side=min(min(h.width, h.height) for h in headers),
        keys=frozenset(family.keys),
        crs=frozenset(h.crs for h in headers if h.crs and h.bounds),
        bounds=_union([h.bounds for h in headers if h.bounds]),
        family=family,
    )
    draft.extent_m = draft.side * draft.resolution_m
    if first.bounds is None:
        draft.assume("resolution_m", "the files have no coordinates; write the size of a pixel in metres")
    elif not first.unit.is_metre:
        draft.assume(
            "resolution_m",
            f"the files are in {first.unit.name} ({first.resolution:.6g} per pixel), this is nearest on the ground",
        )
    set_bands(draft, family, headers, sensor)
    nodata = {h.nodata for h in headers}
    values = prober.values(paths, nodata=())
    _set_dates(draft, family, first)
    set_quantity(draft, family, sensor, values, headers)
    dtypes = sorted({h.dtype for h in headers})
    if len(dtypes) > 1:
        draft.assume("dtype", f"the files have {' and '.join(dtypes)}: give one that holds all values")
    draft.found = _found_text(family, headers, values, nodata)
    return draft


def usual_resolution_m(sensor: str | None) -> float:
    """Pixel size of a sensor's images, for files that do not say."""
    return _USUAL_RESOLUTION_M.get((sensor or "").split("_")[0], 1.0)


def _one_band_each(family: Family) -> list[str]:
    """Paths of the files, band after band, so that a sample has every band."""
    by_band: dict[str, list[str]] = defaultdict(list)
    for f in family.files:
        by_band[f.band or ""].append(f.path)
    if len(by_band) == 1:
        return [f.path for f in family.files]
    most = max(map(len, by_band.values()))
    lists = list(by_band.values())
    return [paths[i] for i in range(most) for paths in lists if i < len(paths)]


def _set_dates(draft: RasterDraft, family: Family, first: Header) -> None:
    by_place: dict[str | None, set[datetime]] = defaultdict(set)
    for f in family.files:
        if f.date is not None:
            by_place[f.key].add(f.date)
    if by_place:
        numbers = [len(dates) for dates in by_place.values()]
        draft.series = max(numbers) > 1
        draft.num_dates = median_high(numbers) if draft.series else 1
        if family.date_format in ("%Y", "%Y%m"):
            what = "years" if family.date_format == "%Y" else "months"
            draft.assume("files", f"these numbers are {what}; an image gets the first day")
    elif re.fullmatch(r"\d{4}:\d{2}:\d{2}( \d{2}:\d{2}:\d{2})?", first.datetime):
        draft.dates = {
            "from": "tag",
            "format": "%Y:%m:%d %H:%M:%S"[: 8 if len(first.datetime) < 11 else None],
        }
        draft.assume(
            "dates", f"the time tag of the files ({first.datetime}), which may be that of processing"
        )
    else:
        draft.dates = {"from": "reference"} if sensor_of(family) == "dem" else None


def _union(bounds: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float, float] | None:
    if not bounds:
        return None
    west, south, east, north = zip(*bounds, strict=True)
    return min(west), min(south), max(east), max(north)


def _found_text(
    family: Family, headers: Sequence[Header], values: Values | None, nodata: set[float | None]
) -> str:
    first = headers[0]
    dates = sorted({f.date for f in family.files if f.date})
    parts = []
    if family.keys:
        parts.append(f"{len(family.keys)} keys")
    if dates:
        parts.append(f"{len(dates)} dates" if len(dates) > 1 else "1 date")
    if family.bands:
        parts.append(f"{len(family.bands)} bands")
    sizes = sorted({(h.width, h.height) for h in headers})
    shape = f"{sizes[0][0]}×{sizes[0][1]}" + (f" to {sizes[-1][0]}×{sizes[-1][1]}" if len(sizes) > 1 else "")
    num = len(family.files)
    text = f"{num} file{'s' if num > 1 else ''}"
    text += f" ({' × '.join(parts)})" if parts else ""
    text += f", {_bytes_text(sum(h.bytes for h in headers) / len(headers))} each; {first.count} band"
    text += f"{'s' if first.count > 1 else ''} of {first.dtype}, {shape} pixels"
    crs = sorted({(h.crs or "")[:40] for h in headers if h.bounds})
    if crs and first.bounds:
        text += f" of {first.resolution:.6g} {first.unit.name} in {', '.join(crs)}"
    if dates:
        text += f"; {dates[0]:%Y-%m-%d}" + (f" to {dates[-1]:%Y-%m-%d}" if len(dates) > 1 else "")
    tags = sorted(str(f"{n:g}") for n in nodata if n is not None)
    text += f"; nodata tag {', '.join(tags)}" if tags else "; no nodata tag"
    if values is not None:
        text += f"; values {values.low:g} to {values.high:g}, median {values.median:g}"
        text += f", {values.invalid:.0%} declared as not measured" if values.invalid >= 0.005 else ""
    return text


def _bytes_text(num: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num < 1000:
            return f"{num:.0f} {unit}"
        num /= 1000
    return f"{num:.1f} GB"
