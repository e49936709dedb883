"""Drafts of rasters from the families of a folder's files: images, their masks, and which families are labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.draft import unique_name
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.names import Family, families
from maestro_scale.datasets.describe.probe import SUFFIXES
from maestro_scale.datasets.describe.raster_bands import sensor_of
from maestro_scale.datasets.describe.raster_draft import RasterDraft
from maestro_scale.datasets.describe.raster_masks import attach_mask
from maestro_scale.datasets.describe.rasters import draft_raster
from maestro_scale.datasets.description.patterns import Pattern


def find_rasters(findings: Findings) -> list[RasterDraft]:
    """The rasters of image files, with their masks; families that are labels go to ``findings``."""
    paths = [p for p in findings.listing.paths if p.lower().endswith(SUFFIXES)]
    rasters: list[RasterDraft] = []
    masks: list[Family] = []
    skipped: list[Family] = []
    for family in families(paths, findings.prober.kind):
        role = words.role_of(family.words)
        if role == "mask":
            masks.append(family)
        elif role == "skip":
            skipped.append(family)
        elif role == "label" or (role == "area"):
            findings.label_families.append(family)
        else:
            name = _raster_name(family, [r.name for r in rasters])
            raster = draft_raster(family, findings.prober, name)
            if raster is not None:
                rasters.append(raster)
    if not rasters and findings.label_families:  # a folder called masks may hold nothing else
        family = findings.label_families.pop(0)
        raster = draft_raster(family, findings.prober, _raster_name(family, []))
        rasters += [raster] if raster is not None else []
    _attach(findings, masks, rasters)
    for path, reason in sorted(findings.prober.unreadable.items()):
        findings.messages.append(f"{path}: cannot be read ({reason}); left out")
    if skipped:
        findings.remarks.append(
            f"Not used: {', '.join(f.pattern for f in skipped[:6])}{' …' * (len(skipped) > 6)}"
        )
    return _without_labels(findings, rasters)


def exclude_others(rasters: Sequence[RasterDraft], paths: Sequence[str]) -> None:
    """Where the pattern of a raster also matches files of others, leave those out."""
    for r in rasters:
        family = r.family
        assert family is not None
        own = {f.path for f in family.files}
        if "{band}" in r.files or r.variable is not None or r.source == "stac":
            continue  # bands are listed by name
        pattern = Pattern(r.files, (), r.key)
        others = [p for p in paths if p not in own and pattern.match(p)]
        if others:
            ends = sorted({_ending(p, [f.path for f in family.files]) for p in others})
            r.exclude = tuple(ends[:20])


def _raster_name(family: Family, taken: Sequence[str]) -> str:
    sensor = sensor_of(family)
    plain = [
        w for w in family.words if re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,20}", w) and not words.is_band(w)
    ]
    return unique_name(sensor or (plain[-1].lower() if plain else "image"), taken)


def _attach(findings: Findings, masks: Sequence[Family], rasters: Sequence[RasterDraft]) -> None:
    """Each mask belongs to the raster whose pattern has the most in common with its own."""
    for family in masks:
        dated = [r for r in rasters if r.family and bool(r.family.date_format) == bool(family.date_format)]
        if not dated:
            findings.remarks.append(f"Not used, since no raster has dates like it: {family.pattern}")
            continue
        sensor = sensor_of(family)
        best = max(
            dated,
            key=lambda r: (
                r.family is not None and sensor_of(r.family) == sensor,
                _common(r.files, family.pattern),
            ),
        )
        attach_mask(best, family, findings.prober)


def _without_labels(findings: Findings, rasters: list[RasterDraft]) -> list[RasterDraft]:
    """Without images of few integers that lie beside images of one date or more: they are labels."""
    kept = []
    for r in rasters:
        family = r.family
        assert family is not None
        values = None
        if (
            len(rasters) > 1
            and len(r.bands) == 1
            and not family.date_format
            and r.dtype.strip("u").startswith("int")
        ):
            values = findings.prober.values([f.path for f in family.files], whole=True)
        few = values is not None and values.distinct is not None and 2 <= len(values.distinct) <= 32
        if few and sensor_of(family) is None:
            findings.label_families.append(family)
        else:
            kept.append(r)
    return kept or rasters


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ending(path: str, own: Sequence[str]) -> str:
    """A pattern for a file and those like it: the part of its name that no own file has."""
    folder, _, name = path.rpartition("/")
    tokens = re.findall(r"[A-Za-z]+|[^A-Za-z]+", name)
    mine = {t for p in own for t in re.findall(r"[A-Za-z]+", p.rpartition("/")[2])}
    other = next((t for t in tokens if t.isalpha() and t not in mine), None)
    prefix = "**/" if folder else ""
    return f"{prefix}*{other}*" if other else path
