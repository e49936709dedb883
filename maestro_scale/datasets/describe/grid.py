"""Whether images are tiles or scenes; the grid on which scenes are cut, and the sizes of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from maestro_scale.datasets.describe.draft import Draft
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.sizes import Input, Sizes, sizes_of_scenes, sizes_of_tiles
from maestro_scale.datasets.describe.units import Unit, lon_lat, unit_of
from maestro_scale.datasets.scenes.ground import utm_crs

_SCENE_SIDE = 1500  # pixels: larger images are no tiles
_FEW_PLACES, _FEW_SIDE = 50, 200  # nor are a few images of at least this side


def are_scenes(findings: Findings, rasters: Sequence[RasterDraft]) -> bool:
    """Whether images are to be cut into tiles, rather than tiles themselves."""
    if any(r.bounds is None for r in rasters):
        return False  # arrays of several places, and images without coordinates
    if not all(r.keys for r in rasters) or any(_is_map(findings, f) for f in findings.label_families):
        return True  # what names no place shows all of it
    headers = [findings.prober.headers([f.path for f in r.family.files]) for r in rasters if r.family]
    sides = [max(h.width, h.height) for some in headers for h in some]
    if max(sides) > _SCENE_SIDE:
        return True
    shapes = [{(h.width, h.height) for h in some} for some in headers]
    squares = all(len(shape) == 1 and len(set(next(iter(shape)))) == 1 for shape in shapes)
    extents = [r.extent_m for r in rasters]
    equal = max(extents) - min(extents) <= max(r.resolution_m for r in rasters)
    places = max(len(r.keys) for r in rasters)
    if not (squares and equal):
        return True
    return places < _FEW_PLACES and max(sides) >= _FEW_SIDE


def sizes_of_samples(rasters: Sequence[RasterDraft], is_scenes: bool) -> Sizes:
    """The extent of a tile and of a sample, and the patches of each raster."""
    inputs = [Input(r.resolution_m, r.num_dates if r.series else 1, r.side) for r in rasters]
    if is_scenes:
        return sizes_of_scenes(inputs)
    tile_m = max(r.extent_m for r in rasters)
    return sizes_of_tiles(inputs, round(tile_m, 6))


def draft_grid(findings: Findings, draft: Draft) -> None:
    """Set the grid of a draft, with its notes and the number of tiles."""
    rasters = draft.rasters
    metric = [r for r in rasters if r.crs and all(u.is_metre for u in _units(r))]
    crs = Counter(c for r in metric for c in sorted(r.crs)).most_common(1)
    grid: dict[str, object] = {}
    bounds = rasters[0].bounds
    assert bounds is not None
    if crs:
        grid["crs"] = crs[0][0]
        others = sorted({c for r in rasters for c in r.crs} - {crs[0][0]})
        draft.grid_notes["crs"] = (
            Note(f"most files have it, others {', '.join(c[:30] for c in others)}: they are warped", True)
            if others
            else Note("all files have it")
        )
    else:
        grid["crs"] = utm_crs(*lon_lat(sorted(rasters[0].crs)[0], bounds))
        names = " and ".join(sorted({u.name for u in _units(rasters[0])}))
        draft.grid_notes["crs"] = Note(
            f"the files are in {names}; UTM of their middle. Any system in metres on the ground", True
        )
    grid["min_valid"] = 0.5
    draft.grid_notes["min_valid"] = Note("an image must cover half of a tile with valid pixels", True)
    draft.grid = grid
    (west, south, east, north), unit_m = bounds, max(u.ground_m for u in _units(rasters[0]))
    area = (east - west) * (north - south) * unit_m**2
    draft.num_tiles = max(1, int(area / draft.sizes.tile_m**2))
    smallest = min((r.side * r.resolution_m for r in rasters), default=0)
    if smallest < draft.sizes.tile_m:
        findings.remarks.append(
            f"The smallest image is {smallest:g} m wide, less than a tile: make tile_m smaller."
        )


def _is_map(findings: Findings, family: Family) -> bool:
    """Whether the files of a family have coordinates, but no keys."""
    return not family.keys and any(h.bounds for h in findings.prober.headers([f.path for f in family.files]))


def _units(raster: RasterDraft) -> list[Unit]:
    """The units of the systems of a raster's files, where these lie."""
    assert raster.bounds is not None
    return [unit_of(crs, raster.bounds) for crs in sorted(raster.crs)]
