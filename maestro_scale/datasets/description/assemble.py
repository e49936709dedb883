"""Assembles the images of one tile: joins bands and dates, and brings values to what is stored.

Shapes: T images (dates), C bands, h×w pixels, M mask bands. Tiles from files (dataset.py) and tiles cut from scenes
(datasets/scenes/) both end in :func:`stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from maestro_scale.datasets.description.index import SectionImages
from maestro_scale.datasets.description.patterns import Date
from maestro_scale.datasets.description.sections.images import ImageFiles, MaskRule
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.fill import Series, clean_series, percent
from maestro_scale.datasets.quantity import QUANTITY_KINDS
from maestro_scale.datasets.scenes.ground import ground_m, is_metric_at
from maestro_scale.datasets.sources.protocol import Image, ImageRef, Pixels, Window
from maestro_scale.datasets.spec import DatasetError, GeoOrigin, Modality

NOT_ALIGNED = 0.05
"""Distance in pixels between where images begin that is more than rounding."""

_PIXEL_TOLERANCE = 0.02  # relative: 10.24 m may be called 10.2
_MERCATOR_TOLERANCE = 0.25  # where the ground size of a pixel changes with the latitude: tiles of one country
Names = tuple[tuple[str, str], ...]
Identity = tuple[Date | None, Names, tuple[int | str, ...]]


@dataclass(frozen=True)
class Place:
    """Where the pixels of a tile lie: upper left corner, and side of a pixel, in the units of ``crs``."""

    address: str
    crs: str
    west: float
    north: float
    pixel: float

    @property
    def origin(self) -> GeoOrigin | None:
        """The origin of the tile; None unless its coordinates are metres on the ground."""
        return GeoOrigin(self.crs, self.west, self.north) if self.is_metric else None

    @property
    def is_metric(self) -> bool:
        """Whether its coordinates are metres on the ground."""
        return is_metric_at(self.crs, self.west, self.north)


@dataclass(frozen=True)
class Stack:
    """Images of one raster: ``values`` (T, C, h, w) in the type of the files, ``invalid`` (T, C, h, w) or None.

    ``names``: per image the other names of its pattern. ``place``: None if the files do not say. ``apart``: the largest
    distance between where its images begin, in pixels.
    """

    values: np.ndarray
    invalid: np.ndarray | None
    dates: tuple[Date | None, ...]
    names: tuple[Names, ...]
    address: str
    place: Place | None = None
    apart: float = 0.0


def read_stack(
    images: SectionImages, key: str, size: int, resolution_m: float | None, *, coarser: bool = False
) -> Stack:
    """The images of tile ``key`` with all bands of the section, in the order of date and names.

    ``size``: pixels per side that they must have, beside those that ``window`` leaves out; ``resolution_m``: ground
    size that their pixels must have, if the files say (None: any). ``coarser``: pixels that are larger by a whole
    number are repeated. DatasetError that names file and cause.
    """
    section = images.section
    refs = images.by_key.get(key, ())
    if not refs:
        raise DatasetError(
            f"{images.where}: tile {key} has no file {section.files}; fetch it, or remove the tile from the list",
            "a file is missing",
        )
    by_address: dict[str, list[ImageRef]] = {}
    for ref in sorted(refs, key=lambda r: r.address):
        by_address.setdefault(ref.address, []).append(ref)
    found: dict[Identity, _Parts] = {}
    place: Place | None = None
    apart = 0.0
    for address, listed in by_address.items():
        with images.files.open(section, address) as file:
            for ref in (r for each in listed for r in file.images(each)):
                image = file.image(ref)
                pixels = _read(image, address, section, size, coarser)
                here = _place(image, address, section, resolution_m)
                if found and place is not None and here is not None:
                    apart = max(apart, check_aligned([("the first image", place), ("this image", here)]))
                place = here if not found or here is None else place
                identity = (ref.date or image.date, ref.names, ref.part)
                parts = found.setdefault(identity, _Parts(address))
                parts.add(ref, pixels, section)
    order = sorted(found, key=_stored_order if any(part for _, _, part in found) else _time_order)
    joined = [found[identity].joined(section, key) for identity in order]
    addresses = [found[identity].address for identity in order]
    dates = images.dates.of(key, addresses, len(order))
    if section.is_dated_by_name:
        for (date, _, _), address in zip(order, addresses, strict=True):
            if date is None:
                raise DatasetError(
                    f"{address}: has a date that is not in the calendar; fix the name", "no date"
                )
    values = np.stack([p.values for p in joined])
    return Stack(
        values=values,
        invalid=declared_invalid(values, [p.invalid for p in joined], section),
        dates=tuple(date or identity[0] for date, identity in zip(dates, order, strict=True)),
        names=tuple(names for _, names, _ in order),
        address=addresses[0],
        place=place,
        apart=apart,
    )


def declared_invalid(
    values: np.ndarray, by_image: Sequence[np.ndarray | None], section: ImageFiles
) -> np.ndarray | None:
    """Where values (T, C, h, w) are not measured: as each file (``by_image``) or the section's ``nodata`` says."""
    invalid = None
    if any(image is not None for image in by_image):
        none = np.zeros(values.shape[1:], bool)
        invalid = np.stack([none if image is None else image for image in by_image])
    for number in section.nodata:
        same = np.isnan(values) if np.isnan(number) else values == number
        if same.any():
            invalid = same if invalid is None else invalid | same
    return invalid


def stored(
    raster: Raster,
    modality: Modality,
    stack: Stack,
    dates: np.ndarray,
    mask: np.ndarray | None,
    notes: list[str],
) -> Series:
    """A stack as it is stored: scaled, in the type of ``modality``, invalid pixels replaced and noted, in time order.

    ``dates``: (T, 3) int16. ``mask``: (T, M, h, w) in percent, or None; what it marks as nodata is invalid.
    DatasetError if nothing is valid.
    """
    values, invalid = stack.values, stack.invalid
    if (
        mask is not None
        and modality.nodata_band is not None
        and (marks := mask[:, modality.nodata_band] > 0).any()
    ):
        marked = np.broadcast_to(marks[:, None], values.shape)
        invalid = marked if invalid is None else invalid | marked
    if raster.scale != 1 or raster.offset != 0:
        values = values * np.float64(raster.scale) + raster.offset
        if np.dtype(modality.dtype).kind in "iu":
            values = np.rint(values)
    elif values.dtype != modality.dtype and not np.can_cast(values.dtype, modality.dtype):
        notes.append(f"{modality.name} has files of type {values.dtype}: stored as {modality.dtype}")
    quantity = QUANTITY_KINDS[raster.quantity]
    if raster.valid is not None:
        quantity = quantity.within(*raster.valid)
    return clean_series(values, dates, modality, quantity, stack.address, notes, declared=invalid, mask=mask)


def mask_band(
    rule: MaskRule, values: np.ndarray, invalid: np.ndarray | None, where: str, name: str, notes: list[str]
) -> np.ndarray:
    """(T, h, w) uint8: the percentage to which each pixel of the images of a mask (T, h, w) is marked.

    Pixels of which nothing is known (``invalid``) are marked.
    """
    if rule.percent:
        marked = percent(values, name, notes)
    elif rule.bits:
        if values.dtype.kind not in "iu":
            raise DatasetError(f"{where}: is {values.dtype}, which has no bits; give classes or above")
        bits = np.bitwise_or.reduce([np.uint64(1) << np.uint64(bit) for bit in rule.bits])
        marked = _percent_of((values.astype(np.uint64) & bits) != 0)
    elif rule.above is not None:
        marked = _percent_of(~(values <= rule.above))  # NaN is marked
    else:
        marked = _percent_of(np.isin(values, rule.classes))
    if rule.invert:
        marked = (100 - marked).astype(np.uint8)
    return marked if invalid is None else np.where(invalid, np.uint8(100), marked)


def match_images(images: Stack, masks: Stack, name: str) -> list[int]:
    """For each image the index of its mask: that of the same date and names; without dates, in the same order.

    DatasetError if an image has none.
    """
    if len(masks.dates) == 1 and masks.dates[0] is None:
        return [0] * len(images.dates)
    if all(date is None for date in masks.dates) or all(date is None for date in images.dates):
        if len(masks.dates) == len(images.dates):
            return list(range(len(images.dates)))
        raise DatasetError(
            f"{masks.address}: {name} has {len(masks.dates)} images for {len(images.dates)}; fetch both again",
            "a mask is missing",
        )
    if len(images.dates) == len(masks.dates) == 1 and _day(images.dates[0]) == _day(masks.dates[0]):
        return [0]
    common = {n for n, _ in images.names[0]} & {n for n, _ in masks.names[0]}

    def identity(date: Date | None, names: Names) -> tuple[Date | None, Names]:
        return date, tuple(sorted(item for item in names if item[0] in common))

    free: dict[tuple[Date | None, Names], list[int]] = {}
    for i, (date, names) in enumerate(zip(masks.dates, masks.names, strict=True)):
        free.setdefault(identity(date, names), []).append(i)
    matched = []
    for date, names in zip(images.dates, images.names, strict=True):
        left = free.get(identity(date, names))
        if not left:
            raise DatasetError(
                f"{images.address}: the image of {_date_text(date)} has no mask {name}; fetch it, or leave the image "
                "out",
                "a mask is missing",
            )
        matched.append(left.pop(0) if len(left) > 1 else left[0])
    return matched


def check_aligned(places: Sequence[tuple[str, Place]]) -> float:
    """The largest distance between where rasters of a tile, by name, begin: in pixels, of two rasters of the larger.

    DatasetError unless all are in one coordinate system, and no two are more than a pixel apart.
    """
    largest = 0.0
    for name, place in places[1:]:
        first_name, first = places[0]
        if not same_crs(first.crs, place.crs):
            raise DatasetError(
                f"{place.address}: {name} is in {_crs_name(place.crs)}, {first_name} in {_crs_name(first.crs)}; warp "
                "one of them, or cut tiles with grid:",
                "another coordinate system",
            )
        apart = max(abs(first.west - place.west), abs(first.north - place.north))
        largest = max(largest, apart / max(first.pixel, place.pixel))
        if largest > 1:
            raise DatasetError(
                f"{place.address}: {name} begins {apart:g} from where {first_name} begins ({first.address}), in units "
                f"of {_crs_name(first.crs)}; rasters of a tile cover the same ground: fix the files, or cut tiles with "
                "grid:",
                "rasters that do not cover the same ground",
            )
    return largest


@lru_cache(maxsize=1000)
def same_crs(one: str, other: str) -> bool:
    """Whether two texts are the same coordinate system."""
    from rasterio.crs import CRS

    return one == other or CRS.from_string(one) == CRS.from_string(other)


@dataclass
class _Parts:
    """The bands of one image, which may be in several files."""

    address: str
    bands: dict[int, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)

    def add(self, ref: ImageRef, pixels: Pixels, section: ImageFiles) -> None:
        for i, band in enumerate(ref.bands):
            if band in self.bands:
                raise DatasetError(
                    f"{ref.address}: is a second file of the same image as {self.address}; say in {section.files} by "
                    "which names they differ",
                    "two files of one image",
                )
            self.bands[band] = (pixels.values[i], None if pixels.invalid is None else pixels.invalid[i])

    def joined(self, section: ImageFiles, key: str) -> Pixels:
        num_bands = len(section.band_sources)
        if lacking := [section.band_sources[i] for i in range(num_bands) if i not in self.bands]:
            raise DatasetError(
                f"{self.address}: of this image of tile {key}, band {lacking[0]} is missing; fetch it, or leave the "
                "tile out",
                "a band is missing",
            )
        values, invalid = zip(*(self.bands[i] for i in range(num_bands)), strict=True)
        if all(i is None for i in invalid):
            return Pixels(np.stack(values), None)
        none = np.zeros(values[0].shape, bool)
        return Pixels(np.stack(values), np.stack([none if i is None else i for i in invalid]))


def _time_order(identity: Identity) -> tuple:
    date, names, _ = identity
    return date is None, date or (), names


def _stored_order(identity: Identity) -> tuple:
    """As the file has them; :func:`.fill.clean_series` sorts them, and notes that."""
    _, names, part = identity
    return names, tuple((isinstance(p, str), p) for p in part)


def _read(image: Image, address: str, section: ImageFiles, size: int, coarser: bool) -> Pixels:
    """The pixels of a tile, row 0 in the north."""
    row, column = section.window or (0, 0)
    whole = section.window is None
    height, width = image.height, image.width
    factor = 1
    if coarser and height == width < size and size % height == 0 and whole:
        factor = size // height
    side = size // factor
    if (whole and (height, width) != (side, side)) or height < row + side or width < column + side:
        wanted = f"{side}×{side}" if whole else f"at least {row + side}×{column + side}"
        raise DatasetError(
            f"{address}: has {height}×{width} pixels, expected {wanted} (tile_m / resolution_m"
            f"{'' if whole else ' from window on'}); fix the description, or leave the tile out",
            "an image of another size",
        )
    flipped = _is_flipped(image)
    top = height - row - side if flipped else row
    pixels = image.read(None if whole else Window(top, column, side, side))
    if flipped:
        pixels = _changed(pixels, lambda a: a[:, ::-1])
    if factor > 1:
        pixels = _changed(pixels, lambda a: a.repeat(factor, 1).repeat(factor, 2))
    return pixels


def _changed(pixels: Pixels, change: Callable[[np.ndarray], np.ndarray]) -> Pixels:
    return Pixels(change(pixels.values), None if pixels.invalid is None else change(pixels.invalid))


def _is_flipped(image: Image) -> bool:
    """Whether the first row is the southernmost one, as in many NetCDF files."""
    return image.transform is not None and image.transform[4] > 0


def _place(image: Image, address: str, section: ImageFiles, resolution_m: float | None) -> Place | None:
    """Where the tile's pixels lie, without those that ``window`` leaves out; None if the file does not say."""
    transform, crs = image.transform, section.crs or image.crs
    if transform is None:
        return None
    a, b, west, d, e, north = transform
    if abs(b) > 1e-6 * abs(a) or abs(d) > 1e-6 * abs(e) or a <= 0:
        raise DatasetError(
            f"{address}: its rows do not run from west to east; warp it (gdalwarp)", "not north up"
        )
    if crs is None:
        return None
    row, column = section.window or (0, 0)
    if e > 0:
        north += e * image.height
    if resolution_m is not None:
        _check_pixel(address, crs, (a, abs(e)), (west, north), resolution_m)
    return Place(address, crs, west + a * column, north - abs(e) * row, a)


def _check_pixel(
    address: str, crs: str, pixel: tuple[float, float], corner: tuple[float, float], resolution_m: float
) -> None:
    """DatasetError if pixels have not the size that the description says; those in degrees may have any."""
    from rasterio.crs import CRS

    if max(abs(p - resolution_m) for p in pixel) <= _PIXEL_TOLERANCE * resolution_m and is_metric_at(
        crs, *corner
    ):
        return
    if not CRS.from_string(crs).is_projected:
        return
    tolerance, digits, ground = _PIXEL_TOLERANCE, 6, ""
    if not is_metric_at(crs, *corner):
        tolerance, digits = _MERCATOR_TOLERANCE, 3
        pixel = tuple((np.array(pixel) * ground_m(crs, *corner)[0]).tolist())
        ground = f" on the ground ({_crs_name(crs)} is not true to scale there)"
    if max(abs(p - resolution_m) for p in pixel) > tolerance * resolution_m:
        raise DatasetError(
            f"{address}: has pixels of {pixel[0]:.{digits}g} by {pixel[1]:.{digits}g}{ground}, the description says "
            f"{resolution_m:g} m; fix resolution_m, or leave the tile out",
            "pixels of another size",
        )


def _percent_of(marked: np.ndarray) -> np.ndarray:
    return marked.astype(np.uint8) * np.uint8(100)


def _day(date: Date | None) -> tuple[int, ...]:
    return () if date is None else date[:2]


def _date_text(date: Date | None) -> str:
    return "no date" if date is None else f"year {date[0]}, day {date[1]}"


def _crs_name(crs: str) -> str:
    return crs if len(crs) < 40 else "another one, given as WKT"
