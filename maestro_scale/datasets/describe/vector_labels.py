"""Targets from vector files, and the area of interest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from maestro_scale.datasets.describe import labels
from maestro_scale.datasets.describe.draft import (
    Draft,
    TargetDraft,
    class_fields,
    count_text,
    counts_text,
    unique_name,
)
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.raster_draft import Note

_LABEL_PIXELS = 256  # of a label map, per side of a tile
_METADATA = re.compile(r"mtd|meta|dates|index|tiles|grid|split", re.IGNORECASE)  # vector files without labels


def draft_vectors(findings: Findings, draft: Draft) -> None:
    """Add a target for each file with labelled polygons, and the area of interest to the grid."""
    paths = [p for p in findings.listing.paths if p.lower().endswith(labels.VECTOR_SUFFIXES)]
    paths += [
        p for p in findings.listing.paths if p.lower().endswith(".parquet") and findings.is_geoparquet(p)
    ]
    findings.used.update(paths)
    if len(paths) > 20:
        findings.remarks.append(f"Not used: {len(paths)} vector files (one per tile?), first {paths[0]}.")
        return
    for path in paths:
        vector = findings.read(labels.read_vector, path)
        if isinstance(vector, str):
            findings.messages.append(f"{path}: cannot be read ({vector}); left out")
        elif vector.is_area and draft.grid is not None and "area" not in draft.grid:
            area: dict[str, object] = {"file": path, **_layer_and_crs(draft, vector)}
            draft.grid["area"] = area
            assumed = "" if vector.crs else "; crs is that of the images, since the file declares none"
            draft.grid_notes["area"] = Note(
                f"{vector.num_features} polygons; remove it to keep all tiles{assumed}", True
            )
        elif vector.label is None and _METADATA.search(Path(path).stem):
            findings.remarks.append(f"Not used: {path}, as it has no attribute with classes.")
        elif not vector.is_polygons:
            findings.remarks.append(f"Not used: {path} has {vector.geometry} features; labels need polygons.")
        elif any(r.bounds is None for r in draft.rasters):
            findings.remarks.append(f"Not used: {path}, since the images have no coordinates.")
        else:
            _vector_target(findings, draft, vector)


def _vector_target(findings: Findings, draft: Draft, vector: labels.Vector) -> None:
    column = vector.label
    stem = re.sub(r"[^A-Za-z0-9]+", "_", vector.layer or Path(vector.path).stem).strip("_").lower()
    name = unique_name(stem or "labels", [t.name for t in findings.targets])
    where: dict[str, object] = {"files": vector.path, **_layer_and_crs(draft, vector)}
    fields: dict[str, object] = {
        "kind": "segmentation",
        "vector": where,
        "resolution_m": _label_m(draft),
    }
    target = TargetDraft(name, fields, "")
    target.notes["resolution_m"] = Note("metres, a pixel of the label maps", True)
    if vector.crs is None:
        target.notes["vector"] = Note("crs is that of the images, since the file declares none", True)
    if column is None:
        classes = ["background", name]
        target.fields |= {"classes": classes, "outside": "background"}
        target.notes["classes"] = Note(
            "the polygons are one class; name an attribute under vector.column", True
        )
    else:
        where["column"] = column.name
        found = class_fields(column.values, column.is_text)
        listed = [*found["classes"], "unlabelled"]  # type: ignore[misc]
        target.fields |= {**found, "classes": listed, "ignored": ["unlabelled"]}
        others = [
            c.name for c in vector.columns if c.kind == "classes" and c is not column and len(c.values) > 1
        ]
        other = f"; other attributes: {', '.join(others[:5])}" if others else ""
        target.notes["classes"] = Note(f"the values of {column.name}{other}", True)
        target.notes["ignored"] = Note(
            "no label outside of the polygons; or a class of its own: outside: background", True
        )
    numbers = [c.name for c in vector.columns if c.kind == "number" and not c.is_integer]
    target.found = f"{count_text(vector.num_features, 'polygon')} in {_crs_text(vector.crs)}" + (
        f"; {column.name}: {counts_text(column.values)}" if column else ""
    )
    target.found += f"; numbers for kind: regression: {', '.join(numbers[:5])}" if numbers else ""
    findings.targets.append(target)


def _label_m(draft: Draft) -> float:
    """Pixel size of rasterised labels: that of the finest raster, or part of its patch if that is too fine."""
    finest = min(draft.sizes.rasters, key=lambda r: r.resolution_m)
    for factor in range(1, finest.patch + 1):
        if (
            finest.patch % factor == 0
            and draft.sizes.tile_m / (finest.resolution_m * factor) <= _LABEL_PIXELS
        ):
            return round(finest.resolution_m * factor, 6)
    return round(finest.resolution_m * finest.patch, 6)


def _layer_and_crs(draft: Draft, vector: labels.Vector) -> dict[str, object]:
    """Keys of a vector file: the layer if it has several, and a coordinate system if it declares none."""
    found: dict[str, object] = {"layer": vector.layer} if vector.layer else {}
    if vector.crs is None:
        found["crs"] = Counter(c for r in draft.rasters for c in sorted(r.crs)).most_common(1)[0][0]
    return found


def _crs_text(crs: str | None) -> str:
    return "an unknown CRS" if crs is None else crs if len(crs) < 40 else f"{crs[:40]}…"
