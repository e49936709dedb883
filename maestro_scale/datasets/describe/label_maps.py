"""Targets from label maps: rasters of files, or arrays of containers, with a class or a number per pixel."""

from __future__ import annotations

from collections.abc import Sequence

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.arrays import LabelArray
from maestro_scale.datasets.describe.draft import Draft, TargetDraft, class_fields, dataset_name, unique_name
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.probe import Values
from maestro_scale.datasets.describe.raster_draft import Note

_MAX_LABELS = 64
_WORLDCOVER = {
    10: "tree_cover", 20: "shrubland", 30: "grassland", 40: "cropland", 50: "built_up", 60: "bare_or_sparse",
    70: "snow_and_ice", 80: "water", 90: "wetland", 95: "mangroves", 100: "moss_and_lichen",
}  # fmt: skip
"""Legend of ESA WorldCover (worldcover2021.esa.int, product user manual)."""


def draft_label_rasters(findings: Findings, draft: Draft) -> None:
    """Add a target for each family of label maps."""
    for family in findings.label_families:
        paths = [f.path for f in family.files]
        headers = findings.prober.headers(paths)
        values = findings.prober.values(paths, most=16, whole=True)
        if not headers or values is None:
            continue
        plain = [w.lower() for w in family.words if not w.isdigit()]
        name = words.label_of(family.words) or (plain[-1] if plain else "label")
        name = unique_name(name, [t.name for t in findings.targets])
        raster: dict[str, object] = {"files": family.pattern}
        if family.key_template or not (family.keys or draft.grid):
            raster["key"] = family.key_template or dataset_name(findings.src)
        resolution = headers[0].resolution_m or draft.sizes.tile_m / headers[0].width
        target = TargetDraft(name, {}, "")
        if values.distinct is None or len(values.distinct) > _MAX_LABELS:
            target.fields = {
                "kind": "regression",
                "raster": raster,
                "resolution_m": resolution,
                "units": "",
            }
            target.notes["kind"] = Note("numbers, since there are many values; write their units", True)
        else:
            target.fields = {"kind": "segmentation", "raster": raster, "resolution_m": resolution}
            _set_classes(target, values, headers[0].nodata, raster)
        target.found = (
            f"{len(paths)} files, {headers[0].dtype}, {headers[0].width}×{headers[0].height} pixels of "
            f"{resolution:g} m, {_values_text(values)}"
        )
        findings.targets.append(target)


def draft_label_arrays(findings: Findings, draft: Draft, found: Sequence[LabelArray]) -> None:
    """Add a target for each array of labels."""
    for label in found:
        array, values = label.array, label.array.values
        if values is None:
            continue
        name = unique_name(label.name, [t.name for t in findings.targets])
        if draft.grid is None and any(r.key == dataset_name(findings.src) for r in draft.rasters):
            label.where.setdefault("key", dataset_name(findings.src))
        resolution = array.resolution_m or draft.sizes.tile_m / array.size("x")
        target = TargetDraft(
            name,
            {"kind": "segmentation", "raster": label.where, "resolution_m": resolution},
            _values_text(values),
        )
        if values.distinct is None or len(values.distinct) > _MAX_LABELS:
            target.fields |= {"kind": "regression", "units": ""}
            target.notes["kind"] = Note("numbers, since there are many values; write their units", True)
        else:
            _set_classes(target, values, array.nodata, label.where)
        findings.targets.append(target)


def _set_classes(
    target: TargetDraft, values: Values, nodata: float | None, raster: dict[str, object]
) -> None:
    assert values.distinct is not None
    found = list(values.distinct)
    unlabelled = [v for v in found if v in (255, -1, -9999, 65535)]
    kept = [v for v in found if v not in unlabelled] or found
    if unlabelled:
        raster["nodata"] = unlabelled[0]
    known = _WORLDCOVER if len(kept) > 2 and set(kept) <= set(_WORLDCOVER) else None
    if min(kept) >= 0 and max(kept) < _MAX_LABELS and not known and max(kept) < 2 * len(kept) + 8:
        kept = list(range(max(kept) + 1))  # a class that the sample lacks may occur elsewhere
    fields = class_fields(dict.fromkeys(map(str, kept), 0), False, known)
    target.fields |= fields
    if unlabelled or nodata is not None:
        target.fields["classes"] = [*fields["classes"], "unlabelled"]  # type: ignore[misc]
        target.fields["ignored"] = ["unlabelled"]
        target.notes["ignored"] = Note("pixels without a label")
    said = "ESA WorldCover" if known else "write the names; other values are an error that names them"
    target.notes["classes"] = Note(said, True)


def _values_text(values: Values) -> str:
    if values.distinct is not None and len(values.distinct) <= 12:
        return f"values {', '.join(map(str, values.distinct))}"
    return f"values {values.low:g} to {values.high:g}"
