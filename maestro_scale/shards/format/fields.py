"""Field names of a sample, and checks of dtype and shape for each field.

``<modality>`` (T, C, H, W) · ``<modality>.dates`` (T, 3) int16 · ``<modality>.mask`` (T, M, H, W) uint8 ·
``target.<name>`` · ``ref_date`` (3,) int16. A date is (year, day of year, hour). Every module that needs a field name
takes it from the functions here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Target, Tile

REF_DATE = "ref_date"
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


def check_tile(tile: Tile, spec: DatasetSpec) -> None:
    """Check a tile against its spec. DatasetError, naming tile and field, if they differ."""
    if not isinstance(tile.key, str) or not tile.key:
        raise DatasetError(f"a tile of {spec.name} has the key {tile.key!r}; a key is a non-empty string")
    check_fields(tile.key, tile_fields(tile), spec)


def check_fields(key: str, fields: Mapping[str, np.ndarray], spec: DatasetSpec) -> None:
    """Like :func:`check_tile`, for the fields of a sample by name."""
    expected = {REF_DATE, *(target_field(t.name) for t in spec.targets)}
    for modality in spec.modalities:
        expected |= {modality.name, dates_field(modality.name)}
        expected |= {mask_field(modality.name)} if modality.mask_bands else set()
    for name in sorted(expected ^ fields.keys()):
        what = "lacks" if name in expected else "has, unlike the spec,"
        raise DatasetError(
            f"tile {key}: {what} the field {name}; {spec.name} has {', '.join(sorted(expected))}"
        )
    _check(key, REF_DATE, fields[REF_DATE], "int16", (3,))
    for modality in spec.modalities:
        _check_modality(key, fields, modality)
    for target in spec.targets:
        _check_target(key, fields[target_field(target.name)], target, spec)


def _check_modality(key: str, fields: Mapping[str, np.ndarray], modality: Modality) -> None:
    name, size = modality.name, modality.size
    array = fields[name]
    num_dates = array.shape[0] if array.ndim == 4 and modality.series else 1
    if num_dates == 0:
        raise DatasetError(f"tile {key}: {name} has no dates; leave this tile out")
    _check(key, name, array, modality.dtype, (num_dates, len(modality.bands), size, size))
    _check(key, dates_field(name), fields[dates_field(name)], "int16", (num_dates, 3))
    if modality.mask_bands:
        field = mask_field(name)
        _check(key, field, fields[field], "uint8", (num_dates, len(modality.mask_bands), size, size))


def _check_target(key: str, array: np.ndarray, target: Target, spec: DatasetSpec) -> None:
    field = target_field(target.name)
    if target.kind == "multilabel":
        _check(key, field, array, "float32", (len(target.classes),))
        return
    shape = array.shape
    if target.resolution_m is not None:
        side = round(spec.tile_m / target.resolution_m)
        shape = (side, side)
    if len(shape) != 2 or array.size == 0:
        raise DatasetError(f"tile {key}: {field} has shape {array.shape}, expected (H, W)")
    _check(key, field, array, "uint8", shape)
    # The maximum first: np.unique sorts all pixels, and nearly all tiles pass this check.
    highest = int(array.max())
    if highest >= len(target.classes):
        unknown = sorted(
            set(np.unique(array).tolist()) - set(range(len(target.classes))) - set(target.ignored)
        )
        if unknown:
            raise DatasetError(
                f"tile {key}: {field} contains the value {unknown[0]}, which is neither one of the "
                f"{len(target.classes)} classes nor an ignored value"
            )


def _check(key: str, field: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> None:
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise DatasetError(
            f"tile {key}: {field} is {array.dtype} {array.shape}, expected {dtype} {shape}; fix the reader"
        )
