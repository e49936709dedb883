"""Sections on files with images: their bands, dates and masks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from maestro_scale.datasets.description.sections.fields import (
    Axis,
    BandSource,
    SourceKind,
    Text,
    Texts,
    Window,
    numbers,
)
from maestro_scale.strict_yaml.errors import ConflictError
from maestro_scale.strict_yaml.fields import Count, Section, listed, some


class Dates(Section):
    """Where the dates of a raster's images are."""

    from_: Annotated[
        Literal["name", "tag", "csv", "text", "coordinate", "constant", "reference"], Field(alias="from")
    ]
    """name: ``{date}`` in ``files``. tag: a metadata tag of each file. csv: a table with a row per image, or per tile.
    text: a text file per tile with a line per image, in order. coordinate: of the file (NetCDF, HDF5, Zarr; Parquet:
    a column), or what the format itself records (STAC). constant: one date for all. reference: the reference date of
    the tile, for what has no date of its own, such as an elevation model."""
    format: Text | None = None
    """How dates are written, with the codes of strptime (``%Y%m%d``, ``%Y-%j``, ``%Y%m%dT%H%M%S``); null: ISO 8601 or
    YYYYMMDD. Of names, the format stands in the pattern: ``{date:%Y%m%d}``."""
    part: int | None = None
    """Where a text is a product name: the part between underscores that begins with the date, counted from 0, or from
    the end with -1 for the last; null: the whole text is the date."""
    tag: Text | None = None
    """from tag: name of the tag; null: TIFFTAG_DATETIME or ACQUISITIONDATETIME."""
    file: Text | None = None
    """from csv: CSV or Parquet file. from text: pattern with ``{key}``."""
    key: Text | None = None
    """from csv: column with the tile keys (or with file names, below SRC); null: the first column."""
    column: Text | None = None
    """from csv: column with the dates: one per row, with several rows per tile in the order of its images; or all dates
    of a tile in one cell, as a JSON list or object or separated by spaces, commas or semicolons. null: ``date``."""
    coordinate: Text | None = None
    """from coordinate: its name; null: that of the dates in ``axes``, ``time`` or ``date``."""
    date: Text | None = None
    """from constant: the date, as in ``format``."""


class Band(Section):
    """One band of a raster: its name in the shards, and what it is called where it comes from."""

    name: Text
    """Name in the shards, for example B2 or VV."""
    from_: Annotated[BandSource, Field(alias="from")]
    """The number of the band in its file, from 1; or text: what stands for it in ``{band}`` of a file name, or the name
    of the variable, asset or band description."""


def _band(value: Any) -> Any:
    return {"name": value, "from": value} if isinstance(value, str) else value


Bands = Annotated[
    tuple[Annotated[Band, BeforeValidator(_band)], ...], BeforeValidator(listed), AfterValidator(some)
]


class ImageFiles(Section):
    """Files with images, of a raster, a mask or a target. Sources (datasets/sources/) get a section of this kind."""

    files: Text | None = None
    """Path or address below SRC, as a pattern: ``{key}`` is the tile, ``{date}`` the date (``{date:%Y%j}``), ``{band}``
    the band, ``{split}`` the split; any other name, such as ``{orbit}``, stands for text that may differ. A name does
    not match ``/``; a name that occurs twice matches the same text. ``*`` matches text that does not matter. Null, of a
    mask: the files of its raster."""
    exclude: Texts = ()
    """Patterns of files to leave out, of those that ``files`` matches: ``"*_mask.tif"`` beside ``{key}.tif``."""
    source: SourceKind | None = None
    """Storage format; null: by the suffix of ``files``."""
    key: Text | None = None
    """Tile key, if it is made of several names of the pattern: ``"{zone}_{row}_{column}"``; null: ``{key}``."""
    variable: Text | None = None
    """What in a file holds the images: variable (NetCDF), dataset (HDF5), array (Zarr), array of an npz, column
    (Parquet), suffix of the member (WebDataset; of a zipped Zarr with the array, ``zarr.zip/bands``), asset (STAC).
    ``{band}`` in it stands for the band."""
    axes: Annotated[tuple[Axis, ...], BeforeValidator(listed)] | None = None
    """Order of the axes of an array: key, date, band, y, x. Null: of GeoTIFF (and of an array of that many axes) band,
    y, x. ``[date, band, y, x]`` for a GeoTIFF: its bands are those of the first date, then those of the second …"""
    bands_per_date: Count | None = None
    """Of a GeoTIFF with the bands of several dates: how many each date has in the file. Null: those that are listed."""
    keys: Text | None = None
    """Where one file holds many tiles: the coordinate, dataset (of HDF5: of a table its first column), column or
    property with the keys of its tiles, in order; null: the index, from 0."""
    dates: Annotated[Dates, BeforeValidator(lambda v: {"from": v} if isinstance(v, str) else v)] | None = None
    """Where the dates are; null: ``{date}`` of the pattern, else those of the format (STAC, time coordinate)."""
    nodata: Annotated[tuple[float, ...], BeforeValidator(numbers)] = ()
    """Values in the files that mean "not measured", beside those that the file itself declares."""
    crs: Text | None = None
    """Coordinate system of files that declare none, for example EPSG:2154."""
    window: Window | None = None
    """Row and column where the tile begins in images that are larger than it. Null: the images are the tile."""
    unpack: bool = False
    """Apply the ``scale_factor`` and ``add_offset`` that arrays of NetCDF, HDF5 and Zarr files declare; values become
    floating-point numbers. False: values as they are stored."""

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        """For each band its number in the file from 1, or the text that stands for it."""
        return (1,)

    @property
    def labels(self) -> frozenset[int]:
        """Of a label image the values that are labels, even if a file declares one of them as its nodata value."""
        return frozenset()

    @property
    def is_dated_by_name(self) -> bool:
        """Whether the dates are in the names of the files."""
        return (self.dates is None or self.dates.from_ == "name") and "{date" in (self.files or "")


class MaskRule(ImageFiles):
    """One mask band: which pixels are marked, in percent. Exactly one of classes, bits, above and percent."""

    band: BandSource = 1
    """The band of the mask's values: number in its file from 1, or what stands for it (as ``from`` of a band)."""
    classes: Annotated[tuple[int, ...], BeforeValidator(numbers)] = ()
    """Marked are pixels with one of these values: of the Sentinel-2 scene classification (SCL) 3, 8, 9, 10 are cloud
    shadow, cloud with medium and high probability, and cirrus; 11 is snow."""
    bits: Annotated[tuple[Annotated[int, Field(ge=0, le=63)], ...], BeforeValidator(numbers)] = ()
    """Marked are pixels with one of these bits set, counted from 0: of Landsat QA_PIXEL 3 is cloud, 4 cloud shadow, 5
    snow."""
    above: float | None = None
    """Marked are pixels above this value."""
    percent: bool = False
    """The values are percentages, 0 to 100."""
    invert: bool = False
    """Mark the others: of a mask that says where it is clear."""

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        return (self.band,)

    @model_validator(mode="after")
    def _check_rule(self) -> MaskRule:
        given = [bool(self.classes), bool(self.bits), self.above is not None, self.percent]
        if sum(given) != 1:
            raise ConflictError(((), "needs exactly one of classes, bits, above and percent"))
        return self
