"""Images whose bands are in raster files within other files: rows of tables, members of tars, assets."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources.files import RasterFile, RasterImage
from maestro_scale.datasets.sources.georeference import Affine
from maestro_scale.datasets.sources.protocol import Date, ImageRef, Pixels, Window
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

Opener = tuple[str, Callable[[], AbstractContextManager[Any]]]
"""What messages call a raster file, and a function that opens it with rasterio."""


class RasterParts:
    """Opens images; those that are still in use are closed with it."""

    def __init__(self, section: ImageFiles) -> None:
        self._section = section
        self._open: weakref.WeakSet[ExitStack] = weakref.WeakSet()

    def image(
        self,
        ref: ImageRef,
        files: Sequence[Opener],
        band_each: bool,
        date: Date | None = None,
        crs: str | None = None,
        transform: Affine | None = None,
    ) -> JoinedImage:
        """The bands of ``ref`` in order, from one file each or from one for all.

        ``date``: what the place that the files are from says; else the tags of the first file. ``crs``, ``transform``:
        where the files lie if they do not say.
        """
        stack = ExitStack()
        images: list[RasterImage] = []
        try:
            for where, opener in files:
                raster = stack.enter_context(opener())
                if band_each:
                    images.append(RasterImage(raster, where, self._section, [1], False))
                else:
                    images.append(RasterFile(raster, where, self._section).image(ref))
            joined = JoinedImage(images, [where for where, _ in files], date, crs, transform)
        except BaseException:
            stack.close()
            raise
        # An image may be dropped long before the file around it is closed: then its memory is free.
        weakref.finalize(joined, stack.close)
        self._open.add(stack)
        return joined

    def close(self) -> None:
        """Close all rasters."""
        for stack in list(self._open):
            stack.close()


class JoinedImage:
    """Bands of one image in one or more raster files of one grid (a :class:`.protocol.Image`)."""

    def __init__(
        self,
        images: Sequence[RasterImage],
        names: Sequence[str],
        date: Date | None,
        crs: str | None,
        transform: Affine | None,
    ) -> None:
        self._images, self._names = images, names
        self._date, self._crs, self._transform = date, crs, transform
        first = images[0]
        for image, name in zip(images[1:], names[1:], strict=True):
            ours, theirs = ((i.height, i.width, str(i.dtype), i.transform, i.crs) for i in (first, image))
            if ours != theirs:
                raise DatasetError(
                    f"{name}: is {theirs[2]} {theirs[0]}×{theirs[1]}, not on the grid of {names[0]}: {ours[2]} "
                    f"{ours[0]}×{ours[1]}; put these bands into another raster",
                    "bands differ",
                )

    @property
    def count(self) -> int:
        return sum(image.count for image in self._images)

    @property
    def height(self) -> int:
        return self._images[0].height

    @property
    def width(self) -> int:
        return self._images[0].width

    @property
    def dtype(self) -> np.dtype:
        return self._images[0].dtype

    @property
    def crs(self) -> str | None:
        return self._images[0].crs or self._crs

    @property
    def transform(self) -> Affine | None:
        return self._images[0].transform or self._transform

    @cached_property
    def date(self) -> Date | None:
        return self._date or self._images[0].date

    def read(self, window: Window | None = None) -> Pixels:
        """Pixels of all bands."""
        found = [
            self._read(image, name, window) for image, name in zip(self._images, self._names, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        values = np.concatenate([p.values for p in found])
        if all(p.invalid is None for p in found):
            return Pixels(values, None)
        marked = [np.zeros(p.values.shape, bool) if p.invalid is None else p.invalid for p in found]
        return Pixels(values, np.concatenate(marked))

    def _read(self, image: RasterImage, name: str, window: Window | None) -> Pixels:
        from rasterio.errors import RasterioError

        try:
            return image.read(window)
        except (RasterioError, OSError) as error:
            cause = " ".join(str(error.__cause__ or error).split())  # of GDAL, which says more
            raise DatasetError(
                f"{name}: cannot be read ({shorten(cause, 200)}); fetch the file again"
            ) from error
