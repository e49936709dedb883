"""GeoTIFF, COG, PNG and JPEG 2000: an image per file, or several dates as bands of one file.

Bands are in one file, by number, by description or in order, or in a file each (``{band}``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.description.patterns import parse_date_text
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.listing import list_files
from maestro_scale.datasets.sources.protocol import Date, ImageRef, Pixels, Window
from maestro_scale.datasets.spec import DatasetError

_DATE_TAGS = (("TIFFTAG_DATETIME", None), ("ACQUISITIONDATETIME", "IMAGERY"))
_TIFF_DATE = "%Y:%m:%d %H:%M:%S"  # of the TIFF standard


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`; opens no file."""
    return list_files(section, src)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[RasterFile]:
    """As :meth:`.protocol.Source.open_file`."""
    if not remote.is_remote(address):
        with raw.open_raster(Path(remote.local_path(address))) as raster:
            yield RasterFile(raster, address, section)
        return
    # Not by GDAL's own network access: this has the credentials and retries of all remote files.
    with remote.open_binary(address) as file, raw.open_raster_file(file, address) as raster:
        yield RasterFile(raster, address, section)


class RasterFile:
    """An open raster file (a :class:`.protocol.OpenFile`)."""

    def __init__(self, raster: Any, address: str, section: ImageFiles) -> None:
        self._raster, self._address, self._section = raster, address, section

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """``ref``, or a reference for each date of a stack."""
        if not self._stacked:
            return [ref]
        return [replace(ref, part=(i,)) for i in range(self._num_dates(self._per_date(ref)))]

    def image(self, ref: ImageRef) -> RasterImage:
        """One image; DatasetError if the file lacks one of its bands."""
        if not self._stacked:
            return RasterImage(self._raster, self._address, self._section, *self._bands_of(ref))
        per_date = self._per_date(ref)
        num_dates, date = self._num_dates(per_date), int(ref.part[0])
        by_date = self._axes.index("date") < self._axes.index("band")
        # Names of bands stand for their order: a stack repeats them.
        listed = [self._section.band_sources[i] for i in ref.bands]
        wanted = [band - 1 if isinstance(band, int) else i for i, band in enumerate(listed)]
        bands = [date * per_date + b if by_date else b * num_dates + date for b in wanted]
        alpha = raw.has_extra_alpha(self._raster, per_date)
        return RasterImage(self._raster, self._address, self._section, [b + 1 for b in bands], alpha)

    @property
    def _axes(self) -> tuple[str, ...]:
        return self._section.axes or ("band", "y", "x")

    @property
    def _stacked(self) -> bool:
        return "date" in self._axes

    def _per_date(self, ref: ImageRef) -> int:
        """Bands of one date in a stack."""
        numbers = [b for b in self._section.band_sources if isinstance(b, int)]
        per_date = self._section.bands_per_date or max([len(ref.bands), *numbers])
        if max(numbers, default=0) > per_date:
            raise DatasetError(
                f"{self._section.files}: has band {max(numbers)}, but {per_date} bands per date"
            )
        return per_date

    def _num_dates(self, num_bands: int) -> int:
        count = self._raster.count - raw.has_extra_alpha(self._raster, num_bands)
        if count % num_bands:
            raise DatasetError(
                f"{self._address}: has {self._raster.count} bands, expected a multiple of {num_bands}; fetch the file "
                "again",
                "another number of bands",
            )
        return count // num_bands

    def _bands_of(self, ref: ImageRef) -> tuple[list[int], bool]:
        """Numbers of the bands, from 1, and whether the file has an alpha channel beside them."""
        wanted = [self._section.band_sources[i] for i in ref.bands]
        if "{band}" in (self._section.files or ""):
            wanted = [1]
        numbers = [w for w in wanted if isinstance(w, int)]
        if len(numbers) == len(wanted):
            if (highest := max(numbers)) > self._raster.count:
                raise DatasetError(
                    f"{self._address}: has {self._raster.count} bands, so no band {highest}; fix the description, or "
                    "fetch the file again",
                    "another number of bands",
                )
            return numbers, raw.has_extra_alpha(self._raster, highest) and self._raster.count == highest + 1
        found = {text: i for i, text in enumerate(self._raster.descriptions, start=1) if text}
        if all(isinstance(w, int) or w in found for w in wanted):
            return [w if isinstance(w, int) else found[w] for w in wanted], False
        alpha = raw.has_extra_alpha(self._raster, len(wanted))
        if numbers or self._raster.count - alpha != len(wanted):
            known = f"bands called {', '.join(found)}" if found else "no names of bands"
            raise DatasetError(
                f"{self._address}: has {self._raster.count} bands, and {known}, where the description lists "
                f"{len(wanted)} ({', '.join(map(str, wanted))}); say which is which by from: NUMBER",
                "another number of bands",
            )
        return list(range(1, len(wanted) + 1)), alpha


class RasterImage:
    """Bands of an open raster file (a :class:`.protocol.Image`)."""

    def __init__(
        self, raster: Any, address: str, section: ImageFiles, bands: Sequence[int], alpha: bool
    ) -> None:
        self._raster, self._address, self._section = raster, address, section
        self._bands, self._alpha = list(bands), alpha

    @property
    def count(self) -> int:
        """Number of bands."""
        return len(self._bands)

    @property
    def height(self) -> int:
        """Rows."""
        return self._raster.height

    @property
    def width(self) -> int:
        """Columns."""
        return self._raster.width

    @property
    def dtype(self) -> np.dtype:
        """Type of the first band; GDAL converts the others to it."""
        return np.dtype(self._raster.dtypes[self._bands[0] - 1])

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the blocks that are decompressed as a whole."""
        height, width = self._raster.block_shapes[self._bands[0] - 1]
        return int(height), int(width)

    @cached_property
    def crs(self) -> str | None:
        """As the file declares it."""
        return self._raster.crs.to_string() if self._raster.crs else None

    @property
    def transform(self) -> tuple[float, float, float, float, float, float] | None:
        """As the file declares it; None for the identity, which GDAL gives for files without."""
        found = self._raster.transform
        return None if found.is_identity else (found.a, found.b, found.c, found.d, found.e, found.f)

    @cached_property
    def date(self) -> Date | None:
        """Of the tag that the section names."""
        dates = self._section.dates
        if dates is None or dates.from_ != "tag":
            return None
        for name, domain in [(dates.tag, None)] if dates.tag else _DATE_TAGS:
            for place in (0, self._bands[0]):  # of the file, then of the band
                if text := self._raster.tags(place, ns=domain).get(name):
                    format = dates.format or (_TIFF_DATE if name == _DATE_TAGS[0][0] else None)
                    return parse_date_text(text, format, dates.part, f"{self._address}: tag {name}")
        names = dates.tag or " or ".join(name for name, _ in _DATE_TAGS)
        raise DatasetError(
            f"{self._address}: has no tag {names}; set dates.tag, or give dates otherwise", "no date"
        )

    def read(self, window: Window | None = None) -> Pixels:
        """Pixels of a window, or of the whole image, and what the file declares as invalid."""
        from rasterio.windows import Window as RasterWindow

        where = None
        if window is not None:
            where = RasterWindow(window.column, window.row, window.width, window.height)
        labels = self._section.labels
        return Pixels(
            *raw.read_bands(self._raster, self._bands, alpha=self._alpha, labels=labels, window=where)
        )
