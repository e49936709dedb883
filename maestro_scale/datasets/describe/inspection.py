"""Inspects a folder: groups its files, opens some of them, and puts together the draft of a description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.datasets.describe.arrays import draft_arrays
from maestro_scale.datasets.describe.draft import Draft, TargetDraft, count_text, counts_text, dataset_name
from maestro_scale.datasets.describe.files import list_source
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.grid import are_scenes, draft_grid, sizes_of_samples
from maestro_scale.datasets.describe.label_maps import draft_label_arrays, draft_label_rasters
from maestro_scale.datasets.describe.probe import Prober
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.raster_families import exclude_others, find_rasters
from maestro_scale.datasets.describe.resolutions import merge_resolutions
from maestro_scale.datasets.describe.split_drafts import propose_splits
from maestro_scale.datasets.describe.stac_items import draft_items
from maestro_scale.datasets.describe.table_labels import draft_tables
from maestro_scale.datasets.describe.tar_labels import draft_tar_targets, give_tar_dates
from maestro_scale.datasets.describe.vector_labels import draft_vectors
from maestro_scale.datasets.spec import DatasetError

_ORDER = ("aerial", "naip", "spot", "planet", "s2", "", "landsat", "s1", "dem")
"""Of rasters by the begin of their names: the first one gives the grid; empty: all others."""


def inspect(src: str, blocks: bool = False) -> Draft:
    """The draft of a folder, an address or a single file; DatasetError (one line) if nothing could be described.

    ``blocks``: propose splits by blocks of ground as part of the description.
    """
    listing = list_source(src)
    findings = Findings(listing, Prober(listing.src))
    rasters = find_rasters(findings)
    arrays = draft_arrays(findings.src, listing.paths)
    rasters += arrays.rasters
    findings.messages += arrays.messages
    findings.used.update(arrays.used)
    if not rasters:
        rasters = _stac(findings)
    if not rasters:
        raise DatasetError(_nothing(findings))
    rasters.sort(key=lambda r: _ORDER.index(name) if (name := r.name.split("_")[0]) in _ORDER else 5)
    is_scenes = are_scenes(findings, rasters)
    if is_scenes:
        rasters = merge_resolutions(rasters)
    else:
        for r in rasters:
            _give_key(findings, r)
    exclude_others(rasters, listing.paths)
    sizes = sizes_of_samples(rasters, is_scenes)
    tars = give_tar_dates(findings, rasters)
    _give_dates(findings, rasters)
    draft = Draft(
        name=dataset_name(findings.src),
        source=findings.src,
        header=_header(findings, rasters, is_scenes),
        rasters=rasters,
        sizes=sizes,
    )
    if is_scenes:
        draft_grid(findings, draft)
    draft_label_rasters(findings, draft)
    draft_label_arrays(findings, draft, arrays.labels)
    draft_vectors(findings, draft)
    draft_tar_targets(findings, tars)
    draft_tables(findings, draft)
    _class_folders(findings, draft)
    propose_splits(draft, blocks)
    draft.targets = findings.targets
    draft.remarks, draft.messages = findings.remarks, findings.messages
    return draft


def _stac(findings: Findings) -> list[RasterDraft]:
    """Of the first STAC file, in a folder without images of its own."""
    paths = sorted(
        (p for p in findings.listing.paths if p.lower().endswith(".json")), key=lambda p: (p.count("/"), p)
    )
    for path in paths[:5]:
        try:
            return draft_items(findings.src, path, findings.prober)
        except DatasetError as error:
            findings.messages.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
    return []


def _give_key(findings: Findings, raster: RasterDraft) -> None:
    """A key for images of one place, whose names say none."""
    several = "key" in (raster.axes or ()) or raster.files.endswith((".parquet", ".tar"))
    if not raster.keys and not several:
        raster.key = dataset_name(findings.src)
        raster.assume("key", "nothing names a tile, so all images are of one")


def _give_dates(findings: Findings, rasters: Sequence[RasterDraft]) -> None:
    """Rasters without dates get that of the others, or a constant."""
    dated = [r for r in rasters if r.family is not None and r.family.date_format]
    for r in rasters:
        if r in dated or (r.dates is not None and (dated or r.dates != {"from": "reference"})):
            continue
        days = sorted(f.date for d in dated if d.family for f in d.family.files if f.date)
        day = f"{days[len(days) // 2]:%Y-%m-%d}" if days else "2020-07-01"
        r.dates = {"from": "constant", "date": day}
        r.assume(
            "dates",
            "nothing says when; write the date, or a table: {from: csv, file: dates.csv, column: date}",
        )


def _header(findings: Findings, rasters: Sequence[RasterDraft], is_scenes: bool) -> str:
    suffixes = Counter(Path(p).suffix.lower() or "no suffix" for p in findings.listing.paths)
    counts = ", ".join(
        f"{n} {s}" for s, n in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:6]
    )
    more = "" if findings.listing.complete else f" (of at least {findings.listing.num_seen}: a sample)"
    form = "scenes, which are cut into tiles" if is_scenes else "tiles, each in its own files"
    return f"Found: {count_text(len(findings.listing.paths), 'file')}{more}: {counts}. Taken as {form}."


def _nothing(findings: Findings) -> str:
    suffixes = Counter(Path(p).suffix.lower() or "no suffix" for p in findings.listing.paths).most_common(4)
    found = ", ".join(f"{n} {s}" for s, n in suffixes)
    if findings.prober.unreadable:
        path, reason = next(iter(sorted(findings.prober.unreadable.items())))
        return (
            f"{findings.src}: none of {len(findings.prober.unreadable)} images can be read, first {path} ({reason}); "
            "fetch them again"
        )
    if "manifest.json" in findings.listing.paths:
        return f"{findings.src}: holds shards of a dataset; --recipe prints a first recipe for them"
    return (
        f"{findings.src}: holds no images that could be described ({found or 'it is empty'}); give a folder with "
        "GeoTIFF, JPEG 2000, PNG, NetCDF, HDF5, Zarr, NumPy, Parquet or tar files, or a STAC file"
    )


def _class_folders(findings: Findings, draft: Draft) -> None:
    """Folders that name classes, if nothing else is a label."""
    for r in draft.rasters:
        family = r.family
        if family is None or "{class}" not in r.files:
            continue
        if findings.targets or draft.grid is not None or r is not draft.rasters[0]:
            r.files = r.files.replace("{class}", "*")
            continue
        target = TargetDraft(
            "class",
            {"kind": "classification", "name": "class", "classes": list(family.folders)},
            f"folders: {counts_text(family.folders)} files",
        )
        target.notes["kind"] = Note("the folders are classes; remove it if they are not", True)
        findings.targets.append(target)
