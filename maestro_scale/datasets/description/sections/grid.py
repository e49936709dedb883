"""Sections on the grid that scenes are cut on."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
)

from maestro_scale.datasets.description.sections.fields import Metres, Text
from maestro_scale.strict_yaml.fields import Section, listed


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
