"""Checks of the values in the fields of a sample, by which a tile is stored and ``verify`` reads it again.

Every way to write shards ends in :func:`checked_tile`: readers, descriptions, ``Writer`` and ``write_shards``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from maestro_scale.datasets.fill import action, invalid_note, invalid_values, remarkable_values, with_marks
from maestro_scale.datasets.quantity import QUANTITY_KINDS, Quantity
from maestro_scale.datasets.spec import MISSING_CLASS, DatasetError, DatasetSpec, Modality, Target, Tile
from maestro_scale.datasets.values import (
    InvalidNote,
    array_problem,
    chronological,
    dates_note,
    dates_problem,
    finite_extremes,
    has_percentages,
    is_nodata,
    marks_problem,
    mask_problem,
    masked_problem,
    numbers_problem,
    numpy_mask,
    percent_problem,
    shares_problem,
    sorted_note,
)
from maestro_scale.shards.format.fields import (
    REF_DATE,
    check_tile,
    dates_field,
    mask_field,
    target_field,
    tile_fields,
)

_KIND = "invalid values"  # of the error


def value_problems(fields: Mapping[str, np.ndarray], spec: DatasetSpec, is_stored: bool = False) -> list[str]:
    """Invalid values in the fields of a sample that fit ``spec`` (:func:`.fields.check_layouts`), a line per field.

    ``is_stored``: in shards, in which a band called ``nodata`` may hold percentages (``spec.NODATA``).
    """
    found: dict[str, str | None] = {}
    for modality in spec.modalities:
        name, band = modality.name, modality.nodata_band
        if name not in fields:  # the tile lacks it
            continue
        array = fields[name]
        found[name] = array_problem(array)
        found[dates_field(name)] = dates_problem(fields[dates_field(name)])
        mask = fields[mask_field(name)] if modality.mask_bands else None
        if mask is not None:
            found[mask_field(name)] = mask_problem(mask)
        if mask is not None and band is not None and not found[mask_field(name)]:
            earlier = is_stored and not modality.quantity and has_percentages(mask[:, band])
            found[mask_field(name)] = None if earlier else marks_problem(mask[:, band], array)
        if found[name] is None:
            marks = None if mask is None or band is None else is_nodata(mask[:, band])
            found[name] = _limits_problem(array, modality, marks)
    for target in spec.targets:
        if target.kind == "multilabel":
            found[target_field(target.name)] = shares_problem(fields[target_field(target.name)])
        elif target.kind == "regression":
            found[target_field(target.name)] = numbers_problem(fields[target_field(target.name)])
    found[REF_DATE] = dates_problem(fields[REF_DATE][None])
    return [f"{name} {problem}" for name, problem in found.items() if problem is not None]


def checked_tile(tile: Tile, spec: DatasetSpec, strict: bool = False) -> Tile:
    """The tile as it is stored: numpy's masks as NaN or nodata, invalid values marked where a raster stores nodata,
    every series in chronological order; with a note on each kind of change, and on remarkable values.

    DatasetError, naming tile and field, if the tile does not match ``spec`` or has values that cannot be stored.
    ``strict``: also if a value is invalid though nothing declares it as nodata (:class:`InvalidNote`).
    """
    notes: list[str] = []
    tile = _without_numpy_masks(tile, spec, notes)
    tile = _with_whole_masks(tile, spec)
    check_tile(tile, spec)
    tile = _marked(tile, spec, notes)
    tile = _sorted(tile)
    if problems := value_problems(tile_fields(tile), spec):
        more = f" (and {len(problems) - 1} more fields)" if len(problems) > 1 else ""
        raise DatasetError(f"tile {tile.key}: {problems[0]}{more}", _KIND)
    for modality in (m for m in spec.modalities if m.name in tile.arrays):
        notes += remarkable_values(np.asarray(tile.arrays[modality.name]), modality.name, _quantity(modality))
        if (note := dates_note(np.asarray(tile.dates[modality.name]), modality.name)) is not None:
            notes.append(note)
    for target in (t for t in spec.targets if t.kind == "regression"):
        notes += remarkable_values(np.asarray(tile.targets[target.name]), target.name, None)
    if notes:
        tile = replace(tile, notes=(*tile.notes, *notes))
    invalid = next((note for note in tile.notes if isinstance(note, InvalidNote)), None)
    if strict and invalid is not None:
        first = f" (the first: {invalid.example})" if invalid.example else ""
        raise DatasetError(f"tile {tile.key}: {invalid}{first}; nothing declares it as nodata", _KIND)
    return tile


def refuse_masked(key: str, name: str, array: object, cure: str = "") -> None:
    """DatasetError for a numpy masked array with masked values, of which only the data would be stored."""
    if (problem := masked_problem(array)) is not None:
        raise DatasetError(f"tile {key}: {name} {problem}{cure}", _KIND)


def unmasked_labels(key: str, target: Target, value: object, notes: list[str]) -> object:
    """Labels without a mask of numpy: masked ones as the missing label of ``target``, and noted.

    DatasetError if the target has no such label.
    """
    mask = numpy_mask(value)
    if mask is None:
        return value
    data = np.asarray(value)
    if target.kind == "segmentation" and target.ignored:
        missing: float = target.ignored[0]
    elif target.kind == "classification":
        missing = MISSING_CLASS
    elif target.kind == "regression" and data.dtype.kind in "iuf":
        data, missing = data.astype(np.float32), np.nan
    else:
        cure = ", or give the target an ignored class" if target.kind == "segmentation" else ""
        refuse_masked(key, target.name, value, cure)
    notes.append(f"{target.name} has labels that numpy masks: stored as missing")
    if not np.can_cast(np.min_scalar_type(missing), data.dtype):
        data = data.astype(np.int64)
    return np.where(mask, np.asarray(missing, data.dtype), data)


def _quantity(modality: Modality) -> Quantity | None:
    """What the values of a modality are; None: not said."""
    return QUANTITY_KINDS[modality.quantity] if modality.quantity else None


def _limits_problem(array: np.ndarray, modality: Modality, marks: np.ndarray | None) -> str | None:
    """Why values (T, C, H, W) that are not marked as nodata are impossible for their quantity."""
    quantity = _quantity(modality)
    if quantity is None or not array.size:
        return None
    lowest, highest = finite_extremes(array)
    if lowest > quantity.above and highest <= quantity.up_to:
        return None
    bad = ~quantity.valid(array) & ~np.isnan(array)
    if marks is not None:
        bad &= ~marks[:, None]
    if not bad.any():
        return None
    index = tuple(np.argwhere(bad)[0].tolist())
    return (
        f"has {int(bad.sum())} values that are no {modality.quantity} (valid: above {quantity.above:g}, at most "
        f"{quantity.up_to:g}), the first {array[index].item():g} at ({', '.join(map(str, index))}); "
        'mark them in a mask band "nodata"'
    )


def _without_numpy_masks(tile: Tile, spec: DatasetSpec, notes: list[str]) -> Tile:
    """The tile with masked pixels as NaN, or in the band of nodata, and masked labels as missing."""
    for name, given in tile.dates.items():
        refuse_masked(tile.key, dates_field(name), given)
    for name, given in tile.masks.items():
        refuse_masked(tile.key, mask_field(name), given)
    modalities, targets = {m.name: m for m in spec.modalities}, {t.name: t for t in spec.targets}
    arrays, masks, labels = dict(tile.arrays), dict(tile.masks), dict(tile.targets)
    for name, array in tile.arrays.items():
        masked = numpy_mask(array)
        if masked is None:
            continue
        modality = modalities.get(name)
        data = np.array(np.asarray(array))  # the data below the mask, also of a list of masked arrays
        stores_nodata = modality is not None and modality.nodata_band is not None
        if modality is None or not (data.dtype.kind == "f" or stores_nodata) or data.ndim != 4:
            refuse_masked(tile.key, name, array, ', or give the raster the mask band "nodata"')
            continue
        data[masked] = np.nan if data.dtype.kind == "f" else 0
        arrays[name] = data
        mask = _percent(tile.key, name, masks[name]) if name in masks else None
        if stores_nodata and _fits(mask, data):
            masks[name] = with_marks(mask, np.asarray(masked.any(axis=1)), modality)
        notes.append(
            f"{name} has values that numpy masks: {'marked as nodata' if stores_nodata else 'stored as NaN'}"
        )
    for name, value in tile.targets.items():
        if name in targets:
            labels[name] = np.asarray(unmasked_labels(tile.key, targets[name], value, notes))
        else:
            refuse_masked(tile.key, target_field(name), value)
    return replace(tile, arrays=arrays, masks=masks, targets=labels) if notes else tile


def _with_whole_masks(tile: Tile, spec: DatasetSpec) -> Tile:
    """The tile with a band of nodata in each mask that should have one, and masks of bool in percent."""
    masks = dict(tile.masks)
    for modality in spec.modalities:
        name, band = modality.name, modality.nodata_band
        if name in masks:
            masks[name] = _percent(tile.key, name, masks[name])
        array, mask = np.asarray(tile.arrays.get(name, ())), masks.get(name)
        if band is None or not _fits(mask, array):
            continue  # refused with other wrong shapes
        num_given = 0 if mask is None else mask.shape[1]
        if num_given == len(modality.mask_bands) - 1:
            masks[name] = with_marks(mask, np.zeros((len(array), *array.shape[2:]), bool), modality)
        elif mask is not None and num_given == len(modality.mask_bands):
            masks[name] = with_marks(mask, mask[:, band] > 0, modality)
    return replace(tile, masks=masks)


def _fits(mask: np.ndarray | None, array: np.ndarray) -> bool:
    """Whether a mask, if there is one, is of the dates and pixels of a raster (T, C, H, W)."""
    if array.ndim != 4 or mask is None:
        return array.ndim == 4
    same = len(mask) == len(array) and mask.shape[2:] == array.shape[2:] if mask.ndim == 4 else False
    return mask.dtype == np.uint8 and same


def _percent(key: str, name: str, mask: np.ndarray) -> np.ndarray:
    """A mask as uint8: bool as 0 and 100, other numbers if they are from 0 to 100. DatasetError for shares from 0 to 1,
    which look like percentages of less than one."""
    mask = np.asarray(mask)
    if mask.dtype == np.uint8 or mask.dtype.kind not in "biuf" or not mask.size:
        return mask
    if mask.dtype.kind == "b":
        return mask.astype(np.uint8) * np.uint8(100)
    bad = ~((mask >= 0) & (mask <= 100))
    field = mask_field(name)
    if bad.any():
        raise DatasetError(f"tile {key}: {field} {percent_problem(mask, bad)}", _KIND)
    if mask.dtype.kind == "f" and 0 < mask.max() <= 1:
        raise DatasetError(
            f"tile {key}: {field} has numbers from 0 to 1; give percentages, 0 to 100, or bool", _KIND
        )
    # Rounded up, so that a pixel with less than one percent stays marked.
    return np.ceil(mask).astype(np.uint8)


def _marked(tile: Tile, spec: DatasetSpec, notes: list[str]) -> Tile:
    """The tile with invalid values of rasters that store nodata marked; marked pixels are 0, or NaN."""
    arrays, masks = dict(tile.arrays), dict(tile.masks)
    for modality in spec.modalities:
        band = modality.nodata_band
        if band is None or modality.name not in arrays:
            continue
        array, mask = np.asarray(arrays[modality.name]), masks[modality.name]
        marks = mask[:, band] > 0
        quantity = _quantity(modality) or QUANTITY_KINDS["any"]
        given = np.broadcast_to(marks[:, None], array.shape) if marks.any() else None
        empty: float = np.nan if array.dtype.kind == "f" else 0
        found = marks
        for reason, where, expected in invalid_values(array, modality, quantity, given):
            found = found | where.any(axis=1)
            if where is given:
                continue
            note = f"{modality.name} has {reason}: {action(reason, modality, quantity)}"
            notes.append(note if expected else invalid_note(note, array, where, quantity))
        if found is not marks:
            arrays[modality.name] = np.where(found[:, None], np.asarray(empty, array.dtype), array)
            masks[modality.name] = with_marks(mask, found, modality)
    return replace(tile, arrays=arrays, masks=masks)


def _sorted(tile: Tile) -> Tile:
    orders = {name: chronological(np.asarray(dates)) for name, dates in tile.dates.items()}
    orders = {name: order for name, order in orders.items() if order is not None}
    if not orders:
        return tile

    def sort(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: np.asarray(a)[orders[n]] if n in orders else a for n, a in arrays.items()}

    return replace(
        tile,
        arrays=sort(tile.arrays),
        dates=sort(tile.dates),
        masks=sort(tile.masks),
        notes=(*tile.notes, *map(sorted_note, orders)),
    )
