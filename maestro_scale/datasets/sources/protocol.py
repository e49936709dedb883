"""The protocol of sources: what a storage format must offer, so that descriptions can use it.

A source is a module with the two functions of :class:`Source`. It lists images and opens them; it knows neither tiles
nor grids. An *image* is one raster on one date, or those of its bands that one file holds: bands in several files are
joined later (description/assemble.py), as are the images of a tile. Listing opens no file where the pattern says all
that is asked, so a million files are listed in seconds; what only a file says (dates in tags, how many images it
holds) is known once it is open.

Shapes: C bands of the image, h×w pixels of a window; row 0 is the first row of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles

Date = tuple[int, int, int]
"""Year, day of year from 1, hour: a row of ``Tile.dates``."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where one image is. Picklable and small: there may be millions.

    ``address``: path or URL of the file that :meth:`Source.open_file` opens. ``key``: tile or scene; None if nothing
    says. ``date``: None if not known before the file is open, or undated. ``bands``: indices into
    ``ImageFiles.band_sources`` of the bands that it holds, in its order. ``part``: which image of the file, for the
    source only: index of the date, row, name of the member; empty: the whole file. ``names``: other names of the
    pattern with their text, in the order of the pattern; images that differ in them are different images.
    """

    address: str
    key: str | None
    date: Date | None
    bands: tuple[int, ...]
    split: str | None = None
    part: tuple[int | str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def __reduce__(self) -> tuple:
        # What dataclasses do for slots takes ten times as long, and a worker gets millions.
        return ImageRef, (self.address, self.key, self.date, self.bands, self.split, self.part, self.names)


class Window(NamedTuple):
    """A rectangle of pixels of an image."""

    row: int
    column: int
    height: int
    width: int


class Pixels(NamedTuple):
    """``values`` (C, h, w) in the type of the file; ``invalid`` (C, h, w) bool: what the file itself declares as not
    measured (nodata value, mask band, fill value), or None if it declares nothing of it so."""

    values: np.ndarray
    invalid: np.ndarray | None


class Image(Protocol):
    """An image of an open file. Properties are read from headers: no pixel is read for them.

    An image that can be larger than a tile should also have ``block``, the rows and columns of the blocks (chunks) that
    are decompressed as a whole: tiles are then cut in an order in which each is read once.
    """

    @property
    def count(self) -> int:
        """Number of bands, C: as many as ``ImageRef.bands``."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def crs(self) -> str | None:
        """``EPSG:2154`` or WKT; None if the file declares none (``ImageFiles.crs`` is applied by who asks)."""

    @property
    def transform(self) -> tuple[float, float, float, float, float, float] | None:
        """Affine (a, b, c, d, e, f): x = a · column + b · row + c, y = d · column + e · row + f; or None."""

    @property
    def date(self) -> Date | None:
        """What the file itself records, by ``ImageFiles.dates`` (tag, coordinate); None where it is not asked to."""

    def read(self, window: Window | None = None) -> Pixels:
        """Pixels of a window within the image, or of the whole image; DatasetError that names file and cause."""


class OpenFile(Protocol):
    """A file that is open. Not picklable, and used by one thread."""

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """The images of this file that ``ref`` stands for, in stored order: itself, unless listing could not tell how
        many there are (dates of a NetCDF file, bands of a stack)."""

    def image(self, ref: ImageRef) -> Image:
        """One image; ``ref`` is one of :meth:`images`. It is valid while the file is open."""


class Source(Protocol):
    """The functions of a module in datasets/sources/."""

    def list_images(self, section: ImageFiles, src: str) -> Iterable[ImageRef]:
        """The images of ``section.files`` below ``src`` (folder or address), in any order.

        DatasetError (one line) if a folder, an address or the file itself cannot be listed; a single file that is
        damaged is not noticed here. Nothing found is not an error here, either: who asks knows better what to say.
        """

    def open_file(self, address: str, section: ImageFiles) -> AbstractContextManager[OpenFile]:
        """Open one file; DatasetError that names file and cause if it is missing, damaged or of another format."""
