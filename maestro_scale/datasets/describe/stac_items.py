"""The rasters of a STAC file: assets of its first items, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.names import Family, File
from maestro_scale.datasets.describe.probe import Prober
from maestro_scale.datasets.describe.raster_draft import RasterDraft
from maestro_scale.datasets.describe.raster_masks import add_masks
from maestro_scale.datasets.describe.rasters import draft_raster
from maestro_scale.datasets.description.patterns import parse_date
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.stac import Item, items_of
from maestro_scale.datasets.spec import DatasetError

_MAX_ITEMS = 200
_SATELLITES = {
    "sentinel-1": "s1",
    "sentinel-2": "s2",
    "landsat": "landsat",
    "planet": "planet",
    "naip": "naip",
}
_WHOLE = (
    "data",
    "image",
    "analytic",
    "analytic_ms",
    "visual",
    "ortho",
)  # assets that hold all bands, usually
_IMAGES = (".tif", ".tiff", ".jp2", ".png")


def draft_items(src: str, path: str, prober: Prober) -> list[RasterDraft]:
    """The rasters of the items of a STAC file; DatasetError if it is none, or its assets cannot be read."""
    items = list(islice(items_of(remote.join(src, path), src), _MAX_ITEMS))
    if not items:
        raise DatasetError(f"{path}: has no items")
    names = Counter(
        n for item in items for n, h in item.assets.items() if h.split("?")[0].lower().endswith(_IMAGES)
    )
    bands = sorted((n for n in names if words.is_band(n)), key=words.band_order)
    whole = next((n for n in (*_WHOLE, *names) if n in names and n.lower() not in words.MASKS), None)
    chosen = bands or ([whole] if whole is not None else [])
    family = _family(items, path, chosen, bool(bands))
    draft = draft_raster(family, prober, family.words[0])
    if draft is None:
        raise DatasetError(
            f"{path}: none of the assets that were tried can be read ({', '.join(chosen[:5])})"
        )
    draft.files, draft.source = path, "stac"
    draft.variable = None if bands else whole
    draft.found = f"{len(items)} items; {draft.found}"
    for name in sorted(names):
        rule = words.MASKS.get(name.lower())
        if rule is not None:
            hrefs = [item.assets[name] for item in items if name in item.assets]
            add_masks(draft, rule, {"variable": name}, prober.values(hrefs))
    return [draft]


def _family(items: Sequence[Item], path: str, names: Sequence[str], band_each: bool) -> Family:
    files = []
    for item in items:
        date = _date(str(item.properties.get("datetime") or item.properties.get("start_datetime") or ""))
        files += [
            File(item.assets[n], None, date, n if band_each else None) for n in names if n in item.assets
        ]
    said = " ".join(
        str(items[0].properties.get(k, "")) for k in ("constellation", "platform", "mission")
    ).lower()
    sensor = next((name for text, name in _SATELLITES.items() if text in said), "image")
    return Family(path, tuple(files), (sensor,), "%Y-%m-%d")


def _date(text: str) -> datetime | None:
    try:
        year, day, hour = parse_date(re.sub(r"(\+00:00|Z)$", "", text), None)
    except ValueError:
        return None
    return datetime(year, 1, 1) + timedelta(days=day - 1, hours=hour)
