"""Field names of a sample, the layout (shape and dtype) of each field, and the checks of a sample against its spec.

``<modality>`` (T, C, H, W) · ``<modality>.dates`` (T, 3) int16 · ``<modality>.mask`` (T, M, H, W) uint8 ·
``target.<name>`` · ``ref_date`` (3,) int16. A date is (year, day of year, hour). Every module that needs a field name
takes it from the functions here.

The layout is checked from headers, before anything is decoded: a few bytes of a compressed field can claim any shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from maestro_scale.datasets.spec import (
    MISSING_CLASS,
    DatasetError,
    DatasetSpec,
    Modality,
    Target,
    Tile,
)
from maestro_scale.errors import shorten

Layout = tuple[tuple[int, ...], str]  # shape, and name of the dtype

REF_DATE = "ref_date"
REF_DATE_LAYOUT: Layout = ((3,), "int16")
MAX_STORED_DATES = 32_768
"""Dates of a series in a tile. Hourly images of three years; more is a wrong axis, or made to exhaust memory."""
_TARGET_PREFIX = "target."


def dates_field(modality: str) -> str:
    """Name of the field with a modality's dates."""
    return f"{modality}.dates"


def mask_field(modality: str) -> str:
    """Name of the field with a modality's mask."""
    return f"{modality}.mask"


def target_field(target: str) -> str:
    """Name of the field with a target."""
    return f"{_TARGET_PREFIX}{target}"


def tile_fields(tile: Tile) -> dict[str, np.ndarray]:
    """The arrays of a tile by field name, sorted, so that the same tile gives the same bytes."""
    fields = {name: np.asarray(array) for name, array in sorted(tile.arrays.items())}
    fields |= {dates_field(m): np.asarray(a) for m, a in sorted(tile.dates.items())}
    fields |= {mask_field(m): np.asarray(a) for m, a in sorted(tile.masks.items())}
    fields |= {target_field(t): np.asarray(a) for t, a in sorted(tile.targets.items())}
    fields[REF_DATE] = np.asarray(tile.ref_date)
    return fields


def modality_layout(modality: Modality, num_dates: int) -> Layout:
    """Of a modality in a tile with ``num_dates`` dates of it."""
    return (num_dates, len(modality.bands), modality.size, modality.size), modality.dtype


def dates_layout(num_dates: int) -> Layout:
    """Of the dates of a modality."""
    return (num_dates, 3), "int16"


def mask_layout(modality: Modality, num_dates: int) -> Layout:
    """Of the mask of a modality that has mask bands."""
    return (num_dates, len(modality.mask_bands), modality.size, modality.size), "uint8"


def target_layout(target: Target, spec: DatasetSpec) -> Layout:
    """Of a target as it is stored."""
    if target.kind == "multilabel":
        return (len(target.classes),), "float32"
    dtype = {"segmentation": "uint8", "classification": "int16", "regression": "float32"}[target.kind]
    if not target.is_map:
        return (1,), dtype
    assert target.resolution_m is not None  # spec_problems requires it of a segmentation
    side = round(spec.tile_m / target.resolution_m)
    return (side, side), dtype


def check_tile(tile: Tile, spec: DatasetSpec) -> None:
    """Check a tile against its spec. DatasetError, naming tile and field, if they differ."""
    if not isinstance(tile.key, str) or not tile.key:
        raise DatasetError(f"a tile of {spec.name} has the key {tile.key!r}; a key is a non-empty string")
    fields = tile_fields(tile)
    check_layouts(
        tile.key, {name: (a.shape, str(a.dtype)) for name, a in fields.items()}, spec, absent_of(tile, spec)
    )
    for target in spec.targets:
        check_classes(tile.key, fields, target)


def absent_of(tile: Tile, spec: DatasetSpec) -> tuple[str, ...]:
    """The optional modalities that a tile lacks. DatasetError if it has none at all."""
    absent = tuple(m.name for m in spec.modalities if m.optional and m.name not in tile.arrays)
    if len(absent) == len(spec.modalities):
        raise DatasetError(f"tile {_shown(tile.key)}: has no modality at all", "no modality")
    return absent


def check_layouts(
    key: str, layouts: Mapping[str, Layout], spec: DatasetSpec, absent: Collection[str] = ()
) -> None:
    """Check names, shapes and dtypes of the fields of a sample. DatasetError, naming the field, if they differ.

    ``absent``: the modalities that it must lack.
    """
    expected = {REF_DATE, *(target_field(t.name) for t in spec.targets)}
    present = [m for m in spec.modalities if m.name not in absent]
    for modality in present:
        expected |= {modality.name, dates_field(modality.name)}
        expected |= {mask_field(modality.name)} if modality.mask_bands else set()
    for name in sorted(expected ^ layouts.keys()):
        what = "lacks" if name in expected else "has, unlike the spec,"
        where = f"{spec.name} has" if not absent else f"without {', '.join(absent)} it has"
        raise DatasetError(
            f"tile {_shown(key)}: {what} the field {_shown(name)}; {where} {', '.join(sorted(expected))}"
        )
    _check(key, REF_DATE, layouts, REF_DATE_LAYOUT)
    for modality in present:
        num_dates = stored_dates(key, modality, layouts[modality.name])
        _check(key, modality.name, layouts, modality_layout(modality, num_dates))
        _check(key, dates_field(modality.name), layouts, dates_layout(num_dates))
        if modality.mask_bands:
            _check(key, mask_field(modality.name), layouts, mask_layout(modality, num_dates))
    for target in spec.targets:
        _check(key, target_field(target.name), layouts, target_layout(target, spec))


def stored_dates(key: str, modality: Modality, layout: Layout) -> int:
    """Number of dates that a sample stores of a modality, by the layout of the field. DatasetError if there are none,
    or too many."""
    shape, _ = layout
    num_dates = shape[0] if len(shape) == 4 and modality.series else 1
    if num_dates == 0:
        raise DatasetError(f"tile {_shown(key)}: {modality.name} has no dates; leave this tile out")
    if num_dates > MAX_STORED_DATES:
        raise DatasetError(
            f"tile {_shown(key)}: {modality.name} has {num_dates} dates; at most {MAX_STORED_DATES} are read"
        )
    return num_dates


def check_classes(key: str, fields: Mapping[str, np.ndarray], target: Target) -> None:
    """DatasetError if a segmentation or classification contains a value that is neither a class nor ignored (nor, in a
    classification, missing); its layout was checked."""
    if target.kind not in ("segmentation", "classification"):
        return
    array = fields[target_field(target.name)]
    # The maximum first: np.unique sorts all pixels, and nearly all tiles pass this check.
    lowest = int(array.min()) if target.kind == "classification" else 0  # a segmentation is unsigned
    if lowest < 0 or int(array.max()) >= len(target.classes):
        missing = {MISSING_CLASS} if target.kind == "classification" else set()
        unknown = sorted(
            set(np.unique(array).tolist()) - set(range(len(target.classes))) - set(target.ignored) - missing
        )
        if unknown:
            raise DatasetError(
                f"tile {_shown(key)}: {target_field(target.name)} contains the value {unknown[0]}, which is neither "
                f"one of the {len(target.classes)} classes nor an ignored value"
            )


def _check(key: str, field: str, layouts: Mapping[str, Layout], expected: Layout) -> None:
    if layouts[field] != expected:
        (shape, dtype), (right_shape, right_dtype) = layouts[field], expected
        raise DatasetError(
            f"tile {_shown(key)}: {field} is {dtype} {shape}, expected {right_dtype} {right_shape}; fix the reader"
        )


def _shown(key: str) -> str:
    """A key in a message: as it is, unless it would fill or break the line."""
    return key if len(key) <= 100 and key.isprintable() else shorten(key)
