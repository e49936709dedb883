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

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import (
    Field,
    model_validator,
)

from maestro_scale.datasets.description.sections.fields import Metres, Name, Text
from maestro_scale.datasets.description.sections.grid import Grid
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.description.sections.rasters import FurtherSensor, Raster, SensorPreset
from maestro_scale.datasets.description.sections.splits import Splits
from maestro_scale.datasets.description.sections.targets import Target
from maestro_scale.errors import KeyPath, did_you_mean
from maestro_scale.strict_yaml.errors import ConflictError
from maestro_scale.strict_yaml.fields import Count, Section

_WHOLE = 0.01  # pixels: a size of 0.333333 m is a third


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
