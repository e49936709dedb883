"""Checks of the values in the fields of a sample, by which a tile is stored and ``verify`` reads it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Tile
from maestro_scale.datasets.values import (
    array_problem,
    chronological,
    dates_problem,
    mask_problem,
    masked_problem,
    numbers_problem,
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


def value_problems(fields: Mapping[str, np.ndarray], spec: DatasetSpec) -> list[str]:
    """Invalid values in the fields of a sample that fit ``spec`` (:func:`.fields.check_layouts`), a line per field."""
    found: dict[str, str | None] = {}
    for modality in spec.modalities:
        name = modality.name
        if name not in fields:  # the tile lacks it
            continue
        found[name] = array_problem(fields[name])
        found[dates_field(name)] = dates_problem(fields[dates_field(name)])
        if modality.mask_bands:
            found[mask_field(name)] = mask_problem(fields[mask_field(name)])
    for target in spec.targets:
        if target.kind == "multilabel":
            found[target_field(target.name)] = shares_problem(fields[target_field(target.name)])
        elif target.kind == "regression":
            found[target_field(target.name)] = numbers_problem(fields[target_field(target.name)])
    found[REF_DATE] = dates_problem(fields[REF_DATE][None])
    return [f"{name} {problem}" for name, problem in found.items() if problem is not None]


def checked_tile(tile: Tile, spec: DatasetSpec) -> Tile:
    """The tile as it is stored: every series in chronological order, with a note on each that was sorted.

    DatasetError, naming tile and field, if the tile does not match ``spec`` or has values that cannot be stored.
    """
    parts = {**tile.arrays, **{dates_field(m): a for m, a in tile.dates.items()}}
    parts |= {mask_field(m): a for m, a in tile.masks.items()}
    parts |= {target_field(t): a for t, a in tile.targets.items()}
    for name, array in parts.items():
        refuse_masked(tile.key, name, array)
    check_tile(tile, spec)
    tile = _sorted(tile)
    if problems := value_problems(tile_fields(tile), spec):
        more = f" (and {len(problems) - 1} more fields)" if len(problems) > 1 else ""
        raise DatasetError(f"tile {tile.key}: {problems[0]}{more}", "invalid values")
    return tile


def refuse_masked(key: str, name: str, array: object) -> None:
    """DatasetError for a numpy masked array with masked values, of which only the data would be stored."""
    if (problem := masked_problem(array)) is not None:
        raise DatasetError(f"tile {key}: {name} {problem}", "invalid values")


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
