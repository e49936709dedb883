"""From files with like names to a raster of a description: bands, type, dates, masks and what is measured."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median_high

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Header, Prober, Values

_S2_USED = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
_S2_L2A = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
_S2_L1C = (*_S2_L2A[:10], "B10", *_S2_L2A[10:])
_PLANET_4 = ("B", "G", "R", "NIR")  # PlanetScope and SkySat 4-band products: blue, green, red, near-infrared
_PLANET_8 = ("coastal", "B", "green_i", "G", "yellow", "R", "rededge", "NIR")
_USUAL_RESOLUTION_M = {
    "s2": 10.0,
    "s1": 10.0,
    "landsat": 30.0,
    "planet": 3.0,
    "naip": 1.0,
    "spot": 1.5,
    "aerial": 0.2,
}
_LANDSAT_SCALE = (0.275, -2000.0)
"""Collection 2 surface reflectance is 2.75e-5 · DN - 0.2 (usgs.gov/landsat-missions, scale factors of Collection 2
level 2); here times 10,000, as Sentinel-2's."""
_S2_OFFSET_SINCE = datetime(2022, 1, 25)  # processing baseline 04.00


@dataclass
class Note:
    """What the draft says about a key; ``assumed``: it is a guess."""

    text: str
    assumed: bool = False


@dataclass
class Mask:
    """A mask band: the fields of a ``MaskRule``, and the note on it."""

    rule: dict[str, object]
    note: Note


@dataclass
class RasterDraft:
    """The fields of a raster in a description; ``notes``: by field."""

    name: str
    files: str
    key: str | None
    bands: list[tuple[str, int | str]]
    resolution_m: float
    dtype: str
    found: str
    series: bool = False
    num_dates: int = 1
    num_bands: int = 0  # of a file, without an alpha channel
    side: int = 0
    extent_m: float = 0.0
    keys: frozenset[str] = frozenset()
    dates: str | dict[str, str] | None = None
    nodata: tuple[float, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    quantity: str = "any"
    divisor: float | None = None
    resampling: str = "bilinear"
    required: bool = True
    elevation: bool = False
    axes: tuple[str, ...] | None = None
    source: str | None = None
    variable: str | None = None
    exclude: tuple[str, ...] = ()
    key_source: str | None = None
    masks: dict[str, Mask] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    crs: frozenset[str] = frozenset()
    bounds: tuple[float, float, float, float] | None = None  # of all files that were opened, in the CRS
    family: Family | None = None
    patch: int = 1

    def assume(self, key: str, text: str) -> None:
        """Note that ``key`` is a guess."""
        self.notes[key] = Note(text, assumed=True)


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


def sensor_of(family: Family) -> str | None:
    """The usual name of the sensor, by the words of the names, else by the names of the bands."""
    named = words.sensor_of(family.words)
    bands = {b.upper() for b in family.bands}
    if named is None and any(b.startswith(("SR_B", "ST_B")) for b in bands):
        return "landsat"
    if named is None and ("B8A" in bands or len({b for b in bands if re.fullmatch(r"B0\d", b)}) > 1):
        return "s2"
    return "s1" if named is None and bands and bands <= {"VV", "VH", "HH", "HV"} else named


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
        used = [(name, b) for name, b in named if name in _S2_USED]
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
    for usual in (_S2_USED, _S2_L2A, _S2_L1C):
        if count == len(usual):
            return usual, f"Sentinel-2, {order}"
    names = [f"band{i + 1}" for i in range(count)]
    stack = "; if they are the bands of one date after the other, set axes: [date, band, y, x] and name those of one"
    return names, f"the files name no bands{stack if count > 13 else ''}"


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


def attach_mask(draft: RasterDraft, family: Family, prober: Prober) -> None:
    """Add the masks of the files of ``family`` to the raster that they belong to."""
    rule = words.mask_rule(family.words) or "cloud"
    values = prober.values([f.path for f in family.files])
    files = {} if family.pattern == draft.files else {"files": family.pattern}
    key = {"key": family.key_template} if family.key_template and family.pattern != draft.files else {}
    headers = prober.headers([family.files[0].path])
    add_masks(draft, rule, {**files, **key}, values, headers[0].count if headers else 1)


def add_masks(
    draft: RasterDraft, rule: str, where: Mapping[str, object], values: Values | None, count: int = 1
) -> None:
    """Add the mask bands of a rule of ``words.MASKS``. ``where``: fields of the files; ``count``: their bands."""
    high = 0.0 if values is None else values.high
    found: dict[str, tuple[dict[str, object], str]] = {}
    if rule == "scl":
        found["cloud"] = (
            {"classes": [3, 8, 9, 10]},
            "cloud shadow, clouds of medium and high probability, cirrus",
        )
        found["snow"] = {"classes": [11]}, "snow"
    elif rule == "qa_pixel":
        found["cloud"] = {"bits": [1, 2, 3, 4]}, "dilated cloud, cirrus, cloud, cloud shadow"
        found["snow"] = {"bits": [5]}, "snow"
    elif rule == "fmask" and high <= 4:
        found["cloud"] = {"classes": [2, 4]}, "cloud shadow and cloud of Fmask"
        found["snow"] = {"classes": [3]}, "snow of Fmask"
    elif rule == "fmask":
        found["cloud"] = {"bits": [0, 1, 2, 3]}, "cirrus, cloud, beside a cloud, cloud shadow of HLS"
        found["snow"] = {"bits": [4]}, "snow of HLS"
    elif rule == "qa60":
        found["cloud"] = {"bits": [10, 11]}, "opaque clouds and cirrus"
    elif rule == "udm2" and count >= 6:
        found["cloud"] = {"band": 1, "above": 0, "invert": True}, "what Planet's UDM2 does not call clear"
        found["snow"] = {"band": 2, "above": 0}, "snow"
    elif rule in ("udm2", "udm"):
        found["cloud"] = {"above": 0}, "any bit of Planet's UDM"
    elif rule == "cloud_percent" or (1 < high <= 100):
        found["cloud"] = {"percent": True}, "cloud in percent"
    else:
        found["cloud"] = {"above": 0}, "what is not 0"
    for name, (fields, text) in found.items():
        draft.masks[name] = Mask(
            {**where, **fields}, Note(f"marks {text}", assumed=rule in ("cloud", "fmask", "udm"))
        )


def merge_resolutions(drafts: list[RasterDraft]) -> list[RasterDraft]:
    """Bands of one sensor in files of several resolutions (``B02_10m``, ``B05_20m``) as one raster at the finest.

    For scenes, which are warped to one grid in any case. A band that is there twice is taken at its finest.
    """
    merged: dict[str, list[RasterDraft]] = {}
    for d in drafts:
        general = _any_resolution(d.files)
        merged.setdefault(general if "{band}" in d.files else d.files, []).append(d)
    result = []
    for general, parts in merged.items():
        if len(parts) == 1:
            result.append(parts[0])
            continue
        parts.sort(key=lambda d: d.resolution_m)
        whole, names = parts[0], {n for n, _ in parts[0].bands}
        suffixes = [_resolution_suffix(d.files) for d in parts]
        if "" in suffixes:
            result += parts
            continue
        whole.files = general
        whole.bands = [(n, f"{b}{suffixes[0]}") for n, b in whole.bands]
        for part, suffix in zip(parts[1:], suffixes[1:], strict=True):
            whole.bands += [(n, f"{b}{suffix}") for n, b in part.bands if n not in names]
            names |= {n for n, _ in part.bands}
            whole.masks = {**part.masks, **whole.masks}
            whole.found += f"; {part.found}"
        used = [b for b in whole.bands if b[0] in _S2_USED]
        if len(used) >= 3:
            whole.bands = used
        whole.bands.sort(key=lambda b: words.band_order(b[0]))
        whole.assume(
            "bands", f"all bands at {whole.resolution_m:g} m; {{band}} stands for band and resolution"
        )
        result.append(whole)
    return result


def _any_resolution(pattern: str) -> str:
    pattern = re.sub(r"/R\d{1,3}m/", "/*/", pattern)
    return re.sub(r"\{band\}_R?\d{1,3}m", "{band}", pattern)


def _resolution_suffix(pattern: str) -> str:
    match = re.search(r"\{band\}(_R?\d{1,3}m)", pattern)
    return match[1] if match else ""


def np_kind(dtype: str) -> str:
    """The kind of a numpy type by its name: "f", "i" or "u"."""
    return "f" if dtype.startswith(("float", "complex")) else "u" if dtype.startswith("u") else "i"


def _union(bounds: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float, float] | None:
    if not bounds:
        return None
    west, south, east, north = zip(*bounds, strict=True)
    return min(west), min(south), max(east), max(north)


def _round_up(value: float) -> float:
    """The number of one or two digits at or above ``value``: a divisor."""
    if value <= 0:
        return 1.0
    exponent = 10.0 ** (len(str(int(value))) - 1) if value >= 1 else 0.1
    return float(f"{-(-value // exponent) * exponent:g}") or 1.0


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)


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
