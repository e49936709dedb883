"""Fill values of the shipped datasets, and the one function by which their readers replace invalid pixels.

An invalid pixel (NaN, infinite, declared as nodata by its file, outside of the limits of its quantity) becomes the fill
of its quantity, and each kind of invalid value is counted by a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from maestro_scale.datasets.quantity import FILL_VALUES, QUANTITY_KINDS, Quantity
from maestro_scale.datasets.spec import DatasetError, Modality
from maestro_scale.datasets.values import (
    InvalidNote,
    chronological,
    extremes,
    finite_extremes,
    is_zero,
    sorted_note,
)

_CLOUD = "cloud"
_NO_VALUE, _NO_ELEVATION = "no valid value", "no elevation"
NOTHING_VALID = frozenset({_NO_VALUE, _NO_ELEVATION})
"""The kinds of error of images in which nothing is measured."""


_BYTES = QUANTITY_KINDS["image"]
_REFLECTANCE = QUANTITY_KINDS["reflectance"]
_LINEAR = QUANTITY_KINDS["backscatter_linear"]
_DECIBELS = QUANTITY_KINDS["backscatter_db"]
_ELEVATION = QUANTITY_KINDS["elevation"]
_COMPLETE = replace(
    QUANTITY_KINDS["any"],
    source="a published table without gaps: no value is reserved; every value is checked to be finite",
)

_FLAIR = {
    "aerial": _BYTES,
    "dem": _ELEVATION,
    "s2": _REFLECTANCE,
    "s1_asc": _LINEAR,
    "s1_des": _LINEAR,
    "spot": _REFLECTANCE,
    "aerial_rlt": _BYTES,
}
QUANTITIES: Mapping[str, Mapping[str, Quantity]] = {
    "treesatai_ts": {"aerial": _BYTES, "s2": _REFLECTANCE, "s1_asc": _LINEAR, "s1_des": _LINEAR},
    "pastis_hd": {"spot": _BYTES, "s2": _REFLECTANCE, "s1_asc": _DECIBELS, "s1_des": _DECIBELS},
    "flair_hub": _FLAIR,
    "flair2": _FLAIR,
    "s2_naip": {"naip": _BYTES, "s2": _REFLECTANCE, "s1": _DECIBELS, "landsat": _REFLECTANCE},
    "fuel_moisture": dict.fromkeys(("s2", "s1", "weather", "terrain", "era5", "srtm"), _COMPLETE),
}
"""The quantity of each modality of the shipped datasets: the only table of their fill values (docs/datasets.md)."""


class Series(NamedTuple):
    """A time series in chronological order: (T, C, H, W), (T, 3) and, if the modality has one, a mask (T, M, H, W)."""

    values: np.ndarray
    dates: np.ndarray
    mask: np.ndarray | None


def clean_image(
    values: np.ndarray,
    modality: Modality,
    quantity: Quantity,
    where: str,
    notes: list[str],
    declared: np.ndarray | None = None,
) -> np.ndarray:
    """A single image (C, H, W) in the dtype of ``modality``, with invalid pixels replaced; appends to ``notes``.

    ``declared``: pixels that the file itself declares as invalid. DatasetError if no pixel is valid. For modalities
    without masks; :func:`clean_series` marks the pixels, too.
    """
    _check_real(values, where)
    cleaned, invalid = _replace(values, modality, quantity, notes, declared)
    if invalid is None:
        return cleaned
    if quantity.fill == "mean":
        _fill_with_means(cleaned[None], invalid[None], where)
    elif invalid.all():
        raise DatasetError(f"{where}: no pixel has a valid value; leave the tile out", _NO_VALUE)
    return cleaned


def clean_series(
    values: np.ndarray,
    dates: np.ndarray,
    modality: Modality,
    quantity: Quantity,
    where: str,
    notes: list[str],
    *,
    declared: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Series:
    """A series (T, C, H, W) in the dtype of ``modality``, in chronological order, with invalid pixels replaced.

    Where the modality stores nodata (``spec.NODATA``), invalid pixels are marked in this band, and dates without any
    valid value are removed. Else, where it has a cloud mask, they are marked in it: such dates are selected last.
    Without both, dates without any valid value are removed, unless they are stored as NaN, which the selection of dates
    recognises. ``mask``: (T, M, H, W) uint8, or without the band of nodata; None if there is no other.
    ``declared``: pixels that the file itself declares as invalid. DatasetError if no pixel of any date is valid.
    """
    _check_real(values, where)
    values, invalid = _replace(values, modality, quantity, notes, declared)
    marks = None if modality.nodata_band is None else np.zeros((len(values), *values.shape[2:]), bool)
    if invalid is not None:
        if marks is not None:
            # A pixel counts with all its bands or not at all.
            marks = np.asarray(invalid.any(axis=1))
            invalid = np.broadcast_to(marks[:, None], values.shape)
        empty = invalid.all(axis=(1, 2, 3))
        if empty.all():
            what = "a valid value" if marks is None else "valid values in all bands"
            raise DatasetError(f"{where}: no pixel of any date has {what}; leave the tile out", _NO_VALUE)
        left_out = empty
        if marks is not None:
            values = np.where(
                invalid, np.asarray(np.nan if values.dtype.kind == "f" else 0, values.dtype), values
            )
        elif mask is not None and _CLOUD in modality.mask_bands:
            mask = mask.copy()
            mask[:, modality.mask_bands.index(_CLOUD)][invalid.any(axis=1)] = 100
            left_out = np.zeros_like(empty)
        elif _stores_nan(modality, quantity):
            left_out = np.zeros_like(empty)
        if left_out.any():
            notes.append(f"{modality.name} has dates without any valid value: these dates are left out")
            values, dates, invalid = values[~empty], dates[~empty], invalid[~empty]
            mask, marks = (None if m is None else m[~empty] for m in (mask, marks))
        if marks is None and quantity.fill == "mean":
            values = np.array(values)
            _fill_with_means(values, invalid, where)
    if marks is not None:
        mask = with_marks(mask, marks, modality)
    order = chronological(dates)
    if order is not None:
        notes.append(sorted_note(modality.name))
        values, dates = values[order], dates[order]
        mask = None if mask is None else mask[order]
    return Series(values, dates, mask)


def with_marks(mask: np.ndarray | None, marks: np.ndarray, modality: Modality) -> np.ndarray:
    """The mask (T, M, H, W) of a modality that stores nodata, with ``marks`` (T, H, W) bool in its band of nodata, and
    those that are there already. ``mask``: also without this band, or None where there is no other."""
    band, num_bands = modality.nodata_band, len(modality.mask_bands)
    assert band is not None
    channel = np.where(marks, np.uint8(100), np.uint8(0))
    if mask is None:
        return channel[:, None]
    if mask.shape[1] == num_bands - 1:
        return np.insert(mask, band, channel, axis=1)
    mask = mask.copy()
    mask[:, band] = np.where(mask[:, band] > 0, np.uint8(100), channel)
    return mask


def percent(mask: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """A mask in percent as uint8; values outside 0 to 100 and NaN count as marked and are noted."""
    invalid = ~((mask >= 0) & (mask <= 100))
    if invalid.any():
        notes.append(f"{name} has values outside 0 to 100 percent or NaN: taken as marked")
        mask = np.where(invalid, 100, mask)
    # Rounded up, so that a pixel with less than one percent of snow or cloud stays marked.
    return np.ceil(mask).astype(np.uint8) if mask.dtype.kind == "f" else mask.astype(np.uint8)


def invalid_values(
    values: np.ndarray, modality: Modality, quantity: Quantity, declared: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(reason, where, expected) of each kind of invalid value in (..., C, H, W) that occurs; a value is of one kind.

    ``expected``: the file declares them, or they are known fill values; others are rather a fault than a gap.
    ``declared``: pixels that are declared as invalid, or None; given back as they are.
    """
    nonzero = [i for i, band in enumerate(modality.bands) if band in quantity.nonzero]
    if declared is None and _all_valid(values, quantity, nonzero):
        return
    zeros = np.zeros(values.shape, bool)
    zeros[..., nonzero, :, :] = values[..., nonzero, :, :] == 0
    kinds: list[tuple[str, np.ndarray | np.bool, bool]] = [
        ("values that the file declares as nodata", np.False_ if declared is None else declared, True),
        ("NaN", np.isnan(values), True),
        ("infinite values", np.isinf(values), False),
        (quantity.zeros, zeros, True),
        (quantity.outside, ~quantity.valid(values), False),
    ]
    rest = np.ones(values.shape, bool)
    for reason, where, expected in kinds:
        bad = declared if declared is not None and where is declared else where & rest
        if bad.any():
            yield reason, bad, expected or bool(quantity.is_fill(values[bad]).all())
            rest &= ~bad


def invalid_note(text: str, values: np.ndarray, bad: np.ndarray, quantity: Quantity) -> InvalidNote:
    """The note ``text`` on values that are invalid at ``bad``, of which some are no fill values."""
    note = InvalidNote(text)
    where = np.argwhere(bad)
    index = tuple(where[int((~quantity.is_fill(values[bad])).argmax())].tolist())
    note.example = f"{values[index].item():g} at ({', '.join(map(str, index))})"
    return note


def remarkable_values(array: np.ndarray, name: str, quantity: Quantity | None) -> Iterator[str]:
    """Notes on valid values of a raster or of labels that are rarely measurements: usual fill values, and unusual ones
    of its quantity (None: not said)."""
    if array.dtype.kind not in "iuf" or array.dtype.itemsize == 1 or not array.size:
        return
    lowest, highest = finite_extremes(array)
    suspects = [*FILL_VALUES, *([np.iinfo(np.uint16).max] if array.dtype == np.uint16 else [])]
    for value in dict.fromkeys((lowest, highest)):
        if value in suspects:
            yield f"{name} has the value {value:g}, a usual fill value: stored as it is; if it is one, declare it"
    low, high = (-np.inf, np.inf) if quantity is None else quantity.usual
    if lowest < low or highest > high:
        yield f"{name} has values outside of {low:g} to {high:g}: stored as they are; check units and scale"


def _fill_with_means(values: np.ndarray, invalid: np.ndarray, where: str) -> None:
    """Replace invalid pixels of (T, C, H, W) by the mean of the others of the same image and band."""
    if invalid.all(axis=(2, 3)).any():
        raise DatasetError(f"{where}: a band has no elevation at all; leave the tile out", _NO_ELEVATION)
    for image, missing_bands in zip(values, invalid, strict=True):
        for band, missing in zip(image, missing_bands, strict=True):
            band[missing] = band[~missing].mean() if missing.any() else 0


def _replace(
    values: np.ndarray,
    modality: Modality,
    quantity: Quantity,
    notes: list[str],
    declared: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (..., C, H, W) in the dtype of the modality, invalid ones as 0 or NaN; and where they are, or None."""
    invalid: np.ndarray | None = None
    replacement = np.nan if _stores_nan(modality, quantity) else 0
    for reason, bad, expected in invalid_values(values, modality, quantity, declared):
        note = f"{modality.name} has {reason}: {action(reason, modality, quantity)}"
        notes.append(note if expected else invalid_note(note, values, bad, quantity))
        invalid = bad if invalid is None else invalid | bad
    if invalid is not None:
        values = np.array(values)  # before the cast: in integers, NaN and infinity would be numbers
        values[invalid] = replacement if values.dtype.kind == "f" else 0
    if np.dtype(modality.dtype).kind in "iu":
        values, changed = _to_integers(values, modality.dtype)
        if changed:
            notes.append(
                f"{modality.name} has values that are not integers within {modality.dtype}: rounded and clipped"
            )
        return values, invalid
    cast = values.astype(modality.dtype, copy=False)
    if invalid is not None and values.dtype.kind != "f":
        cast[invalid] = replacement
    return cast, invalid


def _stores_nan(modality: Modality, quantity: Quantity) -> bool:
    """Whether invalid pixels are stored as NaN; else as 0, or filled in."""
    gaps = quantity.fill == "nan" or modality.nodata_band is not None
    return gaps and np.dtype(modality.dtype).kind == "f"


def _check_real(values: np.ndarray, where: str) -> None:
    if values.dtype.kind not in "biuf":
        raise DatasetError(
            f"{where}: is {values.dtype}; give real numbers (of complex ones the amplitude or the power)"
        )


def _all_valid(values: np.ndarray, quantity: Quantity, nonzero: list[int]) -> bool:
    """Whether no value is invalid, in two passes over the pixels, since nearly all rasters are valid."""
    if not values.size:
        return True
    lowest, highest = extremes(values)
    if not (lowest > quantity.above and highest <= quantity.up_to):  # also if they are NaN
        return False
    return not nonzero or lowest > 0 or highest < 0 or not is_zero(values[..., nonzero, :, :]).any()


def action(reason: str, modality: Modality, quantity: Quantity) -> str:
    """What becomes of invalid values, for a note."""
    if modality.nodata_band is not None:
        return "marked as nodata"
    if quantity.fill == "mean":
        return "filled in with the band's mean"
    if _stores_nan(modality, quantity):
        return "filled in from other dates when read" if reason == "NaN" else "stored as NaN"
    return "stored as 0 and marked as cloud" if _CLOUD in modality.mask_bands else "stored as 0"


def _to_integers(values: np.ndarray, dtype: str) -> tuple[np.ndarray, bool]:
    """Finite values rounded and clipped to an integer dtype, and whether that changed any of them."""
    if values.dtype == dtype:
        return values, False
    with np.errstate(invalid="ignore"):  # values out of range, which the comparison finds
        integers = values.astype(dtype)
    if np.array_equal(integers, values):
        return integers, False
    limits = np.iinfo(dtype)
    integers = np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
    return integers, True
