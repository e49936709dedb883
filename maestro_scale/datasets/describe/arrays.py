"""From files with arrays (NetCDF, HDF5, Zarr, NumPy, Parquet, tars) to rasters, masks and labels of a description."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.containers import Array, read_arrays, suffix_of
from maestro_scale.datasets.describe.draft import unique_name
from maestro_scale.datasets.describe.names import Family, families
from maestro_scale.datasets.describe.probe import Header
from maestro_scale.datasets.describe.raster_bands import canonical_band, set_bands
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.raster_masks import add_masks
from maestro_scale.datasets.describe.raster_quantity import set_quantity
from maestro_scale.datasets.describe.rasters import usual_resolution_m
from maestro_scale.datasets.describe.units import METRES


@dataclass(frozen=True)
class LabelArray:
    """An array of labels, and where it is: the fields of an ``ImageFiles`` section."""

    name: str
    array: Array
    where: dict[str, object]


@dataclass
class Found:
    """What the files hold. ``messages``: one for each file that cannot be read. ``used``: files with arrays."""

    rasters: list[RasterDraft]
    labels: list[LabelArray]
    messages: list[str]
    used: list[str]


def draft_arrays(src: str, paths: Sequence[str]) -> Found:
    """Rasters and labels of the files with arrays among ``paths``."""
    found = Found([], [], [], [])
    chosen = [p for p in paths if suffix_of(p)]
    labels: list[tuple[Family, Array]] = []
    for family in families(chosen, lambda path: None):
        first = family.files[len(family.files) // 2].path
        arrays = read_arrays(src, first)
        if isinstance(arrays, str):
            if not first.lower().endswith(".parquet"):  # others are tables
                found.messages.append(f"{first}: {arrays}; files like it are left out")
            continue
        found.used += [f.path for f in family.files]
        labels += _sort_out(found, family, _joined(arrays))
    for family, array in labels:
        constant = _words(array.variable) or family.words[-1:]
        if found.rasters:
            name = "_".join(constant).lower() or "labels"
            found.labels.append(LabelArray(name, array, _where(family, array)))
        else:
            found.rasters.append(_draft(family, array, constant, []))
    return found


def _words(variable: str | None) -> tuple[str, ...]:
    return tuple(re.findall(r"[0-9A-Za-z]+", variable or ""))


def _joined(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, those of one band each (``B04``, ``vv``) joined to one with the variable ``{band}``, by shape."""
    single: dict[object, list[Array]] = {}
    for array in arrays:
        if array.variable and words.is_band(array.variable) and array.size("band") == 1:
            single.setdefault((array.shape, array.dtype), []).append(array)
    joined = [some for some in single.values() if len(some) > 1]
    merged = []
    for some in joined:
        names = sorted((a.variable or "" for a in some), key=words.band_order)
        merged.append(replace(some[0], variable="{band}", band_names=tuple(names)))
    return [*merged, *(a for a in arrays if not any(a in some for some in joined))]


def _sort_out(found: Found, family: Family, arrays: Sequence[Array]) -> list[tuple[Family, Array]]:
    """Adds the rasters of a file, with their masks, to ``found``; returns the labels."""
    masks: list[tuple[Array, str]] = []
    labels: list[tuple[Family, Array]] = []
    rasters: list[RasterDraft] = []
    for array in arrays:
        constant = _words(array.variable)
        role = words.role_of(constant or family.words)
        rule = words.mask_rule((array.variable or "", *constant)) or (
            "cloud" if "cloud" in constant else None
        )
        if rule is not None and len(arrays) > 1:
            masks.append((array, rule))
        elif role == "label":
            labels.append((family, array))
        elif role != "skip":
            rasters.append(_draft(family, array, constant, [r.name for r in (*found.rasters, *rasters)]))
    for array, rule in masks:
        same = [r for r in rasters if r.side == min(array.size("y"), array.size("x"))]
        for raster in same[:1]:
            where = {k: v for k, v in _where(family, array).items() if k not in ("files", "key")}
            add_masks(raster, rule, where, array.values)
    found.rasters += rasters
    return labels


def _where(family: Family, array: Array) -> dict[str, object]:
    where: dict[str, object] = {"files": family.pattern}
    if family.key_template:
        where["key"] = family.key_template
    if array.variable:
        where["variable"] = array.variable
    if array.axes != ("band", "y", "x"):
        where["axes"] = list(array.axes)
    if array.keys and "key" in array.axes:
        where["keys"] = array.keys
    return where


def _draft(family: Family, array: Array, constant: tuple[str, ...], taken: Sequence[str]) -> RasterDraft:
    named = replace(family, words=(*family.words, *constant))
    sensor = words.sensor_of(constant) or words.sensor_of(family.words)
    plain = [w for w in named.words if re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,20}", w) and not words.is_band(w)]
    name = unique_name(sensor or (plain[-1].lower() if plain else "image"), taken)
    height, width, count = (array.size(axis) for axis in ("y", "x", "band"))
    header = Header(
        width=width, height=height, count=count, dtype=array.dtype, crs=array.crs, unit=METRES,
        resolution=array.resolution_m or 1.0, bounds=None, nodata=array.nodata, has_mask=False, has_alpha=False,
        band_names=array.band_names, scale=array.scale, offset=array.offset, datetime="", blocks=(height, width),
        bytes=0,
    )  # fmt: skip
    draft = RasterDraft(
        name=name,
        files=family.pattern,
        key=family.key_template,
        bands=[],
        resolution_m=array.resolution_m or usual_resolution_m(sensor),
        dtype=array.dtype,
        found="",
        num_bands=count,
        side=min(height, width),
        keys=frozenset(family.keys),
        family=named,
        variable=array.variable,
        axes=array.axes if array.axes != ("band", "y", "x") else None,
        key_source=array.keys if "key" in array.axes or family.pattern.endswith(".parquet") else None,
        series="date" in array.axes and array.size("date") > 1,
        num_dates=array.size("date"),
    )
    draft.extent_m = draft.side * draft.resolution_m
    if not family.keys and "key" not in array.axes and array.bounds is not None:
        draft.bounds, draft.crs = array.bounds, frozenset([array.crs or ""])
    if array.resolution_m is None:
        draft.assume("resolution_m", "the files do not say; write the size of a pixel in metres")
    if array.variable == "{band}":
        draft.bands = [(canonical_band(b, sensor), b) for b in array.band_names]
    else:
        set_bands(draft, named, [header], sensor)
    set_quantity(draft, named, sensor, array.values, [header])
    if not array.named and not family.pattern.endswith((".tar", ".parquet")):
        draft.assume("axes", "the files do not name their axes; these follow from the shape")
        draft.axes = array.axes
    _set_dates(draft, family, array)
    shape = "×".join(map(str, array.shape))
    values = array.values
    spread = "" if values is None else f"; values {values.low:g} to {values.high:g}, median {values.median:g}"
    tag = "no fill value declared" if array.nodata is None else f"fill value {array.nodata:g}"
    number = len(family.files)
    draft.found = (
        f"{number} file{'s' if number > 1 else ''}; {array.dtype} {shape} ({', '.join(array.axes)}); "
    )
    draft.found += tag + spread
    if height != width and draft.bounds is None:
        draft.notes["files"] = Note(
            f"images of {height}×{width} pixels are not square: set window, or cut them", True
        )
    return draft


def _set_dates(draft: RasterDraft, family: Family, array: Array) -> None:
    by_key = Counter(f.key for f in family.files if f.date)
    if by_key:
        draft.series = draft.series or max(by_key.values()) > 1
        draft.num_dates = max(draft.num_dates, max(by_key.values()))
    elif array.dates:
        draft.dates = {"from": "coordinate", "coordinate": array.dates}
