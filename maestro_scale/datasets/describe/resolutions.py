"""One raster of the bands of a sensor that are in files of several resolutions."""

from __future__ import annotations

import re

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.raster_bands import S2_USED
from maestro_scale.datasets.describe.raster_draft import RasterDraft


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
        used = [b for b in whole.bands if b[0] in S2_USED]
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
