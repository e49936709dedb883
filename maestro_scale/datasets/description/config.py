"""The keys of a description: a dataset of images and labels in files, as one YAML document.

Tiles that are there as files, one image per tile and date::

    # yaml-language-server: $schema=description.schema.json
    name: orchards
    tile_m: 640
    rasters:
      s2:
        files: "s2/{key}/{date:%Y%m%d}_{band}.tif"
        bands: [{name: B2, from: B02}, {name: B3, from: B03}, {name: B4, from: B04}, {name: B8, from: B08}]
        resolution_m: 10
        dtype: uint16
        series: true
        nodata: 0
        quantity: reflectance
        masks:
          cloud: {files: "s2/{key}/{date:%Y%m%d}_SCL.tif", classes: [3, 8, 9, 10]}
        sensor: {patch: 2, num_dates: 8}
      aerial:
        files: "aerial/{key}.tif"
        bands: [R, G, B]
        resolution_m: 0.5
        dtype: uint8
        quantity: image
        dates: {from: csv, file: flights.csv, key: tile, column: day, format: "%d.%m.%Y"}
        sensor: {patch: 16}
    targets:
      crop:
        kind: segmentation
        raster: {files: "labels/{key}.tif", nodata: 255}
        resolution_m: 10
        classes: [grass, apple, pear, unknown]
        values: {1: grass, 20: apple, 21: apple, 30: pear, 99: unknown}
        ignored: [unknown]
      yield:
        kind: regression
        units: t/ha
        table: {file: harvest.csv, key: tile, column: yield}
    splits:
      lists: {file: "{split}.txt"}

Scenes that are larger than a tile: ``grid`` cuts all rasters on one grid, and says where::

    name: valley
    tile_m: 1280
    crop_m: 320
    grid: {crs: "EPSG:32632", area: {file: valley.gpkg}, min_valid: 0.8}
    rasters:
      s2:
        files: "S2_{tile}_{date:%Y%m%dT%H%M%S}.tif"
        bands: [B2, B3, B4, B8]
        resolution_m: 10
        dtype: int16
        series: true
        quantity: reflectance
        resampling: cubic
        sensor: {patch: 2, num_dates: 4}
      dem:
        files: dem.tif
        bands: [height]
        resolution_m: 10
        dtype: float32
        dates: {from: constant, date: 2020-01-01}
        quantity: elevation
        resampling: bilinear
        sensor: {patch: 4}
    targets:
      landcover:
        kind: segmentation
        vector: {files: landcover.gpkg, layer: polygons, column: class}
        resolution_m: 10
        classes: [forest, meadow, water, other]
        ignored: [other]
        outside: other
    splits:
      blocks: {size_m: 5120, fractions: {train: 0.7, val: 0.15, test: 0.15}, distance_m: 1280}

One file with many tiles and dates (NetCDF, HDF5, Zarr, NumPy): ``variable`` and ``axes`` say where the images are::

    name: cubes
    tile_m: 640
    rasters:
      s2:
        files: "cubes/{key}.nc"
        variable: reflectance
        axes: [date, band, y, x]
        bands: [B02, B03, B04]
        resolution_m: 10
        dtype: float32
        series: true
        dates: {from: coordinate, coordinate: time}
        quantity: any
        sensor: {patch: 2, num_dates: 4, scale: {divisor: 1.0}}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from maestro_scale.datasets.spec import TargetKind
from maestro_scale.errors import KeyPath, did_you_mean
from maestro_scale.strict_yaml.errors import ConflictError
from maestro_scale.strict_yaml.fields import Count, Section, listed, some

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_WHOLE = 0.01  # pixels: a size of 0.333333 m is a third

SourceKind = Literal["geotiff", "netcdf", "hdf5", "zarr", "numpy", "parquet", "webdataset", "stac"]
"""Storage formats; one module each in datasets/sources/."""
Axis = Literal["key", "date", "band", "y", "x"]
QuantityKind = Literal["reflectance", "backscatter_linear", "backscatter_db", "elevation", "image", "any"]
"""What a raster measures; datasets/fill.py has the valid range and the fill values of each."""
Resampling = Literal["nearest", "bilinear", "cubic", "average", "mode"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,100}$")]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Metres = Annotated[float, Field(gt=0)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(listed)]


def _band_source(value: Any) -> int | str:
    if (type(value) is int and value >= 1) or (isinstance(value, str) and 0 < len(value) <= 1000):
        return value
    raise ValueError(f"must be the number of a band, from 1, or text, got {value!r}")


# A union would report one error per member.
BandSource = Annotated[
    int | str,
    PlainValidator(_band_source),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "minLength": 1}]}),
]
Index = Annotated[int, Field(ge=0)]
Window = Annotated[tuple[Index, Index], BeforeValidator(listed)]


def _numbers(value: Any) -> Any:
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else listed(value)


def is_integer(text: str) -> bool:
    """Whether a label is the value of a pixel."""
    return bool(_INTEGER.fullmatch(text))


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
    nodata: Annotated[tuple[float, ...], BeforeValidator(_numbers)] = ()
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
    classes: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = ()
    """Marked are pixels with one of these values: of the Sentinel-2 scene classification (SCL) 3, 8, 9, 10 are cloud
    shadow, cloud with medium and high probability, and cirrus; 11 is snow."""
    bits: Annotated[tuple[Annotated[int, Field(ge=0, le=63)], ...], BeforeValidator(_numbers)] = ()
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


class SensorScale(Section):
    """How stored values become network inputs (datasets.spec.Scale)."""

    kind: Literal["linear", "log"] = "linear"
    """``linear``: x / divisor; ``log``: ln(max(x, 1e-10)) / divisor, for radar in linear power."""
    divisor: Annotated[float, Field(gt=0)] = 1.0
    """Divisor of the value: most scaled values should lie in 0 to 1."""


class SensorPreset(Section):
    """One input of the model (datasets.spec.Sensor); what is null follows from the raster. Recipes can change it."""

    patch: Count | None = None
    """Pixels per side of the square that becomes one token; it divides ``image_size``. Null: the divisor that gives the
    most tokens up to 20 a side."""
    num_dates: Count | None = None
    """Dates per sample, one from each of this many equal bins of the series. Null: 1, of a series 8."""
    image_size: Count | None = None
    """Pixels per side of the model's input, to which the crop is resized. Null: those of the crop."""
    bands: Annotated[tuple[Text, ...], BeforeValidator(listed)] | None = None
    """Names of the bands in the order of the model. Null: all."""
    band_groups: tuple[Count, ...] | None = None
    """Sizes of consecutive groups of similar bands, over which targets are normalised. Null: one group."""
    token_groups: tuple[Count, ...] = ()
    """Bands per token with model.spectral=token; empty: the band groups."""
    scale: SensorScale | None = None
    """How stored values become network inputs. Null: by the quantity (image 255, reflectance 10000, backscatter_db 20,
    backscatter_linear log 5, elevation 1000); needed for ``any``."""
    group: Text | None = None
    """Sensors of one group share one token sequence in the encoder. Null: the sensor's name."""
    embed: Text | None = None
    """Sensors of one embed share the weights of the patch embedding. Null: the sensor's name."""
    mask_threshold: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A pixel is cloudy or snowy where any mask band exceeds this, in percent."""
    elevation: bool = False
    """Channel 1 becomes 30 · (channel 0 - channel 1) after scaling, for a surface and a terrain model."""


class FurtherSensor(SensorPreset):
    """A further input of the model from a raster that has a sensor of its own."""

    source: Name
    """The raster it reads."""


class Raster(ImageFiles):
    """One kind of image of a tile, stored as one modality."""

    files: Text
    """Path or address below SRC, as a pattern: ``{key}`` is the tile, ``{date}`` the date (``{date:%Y%j}``), ``{band}``
    the band, ``{split}`` the split; any other name, such as ``{orbit}``, stands for text that may differ. A name does
    not match ``/``; a name that occurs twice matches the same text. ``*`` matches text that does not matter."""
    bands: Bands
    """The bands to store, in order: names, or ``{name, from}`` where the file has other names or another order."""
    resolution_m: Metres
    """Ground size of a stored pixel. Without ``grid`` also that of the files."""
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
    """Numpy name of the stored type."""
    series: bool = False
    """Whether a tile has several images, each with its date."""
    scale: float = 1.0
    """Stored value = scale · value in the file + offset. A scale that the file declares is not applied (but see
    ``unpack``)."""
    offset: float = 0.0
    """See ``scale``: Sentinel-2 since processing baseline 04.00 needs -1000."""
    masks: dict[Name, MaskRule] = Field(default_factory=dict)
    """Mask bands by name, in order: ``cloud`` and ``snow`` are known to the selection of dates. Pixels that a rule
    called ``nodata`` marks are not measured, as if the file declared them so."""
    quantity: QuantityKind = "any"
    """What is measured: it determines which values are valid, and how invalid ones are stored."""
    valid: tuple[float | None, float | None] | None = None
    """Lowest and highest valid value, as stored, if another range than the quantity's applies."""
    nodata_mask: bool = True
    """Store which pixels are invalid, as mask band ``nodata``: these count neither in the selection of dates nor in the
    loss. false saves its space (a byte per pixel and date, without compression) where images have no gaps; invalid
    values are then stored as 0 or NaN."""
    resampling: Resampling = "bilinear"
    """How pixels are warped to the grid; masks and label images: nearest."""
    required: bool | None = None
    """Whether a tile without it is left out, and counted. false: the tile is stored with what it has. Null: as false,
    but it is an error if no tile has it, since then ``files`` is wrong; with ``grid`` as true."""
    sensor: SensorPreset | None = SensorPreset()
    """How the model uses it. null: it is stored only."""

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        return tuple(band.from_ for band in self.bands)


class RasterTarget(ImageFiles):
    """An image of labels or numbers."""

    files: Text
    """As of a raster."""
    band: BandSource = 1
    """The band: number in its file from 1, or what stands for it."""
    _labels: frozenset[int] = PrivateAttr(frozenset())

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        return (self.band,)

    @property
    def labels(self) -> frozenset[int]:
        return self._labels

    def with_labels(self, labels: frozenset[int]) -> RasterTarget:
        """The same section, with the values that are labels."""
        section = self.model_copy()
        section._labels = labels
        return section


class VectorTarget(Section):
    """Features with labels, rasterised: GeoPackage, GeoJSON, GeoParquet, Shapefile. Needs ``resolution_m``."""

    files: Text
    """Path or address below SRC; ``{key}`` where each tile has its own file."""
    layer: Text | None = None
    """Layer of a GeoPackage; null: its only one."""
    crs: Text | None = None
    """Coordinate system of a file that declares none, such as a Shapefile without its ``.prj``."""
    column: Text | None = None
    """Attribute with the label; null: the target has one class beside ``outside``, the features themselves."""
    all_touched: bool = False
    """Label every pixel that a feature touches, instead of those whose centre lies inside."""
    order: Text | None = None
    """Attribute by which features are drawn, the highest last, where they overlap; null: the order of the file."""


class TableTarget(Section):
    """A CSV or Parquet file with a row per tile, or tars in the layout of WebDataset with a member per tile."""

    file: Text
    """Path or address below SRC; of tars a pattern or braces, as of a raster: ``"train-{000..099}.tar"``."""
    key: Text | None = None
    """Column with the tile keys; null: the first column. Of tars null."""
    column: Text | None = None
    """Column with the label or the number (of several classes: separated by commas, semicolons or spaces). Of tars the
    suffix of a member with text, with the path in a JSON document: ``cls``, ``json/properties/crop``."""
    columns: Annotated[tuple[Text, ...], BeforeValidator(listed)] | None = None
    """Columns with the area shares of a multilabel target, in the order of the classes; null: called as the classes."""


class Target(Section):
    """What is to be predicted: exactly one of raster, vector, table, name and of says where it comes from."""

    kind: TargetKind
    """multilabel (shares of classes), segmentation (a class per pixel), classification (a class per tile), or
    regression (a number per tile or per pixel)."""
    classes: Texts = ()
    """Names of the classes; labels are their indices, from 0. Empty for regression."""
    values: dict[str, str | None] = Field(default_factory=dict)
    """Label in the source → name of the class, where labels are not the indices of ``classes`` (or, as text, their
    names); several labels may be one class; null: as if there were no label."""
    ignored: Texts = ()
    """Classes that do not count in losses and scores; the first one stands for pixels without a label."""
    raster: RasterTarget | None = None
    """Labels, or numbers, as images."""
    vector: VectorTarget | None = None
    """Labels, or numbers, as features that are rasterised."""
    table: TableTarget | None = None
    """Labels, or numbers, by tile."""
    name: Text | None = None
    """The label is a part of the path: the name of the part in the pattern of the first raster that has it, such as
    ``class`` of ``{class}/{key}.tif``."""
    of: Name | None = None
    """Multilabel: shares of the classes in this segmentation target."""
    resolution_m: Metres | None = None
    """Ground size of a pixel of a raster or vector target."""
    outside: Text | None = None
    """Vector: class of pixels outside of all features; null: they have no label."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multilabel: a class is positive where its share exceeds this."""
    units: Annotated[str, Field(max_length=40)] = ""
    """Regression: units of the numbers."""
    scale: float = 1.0
    """Regression: stored number = scale · number in the source."""

    @property
    def labels(self) -> dict[str, int | None]:
        """Label in the source, as text → index of its class; None for no label. By ``values``, else by index, and by
        the name of a class."""
        index = {name: i for i, name in enumerate(self.classes)}
        if not self.values:
            return {**{str(i): i for i in index.values()}, **index}
        found = {label: None if name is None else index[name] for label, name in self.values.items()}
        return found if all(map(is_integer, self.values)) else {**index, **found}

    @property
    def label_section(self) -> RasterTarget | None:
        """The images of labels or numbers, if the target is made of these, with the values that are labels."""
        if self.raster is None or self.kind == "regression":
            return self.raster
        return self.raster.with_labels(frozenset(int(label) for label in self.labels if is_integer(label)))

    @model_validator(mode="before")
    @classmethod
    def _text_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("values"), dict):
            return {**data, "values": {str(k): v for k, v in data["values"].items()}}
        return data

    @model_validator(mode="after")
    def _check_source(self) -> Target:
        given = [n for n in ("raster", "vector", "table", "name", "of") if getattr(self, n) is not None]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "says not where it comes from"
            raise ConflictError(((), f"{what}: give exactly one of raster, vector, table, name and of"))
        return self


class SplitLists(Section):
    """A file per split that names its tiles."""

    file: Text
    """Path below SRC with ``{split}``: a text file with a key per line, or a CSV or Parquet file."""
    column: Text | None = None
    """Column of the CSV; null: the first."""


class SplitColumn(Section):
    """A table with the split of every tile."""

    file: Text
    """CSV, Parquet or GeoPackage below SRC."""
    key: Text | None = None
    """Column with the tile keys; null: the first."""
    column: Text = "split"
    """Column with the splits."""


class SplitBlocks(Section):
    """Square blocks of ground that are drawn to splits, with a distance between splits; needs ``grid``, or files with
    coordinates. The draw depends on the seed and the place of a block only, so it is the same on any machine."""

    size_m: Metres
    """Side of a block."""
    fractions: dict[Name, Annotated[float, Field(gt=0, le=1)]]
    """Fraction of the blocks by split; they add up to 1."""
    distance_m: Annotated[float, Field(ge=0)] = 0.0
    """Tiles nearer than this to a tile of another split are left out (of the split with the larger fraction)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw."""


class Splits(Section):
    """Which tiles are in which split: at most one of lists, column and blocks. ``{split}`` in the patterns of files
    needs neither. Without any, all tiles are in the split ``train``."""

    lists: SplitLists | None = None
    """A file per split."""
    column: SplitColumn | None = None
    """A table with the split of every tile."""
    blocks: SplitBlocks | None = None
    """Drawn by blocks of ground."""
    names: dict[Name, Texts] = Field(default_factory=dict)
    """Split → what it is called in files, folders or columns, where that differs: ``{val: [valid, validation]}``."""

    @model_validator(mode="after")
    def _check_one(self) -> Splits:
        given = [n for n in ("lists", "column", "blocks") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConflictError(((given[1],), f"excludes {given[0]}: keep one"))
        return self


class Area(Section):
    """Where tiles are wanted."""

    file: Text
    """Path or address below SRC of a vector file with polygons."""
    layer: Text | None = None
    """Layer of a GeoPackage; null: its only one."""
    crs: Text | None = None
    """Coordinate system of a file that declares none, such as a Shapefile without its ``.prj``."""


class Grid(Section):
    """The common grid on which rasters larger than a tile are cut."""

    crs: Text | None = None
    """Coordinate system in metres, for example EPSG:2154; null: that of the first raster's files."""
    stride_m: Metres | None = None
    """Distance from tile to tile; null: ``tile_m``. Smaller: tiles overlap."""
    origin: Annotated[tuple[float, float], BeforeValidator(listed)] | None = None
    """East and north coordinate of a corner of the grid. Null: the corner next to 0 at which the pixels of the first
    raster begin, so that they are copied, not resampled."""
    area: Annotated[Area, BeforeValidator(lambda v: {"file": v} if isinstance(v, str) else v)] | None = None
    """Polygons: tiles whose centre lies inside are kept; null: all tiles that the first raster covers."""
    min_valid: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Smallest fraction of a tile's pixels that an image must cover with valid values to be stored; a tile without such
    an image of every required raster is left out."""


class Description(Section):
    """A dataset described in YAML."""

    name: Name
    """Name of the dataset in manifests and recipes."""
    title: Text | None = None
    """Name for people; null: ``name``."""
    tile_m: Metres
    """Ground extent of a tile, a square."""
    crop_m: Metres | None = None
    """Ground extent of a sample, cut from a tile; null: ``tile_m``."""
    rasters: Annotated[dict[Name, Raster | None], Field(min_length=1)]
    """Kinds of images by name, in order. null: leave out one that an extended file has."""
    targets: dict[Name, Target | None] = Field(default_factory=dict)
    """What can be predicted, by name. null: leave out one that an extended file has."""
    sensors: dict[Name, FurtherSensor] = Field(default_factory=dict)
    """Further inputs of the model from these rasters, by name."""
    splits: Splits = Splits()
    """Which tiles are in which split."""
    grid: Grid | None = None
    """Cut rasters that are larger than a tile. Null: every image is a tile."""
    ref_date: Name | None = None
    """The raster whose (first) date is the tile's reference date; null: the first one that is not a series, else the
    first."""
    ref_sensor: Name | None = None
    """The sensor on whose tokens maps are predicted; null: the one whose pixels are nearest to the target's."""
    pos_grid: Count | None = None
    """Cells per side of the ground grid that positions are averaged from; null: a multiple of the token grids."""
    origin: Name | None = None
    """The raster or raster target whose files say where a tile lies; null: the first that does."""
    synthetic: bool | None = None
    """Whether the images are synthetic, as recorded in the manifest; null: as the folder says."""

    @model_validator(mode="after")
    def _check_references(self) -> Description:
        problems = [*_reference_problems(self)]
        if problems:
            raise ConflictError(*problems)
        return self


def _reference_problems(d: Description) -> Iterator[tuple[KeyPath, str]]:
    """Names that stand for nothing, and values that do not go together, across the sections of a description."""
    rasters = {name: raster for name, raster in d.rasters.items() if raster is not None}
    targets = {name: target for name, target in d.targets.items() if target is not None}
    if not rasters:
        yield ("rasters",), "needs at least one"
    for name, raster in rasters.items():
        yield from _raster_problems(("rasters", name), raster)
        if raster.sensor is not None:
            yield from _preset_problems(("rasters", name, "sensor"), raster.sensor, raster)
    for name, preset in d.sensors.items():
        if preset.source not in rasters:
            yield (
                ("sensors", name, "source"),
                f"no raster is called {preset.source!r}{did_you_mean(preset.source, rasters)}",
            )
        else:
            yield from _preset_problems(("sensors", name), preset, rasters[preset.source])
        if name in rasters and rasters[name].sensor is not None:
            yield ("sensors", name), f"raster {name} has a sensor of this name; call it otherwise"
    if d.ref_date is not None and d.ref_date not in rasters:
        yield ("ref_date",), f"no raster is called {d.ref_date!r}{did_you_mean(d.ref_date, rasters)}"
    if d.origin is not None and d.origin not in {*rasters, *targets}:
        yield (
            ("origin",),
            f"no raster or target is called {d.origin!r}{did_you_mean(d.origin, [*rasters, *targets])}",
        )
    for name, target in targets.items():
        yield from _target_problems(("targets", name), target, targets)
    if d.grid is not None:
        for kind, found in (("rasters", rasters), ("targets", targets)):
            for name, section in found.items():
                yield from _grid_problems((kind, name, "resolution_m"), d.tile_m, section.resolution_m)


def _grid_problems(loc: KeyPath, tile_m: float, resolution_m: float | None) -> Iterator[tuple[KeyPath, str]]:
    """Pixels that do not fill a tile would be stored with another size than the description says."""
    if resolution_m is not None and abs((num := tile_m / resolution_m) - round(num)) > _WHOLE:
        yield (
            loc,
            f"a tile of {tile_m:g} m has {num:g} pixels of {resolution_m:g} m; with grid, make tile_m a multiple",
        )


def _raster_problems(loc: KeyPath, raster: Raster) -> Iterator[tuple[KeyPath, str]]:
    names = [band.name for band in raster.bands]
    if len(set(names)) < len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        yield (*loc, "bands"), f"{twice!r} is given twice"
    yield from _date_problems(loc, raster)
    low, high = raster.valid or (None, None)
    if low is not None and high is not None and low >= high:
        yield (*loc, "valid"), f"{low:g} to {high:g} is no range"
    for name, rule in raster.masks.items():
        if rule.files is not None:
            yield from _date_problems((*loc, "masks", name), rule)


def _date_problems(loc: KeyPath, section: ImageFiles) -> Iterator[tuple[KeyPath, str]]:
    dates, where = section.dates, (*loc, "dates")
    in_name = "{date" in (section.files or "")
    if dates is None:
        return
    if dates.from_ == "name" and not in_name:
        yield where, f"from name, but files has no {{date}}: {section.files}"
    if dates.from_ == "constant" and dates.date is None:
        yield where, "from constant needs date"
    if dates.from_ in ("csv", "text") and dates.file is None:
        yield where, f"from {dates.from_} needs file"
    if dates.from_ == "text" and dates.file is not None and "{key}" not in dates.file:
        yield (*where, "file"), "needs {key}: a text file holds the dates of one tile"


def _preset_problems(loc: KeyPath, preset: SensorPreset, raster: Raster) -> Iterator[tuple[KeyPath, str]]:
    names = [band.name for band in raster.bands]
    for band in preset.bands or ():
        if band not in names:
            yield (*loc, "bands"), f"the raster has no band {band!r}{did_you_mean(band, names)}"
    if preset.scale is None and raster.quantity in ("any", "image") and raster.dtype != "uint8":
        yield (
            (*loc, "scale"),
            f"is needed for {raster.dtype} of quantity {raster.quantity}: give a divisor, so that most scaled values "
            "lie in 0 to 1, or say the quantity",
        )


def _target_problems(
    loc: KeyPath, target: Target, targets: Mapping[str, Target]
) -> Iterator[tuple[KeyPath, str]]:
    for field in ("ignored",):
        for name in getattr(target, field):
            if name not in target.classes:
                yield (*loc, field), f"no class is called {name!r}{did_you_mean(name, target.classes)}"
    for label, name in target.values.items():
        if name is not None and name not in target.classes:
            yield (*loc, "values", label), f"no class is called {name!r}{did_you_mean(name, target.classes)}"
    if target.outside is not None and target.outside not in target.classes:
        yield (
            (*loc, "outside"),
            f"no class is called {target.outside!r}{did_you_mean(target.outside, target.classes)}",
        )
    given = next(n for n in ("raster", "vector", "table", "name", "of") if getattr(target, n) is not None)
    allowed = {
        "multilabel": ("table", "of"),
        "segmentation": ("raster", "vector"),
        "classification": ("table", "name"),
        "regression": ("raster", "vector", "table"),
    }[target.kind]
    if given not in allowed:
        yield (*loc, given), f"is not for {target.kind}, which is from {' or '.join(allowed)}"
    if given in ("raster", "vector") and target.resolution_m is None:
        yield (*loc, "resolution_m"), f"is needed for a {given}"
    if target.of is not None and (target.of not in targets or targets[target.of].kind != "segmentation"):
        known = [name for name, other in targets.items() if other.kind == "segmentation"]
        yield (*loc, "of"), f"no segmentation target is called {target.of!r}{did_you_mean(target.of, known)}"
    table = target.table
    if table is not None and target.kind in ("classification", "regression") and table.column is None:
        yield (*loc, "table", "column"), f"is needed for {target.kind}"
    if table is not None and table.column is not None and table.columns is not None:
        yield (*loc, "table", "columns"), "excludes column: keep one"
    if table is not None and table.columns is not None and len(table.columns) != len(target.classes):
        yield (
            (*loc, "table", "columns"),
            f"has {len(table.columns)} columns for {len(target.classes)} classes",
        )
