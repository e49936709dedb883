"""Makes a tile of the images of its rasters: masks, dates, values, the reference date and the origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from maestro_scale.datasets.description.assemble import Place, Stack, mask_band, stored
from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.patterns import Date
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.fill import NOTHING_VALID
from maestro_scale.datasets.spec import NODATA, DatasetError, DatasetSpec, GeoOrigin, Tile

_NO_DATE: Date = (2000, 1, 0)


@dataclass(frozen=True)
class MaskImages:
    """The images of one mask rule, one for each image of its raster: ``values`` and ``invalid`` (T, h, w)."""

    values: np.ndarray
    invalid: np.ndarray | None
    address: str


@dataclass(frozen=True)
class RasterImages:
    """The images of one raster of a tile, with those of its masks by name."""

    stack: Stack
    masks: Mapping[str, MaskImages] = field(default_factory=dict)


def make_tile(
    description: Description,
    spec: DatasetSpec,
    key: str,
    images: Mapping[str, RasterImages],
    targets: Mapping[str, np.ndarray],
    origin: GeoOrigin | None,
    notes: Sequence[str] = (),
) -> Tile:
    """The tile of these images by raster (those that it has); DatasetError that names file and cause."""
    found = list(notes)
    reference = _reference_date(description, images, found)
    arrays, dates, masks = {}, {}, {}
    for modality in spec.modalities:
        if modality.name not in images:
            continue
        raster = description.rasters[modality.name]
        assert raster is not None
        stack = images[modality.name].stack
        if not modality.series and len(stack.values) != 1:
            raise DatasetError(
                f"{stack.address}: tile {key} has {len(stack.values)} images of {modality.name}, expected 1; set "
                "series: true, or fix the pattern",
                "several images of a raster that is no series",
            )
        kept = list(found)
        try:
            series = stored(
                raster,
                modality,
                stack,
                _dates(modality.name, raster, stack, reference, kept),
                _mask(raster, modality.mask_bands, images[modality.name], kept),
                kept,
            )
        except DatasetError as error:
            if not modality.optional or error.kind not in NOTHING_VALID:
                raise
            found.append(f"{modality.name} has no valid value: stored without it")
            continue
        found = kept
        arrays[modality.name], dates[modality.name] = series.values, series.dates
        if series.mask is not None:
            masks[modality.name] = series.mask
    for sensor in spec.sensors:
        if sensor.source in dates and len(dates[sensor.source]) < sensor.num_dates:
            found.append(f"{sensor.source} has fewer than {sensor.num_dates} dates: some are seen twice")
    return Tile(
        key=key,
        arrays=arrays,
        dates=dates,
        masks=masks,
        targets=dict(targets),
        ref_date=np.array(reference, np.int16),
        notes=tuple(found),
        origin=origin,
    )


def origin_of(description: Description, places: Mapping[str, Place], notes: list[str]) -> GeoOrigin | None:
    """Where a tile lies: as the raster or target ``origin`` of the description says, else the first that does."""
    wanted = [description.origin] if description.origin is not None else list(places)
    for name in wanted:
        if name in places:
            if (origin := places[name].origin) is not None:
                return origin
            notes.append(
                f"coordinates are in {places[name].crs[:30]}, not in metres on the ground: stored without origin"
            )
            return None
    return None


def _reference_date(description: Description, images: Mapping[str, RasterImages], notes: list[str]) -> Date:
    """The first date of the reference raster, or of the first raster that has one."""
    rasters = {n: r for n, r in description.rasters.items() if r is not None and n in images}
    order = [n for n, r in rasters.items() if not r.series] + [n for n, r in rasters.items() if r.series]
    if description.ref_date is not None:
        order.insert(0, description.ref_date)
    for name in order:
        if name in images and (known := [d for d in images[name].stack.dates if d is not None]):
            return min(known)
    notes.append("no image has a date: 1 January 2000 is taken")
    return _NO_DATE


def _dates(name: str, raster: Raster, stack: Stack, reference: Date, notes: list[str]) -> np.ndarray:
    """(T, 3) int16; an undated image has the reference date."""
    missing = [date is None for date in stack.dates]
    if any(missing):
        if raster.series:
            raise DatasetError(
                f"{stack.address}: an image of the series {name} has no date; say where it is: rasters.{name}.dates",
                "no date",
            )
        if raster.dates is None or raster.dates.from_ != "reference":
            notes.append(f"{name} has no date: the reference date of the tile is taken")
    return np.array([reference if date is None else date for date in stack.dates], np.int16).reshape(-1, 3)


def _mask(raster: Raster, bands: Sequence[str], images: RasterImages, notes: list[str]) -> np.ndarray | None:
    """(T, M, h, w) uint8 in percent; None if no mask is stored. The band of invalid pixels is filled in later."""
    if not bands:
        return None
    num, _, height, width = images.stack.values.shape
    mask = np.zeros((num, len(bands), height, width), np.uint8)
    for i, name in enumerate(bands):
        if name == NODATA and name not in raster.masks:
            continue
        found = images.masks[name]
        mask[:, i] = mask_band(
            raster.masks[name], found.values, found.invalid, found.address, f"the mask {name}", notes
        )
    return mask
