"""The images of a description by tile: what is there for one split, found without opening files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.dates import ListedDates
from maestro_scale.datasets.description.patterns import Pattern
from maestro_scale.datasets.description.sections.images import ImageFiles, MaskRule
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.description.sections.splits import Splits
from maestro_scale.datasets.sources.listing import pattern_of
from maestro_scale.datasets.sources.opened import OpenFiles
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.sources.table import source_kind, source_of
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

_BY_NAME = ("geotiff", "netcdf", "hdf5", "zarr", "numpy")
"""Sources that list files which match the pattern."""


@dataclass(frozen=True)
class SectionImages:
    """The images of one section. ``where``: its key in the description, for messages. ``by_key``: in no order.
    ``files``: those of them that are open."""

    where: str
    section: ImageFiles
    by_key: Mapping[str, tuple[ImageRef, ...]]
    dates: ListedDates
    files: OpenFiles = field(default_factory=OpenFiles, compare=False, repr=False)


def sections(description: Description) -> dict[str, ImageFiles]:
    """The sections with images by their key in the description: rasters, masks with their files, label images."""
    found: dict[str, ImageFiles] = {}
    for name, raster in description.rasters.items():
        if raster is None:
            continue
        found[f"rasters.{name}"] = raster
        for mask, rule in raster.masks.items():
            found[f"rasters.{name}.masks.{mask}"] = mask_section(raster, rule)
    for name, target in description.targets.items():
        if target is not None and (images := target.label_section) is not None:
            found[f"targets.{name}.raster"] = images
    return found


def optional_sections(description: Description) -> frozenset[str]:
    """The keys of those sections of which there may be no image: rasters that are not required, and their masks."""
    optional = [n for n, r in description.rasters.items() if r is not None and r.required is False]
    return frozenset(
        w for w in sections(description) for n in optional if f"{w}.".startswith(f"rasters.{n}.")
    )


def mask_section(raster: Raster, rule: MaskRule) -> MaskRule:
    """The rule with what it takes from its raster: the files if it has none of its own, and how they are read."""
    shared = {"key", "crs"}
    if rule.files is None:
        shared |= {"files", "source", "variable", "axes", "bands_per_date", "keys", "window"}
        if raster.dates is not None and raster.dates.from_ == "coordinate":
            shared.add("dates")
    return rule.model_copy(update={n: getattr(raster, n) for n in shared if getattr(rule, n) is None})


def list_sections(
    description: Description, src: str, split: str, by_tile: bool = True
) -> dict[str, SectionImages]:
    """The images of all sections that belong to ``split``, by their key in the description.

    A file that matches the patterns of several sections is of the one with the most literal text: ``a_mask.tif`` is of
    ``{key}_mask.tif``, not of ``{key}.tif``. ``by_tile``: whether every image needs a key; if not, those without have
    the key "". DatasetError if a section has no images, or images without a key.
    """
    every, optional = sections(description), optional_sections(description)
    patterns = {where: _pattern(section) for where, section in every.items()}
    found = {}
    for where, section in every.items():
        mine = patterns[where]
        closer = {p.text: p for p in patterns.values() if mine and p and p.num_literal > mine.num_literal}
        found[where] = _list_section(
            where,
            section,
            src,
            split,
            description.splits,
            by_tile,
            list(closer.values()),
            where not in optional,
        )
    return found


def _pattern(section: ImageFiles) -> Pattern | None:
    """The pattern of the section's files; None if they are not matched by name."""
    return pattern_of(section) if source_kind(section) in _BY_NAME else None


def _list_section(
    where: str,
    section: ImageFiles,
    src: str,
    split: str,
    splits: Splits,
    by_tile: bool,
    closer: Sequence[Pattern],
    required: bool,
) -> SectionImages:
    called = set(names_of(split, splits))
    by_key: dict[str, list[ImageRef]] = {}
    others: set[str] = set()
    start = len(src.rstrip("/")) + 1
    for ref in source_of(section).list_images(section, src):
        if ref.split is not None and ref.split not in called:
            others.add(ref.split)
            continue
        if closer and any(p.regex.fullmatch(ref.address[start:]) for p in closer):
            continue
        if ref.key is None and by_tile:
            raise DatasetError(
                f"{where}.files: {section.files} says no tile: add {{key}}, or key: with names of the pattern, or "
                "grid: to cut tiles from scenes"
            )
        by_key.setdefault(ref.key or "", []).append(ref)
    if not by_key and required:
        if others:
            raise DatasetError(
                f"{where}.files: no file of split {split!r}; there are files of {_listed(sorted(others))}; say what it "
                f"is called: splits.names.{split}"
            )
        raise DatasetError(
            f"{where}.files: no file matches {section.files} in {src}{_what_is_there(section, src)}"
        )
    return SectionImages(
        where, section, {k: tuple(v) for k, v in by_key.items()}, ListedDates.load(section, src)
    )


def names_of(split: str, splits: Splits) -> tuple[str, ...]:
    """What a split may be called in files, folders and tables."""
    return splits.names.get(split, (split,))


def _what_is_there(section: ImageFiles, src: str) -> str:
    """The first names in the deepest folder of the pattern that is there, for a message."""
    files = section.files or ""
    if "://" in src or "://" in files:
        return ""
    folder = src
    for part in files.split("/")[:-1]:
        if not os.path.isdir(os.path.join(folder, part)):
            break
        folder = os.path.join(folder, part)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f": {folder} cannot be listed ({error.strerror})"
    if not names:
        return f": {folder} is empty"
    return f"; {folder} holds {_listed([shorten(n) for n in names])}"


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def keys_of(images: Iterable[SectionImages]) -> list[str]:
    """The sorted keys that at least one of these has."""
    return sorted({key for section in images for key in section.by_key})
