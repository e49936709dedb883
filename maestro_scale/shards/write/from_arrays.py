"""Description and tiles of a user's own dataset, from arrays, dates and names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

import numpy as np

from maestro_scale.datasets.spec import (
    MISSING_CLASS,
    DatasetError,
    DatasetSpec,
    GeoOrigin,
    Modality,
    Scale,
    Sensor,
    Target,
    Tile,
)
from maestro_scale.datasets.spec_check import default_pos_grid
from maestro_scale.datasets.values import numpy_mask
from maestro_scale.shards.format.manifest import check_spec
from maestro_scale.shards.format.values import refuse_masked, unmasked_labels

DateLike = date | np.datetime64 | str  # datetime is a subclass of date; strings are ISO 8601


@dataclass(frozen=True)
class Raster:
    """One sensor of a dataset: how it is stored, and how the model uses it.

    num_dates: None for a single image; for a time series the number of dates per sample of a batch.
    patch: side in pixels of the square that becomes one token; it must divide the crop.
    divisor, scale: as in :class:`~maestro_scale.datasets.spec.Scale`; most scaled values should be in 0 to 1.
    mask_bands: names of the channels of a per-date mask, for example ("snow", "cloud"), in percent. "nodata" is one in
    which invalid pixels are marked: they do not count in the selection of dates and in the loss.
    quantity: what the values are, of ``datasets.quantity.QUANTITY_KINDS``; impossible values are invalid.
    band_groups: sizes of consecutive groups of similar bands (visible, infrared); empty: one group.
    group: rasters with the same group are encoded as one sequence; default: the raster's own name.
    embed: rasters with the same name share a patch embedding, also across datasets; default: the raster's own name.
    optional: a tile may lack it.
    """

    name: str
    bands: Sequence[str]
    resolution_m: float
    dtype: str
    patch: int
    divisor: float = 1.0
    scale: Literal["linear", "log"] = "linear"
    num_dates: int | None = None
    mask_bands: Sequence[str] = ()
    band_groups: Sequence[int] = ()
    group: str = ""
    embed: str = ""
    optional: bool = False
    quantity: str = ""


def describe(
    name: str,
    tile_m: float,
    rasters: Sequence[Raster],
    targets: Sequence[Target] = (),
    *,
    crop_m: float | None = None,
    title: str = "",
) -> DatasetSpec:
    """Spec of a dataset with square tiles of ``tile_m`` metres, from which the model gets crops of ``crop_m`` metres.

    Segmentation is predicted on the tokens of the first raster. ManifestError if the description is inconsistent.
    """
    crop_m = tile_m if crop_m is None else crop_m
    modalities, sensors = [], []
    for r in rasters:
        size, image_size = (round(extent_m / r.resolution_m) for extent_m in (tile_m, crop_m))
        series = r.num_dates is not None
        modalities.append(
            Modality(
                r.name,
                tuple(r.bands),
                r.resolution_m,
                size,
                r.dtype,
                series,
                tuple(r.mask_bands),
                optional=r.optional,
                quantity=r.quantity,
            )
        )
        sensors.append(
            Sensor(
                name=r.name,
                source=r.name,
                image_size=image_size,
                patch=r.patch,
                num_dates=1 if r.num_dates is None else r.num_dates,
                bands=tuple(range(len(r.bands))),
                band_groups=tuple(r.band_groups) or (len(r.bands),),
                scale=Scale(r.scale, r.divisor),
                group=r.group or r.name,
                embed=r.embed or r.name,
            )
        )
    spec = DatasetSpec(
        name=name,
        title=title or name,
        tile_m=tile_m,
        crop_m=crop_m,
        pos_grid=default_pos_grid(sensors),
        modalities=tuple(modalities),
        targets=tuple(targets),
        sensors=tuple(sensors),
        ref_sensor=sensors[0].name if sensors else None,
    )
    check_spec(spec, name)
    return spec


def make_tile(
    spec: DatasetSpec,
    key: str,
    arrays: Mapping[str, np.ndarray],
    dates: Mapping[str, DateLike | Sequence[DateLike]],
    *,
    masks: Mapping[str, np.ndarray] | None = None,
    targets: Mapping[str, Any] | None = None,
    ref_date: DateLike | None = None,
) -> Tile:
    """Build a tile of ``spec`` from arrays by raster.

    ``arrays[raster]``: (T, C, H, W), or (C, H, W) for a single image, in the raster's dtype; row 0 is north. In a float
    raster NaN means "not measured". Pixels that a numpy masked array masks are stored as NaN, or marked in the mask
    band "nodata"; in integers without this band they are refused.
    ``dates[raster]``: T dates, times or ISO strings, or one for a single image; in any order, since a series is sorted
    when it is written. ``masks[raster]``: (T, M, H, W), 0-100 or bool; the channel "nodata" may be left out, since
    invalid pixels are marked when the tile is written. ``targets[name]``: (H, W) class indices
    (segmentation); class shares, by class name or in the order of the classes (multilabel); a class name, its index or
    None (classification); a number or (H, W) of them, NaN where missing (regression). An optional raster that the tile
    lacks is left out. ``ref_date``: origin of the temporal encoding; None: the earliest date of the first raster.

    Raises DatasetError for invalid dates, classes or labels. Shapes, dtypes and values are checked when the tile is
    written.
    """
    # Before numpy.asarray, which drops the mask of a masked array.
    for names, suffix in ((dates, ".dates"), (masks or {}, ".mask")):
        for name, given in names.items():
            refuse_masked(key, f"{name}{suffix}", given)
    stored = {name: _dates(key, name, when) for name, when in dates.items()}
    first = next((m.name for m in spec.modalities if not m.optional or m.name in stored), "any raster")
    if ref_date is None and not len(stored.get(first, ())):
        raise DatasetError(f"tile {key}: {first} has no dates; give dates[{first!r}], or ref_date")
    known = {t.name: t for t in spec.targets}
    notes: list[str] = []
    labels = {
        n: _labels(key, known[n], unmasked_labels(key, known[n], v, notes)) if n in known else v
        for n, v in (targets or {}).items()
    }
    return Tile(
        key=key,
        arrays={name: _add_date_axis(array) for name, array in arrays.items()},
        dates=stored,
        masks={name: _add_date_axis(mask) for name, mask in (masks or {}).items()},
        targets=labels,
        ref_date=min(stored[first], key=tuple) if ref_date is None else _dates(key, "ref_date", ref_date)[0],
        notes=tuple(notes),
    )


def tile(
    arrays: Mapping[str, np.ndarray],
    dates: Mapping[str, DateLike | Sequence[DateLike]] | DateLike | None = None,
    *,
    key: str = "tile",
    ref_date: DateLike | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    origin: GeoOrigin | None = None,
) -> Tile:
    """A tile for ``load_model(…).embed`` or ``.predict`` from arrays by raster, without a description of the dataset.

    ``arrays[raster]``: raw values (T, C, H, W), (C, H, W) of one date, or (H, W) of one date and band; row 0 is north.
    The names are those of the model's sensors (``Sensor.source``). ``dates``: as of ``make_tile``, or one for all
    rasters; a raster of one date that has none gets the reference date. ``ref_date``: None: the earliest date of the
    first raster that has dates. ``masks[raster]``: (T, M, H, W) uint8, 0-100. ``origin``: the upper left corner.

    Raises DatasetError, in one line, for invalid or missing dates and for arrays of another shape.
    """
    if not arrays:
        raise DatasetError(f"tile {key}: has no arrays; give {{raster: (dates, bands, H, W)}}")
    for names, suffix in ((arrays, ""), (masks or {}, ".mask")):
        for name, given in names.items():
            refuse_masked(key, f"{name}{suffix}", given)
    stacked = {name: _stacked(key, name, array) for name, array in arrays.items()}
    by_name = dates if isinstance(dates, Mapping) else {} if dates is None else dict.fromkeys(arrays, dates)
    if unknown := [name for name in by_name if name not in arrays]:
        raise DatasetError(f"tile {key}: dates of {unknown[0]!r}, but arrays of {', '.join(arrays)}")
    stored = {name: _dates(key, name, by_name[name]) for name in arrays if name in by_name}
    dated = [days for days in stored.values() if len(days)]
    if ref_date is None and not dated:
        raise DatasetError(f"tile {key}: has no dates; give dates={{{next(iter(arrays))!r}: '2021-06-01'}}")
    reference = min(dated[0], key=tuple) if ref_date is None else _dates(key, "ref_date", ref_date)[0]
    for name, array in stacked.items():
        stored.setdefault(name, reference[None].repeat(1 if len(array) == 1 else 0, axis=0))
        if len(stored[name]) != len(array):
            raise DatasetError(f"tile {key}: {name} has {len(array)} images and {len(stored[name])} dates")
    return Tile(
        key=key,
        arrays=stacked,
        dates=stored,
        masks={name: _add_date_axis(mask) for name, mask in (masks or {}).items()},
        targets={},
        ref_date=reference,
        origin=origin,
    )


def _stacked(key: str, name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if not 2 <= array.ndim <= 4 or array.dtype.kind not in "uif":
        raise DatasetError(
            f"tile {key}: {name} is {array.dtype} {array.shape}; give numbers (dates, bands, H, W) or (bands, H, W)"
        )
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise DatasetError(f"tile {key}: {name} has infinite values; make them NaN, which means not measured")
    return array[(None,) * (4 - array.ndim)]


def _add_date_axis(array: np.ndarray) -> np.ndarray:
    masked = numpy_mask(array)
    array = np.asarray(array)
    if masked is not None:
        array = np.ma.array(array, mask=masked)
    return array[None] if array.ndim == 3 else array


def _dates(key: str, name: str, when: DateLike | Sequence[DateLike]) -> np.ndarray:
    """(T, 3) int16: year, day of year, hour."""
    dates = when if isinstance(when, Iterable) and not isinstance(when, str) else [when]
    rows = []
    for value in dates:
        try:
            day = _to_date(value).timetuple()
            rows.append((day.tm_year, day.tm_yday, day.tm_hour))
        except (AttributeError, ValueError) as error:
            raise DatasetError(
                f"tile {key}: {name} has the date {value!r}; give dates, datetimes, numpy.datetime64 or ISO strings"
            ) from error
    return np.array(rows, np.int16).reshape(-1, 3)


def _to_date(value: DateLike) -> date:
    if isinstance(value, str):
        return datetime.fromisoformat(value.removesuffix("Z"))  # Python 3.10 does not parse "Z"
    if isinstance(value, np.datetime64):
        return value.astype("datetime64[s]").item()
    return value


def _labels(key: str, target: Target, value: Any) -> np.ndarray:
    if target.kind == "segmentation":
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() <= 255):
            raise DatasetError(
                f"tile {key}: {target.name} is {array.dtype} {array.shape}; give class indices, 0 to 255"
            )
        return array.astype(np.uint8)
    if target.kind == "classification":
        return np.array([_class_index(key, target, value)], np.int16)
    if target.kind == "regression":
        try:
            return np.atleast_1d(np.asarray(np.nan if value is None else value, np.float32))
        except (TypeError, ValueError) as error:
            raise DatasetError(f"tile {key}: {target.name} is {value!r}; give numbers") from error
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in target.classes]
        if unknown:
            raise DatasetError(
                f"tile {key}: {target.name} has no class {unknown[0]!r}; there are: {', '.join(target.classes)}"
            )
        value = [value.get(name, 0.0) for name in target.classes]
    return np.asarray(value, np.float32)


def _class_index(key: str, target: Target, value: Any) -> int:
    """The stored value of one class, given by its name or index; None is a missing label."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if value is None:
        return MISSING_CLASS
    if isinstance(value, str) and value in target.classes:
        return target.classes.index(value)
    if isinstance(value, (int, np.integer)) and (
        value == MISSING_CLASS or 0 <= value < len(target.classes) or value in target.ignored
    ):
        return int(value)
    raise DatasetError(
        f"tile {key}: {target.name} has no class {value!r}; there are: {', '.join(target.classes)} (None: missing)"
    )
