"""Cloud-optimised GeoTIFFs: tiled, with overviews, georeferenced; class maps with colours and names.

Layout of the GDAL driver (https://gdal.org/en/stable/drivers/raster/cog.html). Class names are where QGIS and GDAL look
for them: in ``<file>.aux.xml`` as category names and as a raster attribute table
(https://gdal.org/en/stable/user/raster_data_model.html), and in the tags ``class_<value>`` of the band.
"""

from __future__ import annotations

import colorsys
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.escaping import printable

BLOCK = 512
_LEAST_BLOCK = 64
_BLOCK_BYTES = (
    8 * 2**20
)  # of all bands, which a block stores pixel by pixel: many blocks fit into GDAL's cache
_CACHE_MB = 64

Part = tuple[int, int, np.ndarray]
"""Upper row, left column and values (bands, height, width) of a part of an image."""


@dataclass(frozen=True)
class Bands:
    """The bands of an image. ``names``: one per band; ``classes``: {value: name} of a class map (uint8), which gets a
    colour table; ``scale``: what stored numbers are multiplied with; ``units``: of the result."""

    names: tuple[str, ...]
    dtype: str
    nodata: float | None
    classes: Mapping[int, str] = field(default_factory=dict)
    scale: float = 1.0
    units: str = ""


def write_cog(
    path: Path,
    bands: Bands,
    shape: tuple[int, int],
    parts: Iterable[Part],
    georeference: Mapping[str, Any],
    tags: Mapping[str, str],
    partial: Path | None = None,
) -> None:
    """Write an image of ``shape`` (height, width) from its parts, one at a time; what no part covers is nodata.

    ``georeference``: ``crs`` and ``transform``, as rasterio takes them. The bytes depend on the arguments alone. The
    file appears under its name once it is complete and has been read back. ``partial``: its path until then, ``*.tif``
    on the same file system; default: a hidden name beside it. OSError: the disk is full.
    """
    import rasterio
    from rasterio._err import CPLE_BaseError  # of GDAL's errors, which some calls do not translate
    from rasterio.shutil import copy
    from rasterio.windows import Window

    partial = partial or path.with_name(f".partial-{uuid.uuid4().hex}.tif")
    done = partial.with_name(f"{partial.stem}-cog.tif")
    block = block_side(len(bands.names), bands.dtype)
    profile = {
        "driver": "GTiff",
        "height": shape[0],
        "width": shape[1],
        "count": len(bands.names),
        "dtype": bands.dtype,
        "nodata": bands.nodata,
        "tiled": True,
        "blockxsize": block,
        "blockysize": block,
        "compress": "zstd",
        "sparse_ok": True,
        "interleave": "band",  # overviews are made band by band
        "bigtiff": "yes",
        **georeference,
    }
    written: list[tuple[Window, int]] = []
    try:
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_MB):
            with rasterio.open(partial, "w", **profile) as image:
                for row, column, values in parts:
                    window = Window(column, row, values.shape[2], values.shape[1])
                    image.write(values, window=window)
                    written.append((window, _digest(values)))
                _describe(image, bands, tags)
            _add_overviews(partial, shape, block, "mode" if bands.classes else "average")
            copy(
                partial,
                done,
                driver="COG",
                BLOCKSIZE=block,
                COMPRESS="DEFLATE",
                BIGTIFF="IF_SAFER",
                OVERVIEWS="FORCE_USE_EXISTING",
            )
            # GDAL ignores a full disk when it closes a file.
            with rasterio.open(done, driver="GTiff") as image:
                if any(_digest(image.read(window=window)) != digest for window, digest in written):
                    raise OSError(28, "No space left on device", str(path))
        if bands.classes:
            side_file = path.with_name(f"{path.name}.aux.xml")
            fresh = done.with_name(f"{done.name}.aux.xml")
            fresh.write_text(_category_xml(bands.classes))
            os.replace(fresh, side_file)
        os.replace(done, path)
    except (rasterio.errors.RasterioError, CPLE_BaseError) as error:
        raise DatasetError(f"{path}: cannot be written ({error}); free space on the disk") from error
    finally:
        for file in (partial, done, done.with_name(f"{done.name}.aux.xml")):
            file.unlink(missing_ok=True)


def _describe(image: Any, bands: Bands, tags: Mapping[str, str]) -> None:
    """Tags, and names, classes with colours, scale and units of bands, where QGIS and GDAL look for them."""
    from rasterio.enums import ColorInterp

    image.update_tags(**{name: printable(text) for name, text in tags.items()})
    for number, name in enumerate(bands.names, 1):
        image.set_band_description(number, printable(name))
    if bands.classes:
        image.update_tags(1, **{f"class_{v}": printable(n) for v, n in bands.classes.items()})
        image.write_colormap(1, colours(tuple(bands.classes)))
        image.colorinterp = [ColorInterp.palette]
    if bands.scale != 1.0:
        image.scales = (bands.scale,) * len(bands.names)
    if bands.units:
        image.units = (printable(bands.units),) * len(bands.names)


def _add_overviews(path: Path, shape: tuple[int, int], block: int, resampling: str) -> None:
    """Images of half the size, down to a block, where the bands are apart: the driver of COGs makes them band by band
    in blocks of all bands, which it writes again for each band where they exceed GDAL's cache."""
    import rasterio
    from rasterio.enums import Resampling

    levels: list[int] = []
    while max(shape) > block * 2 ** len(levels):
        levels.append(2 ** (len(levels) + 1))
    if levels:
        with rasterio.open(path, "r+") as image:
            image.build_overviews(levels, Resampling[resampling])


def block_side(num_bands: int, dtype: str) -> int:
    """Pixels per side of the blocks of an image."""
    side = BLOCK
    while side > _LEAST_BLOCK and side**2 * num_bands * np.dtype(dtype).itemsize > _BLOCK_BYTES:
        side //= 2
    return side


def colours(values: Sequence[int]) -> dict[int, tuple[int, int, int, int]]:
    """{value: (red, green, blue, alpha)}, different for each: hues by the golden angle, in four shades."""
    table = {}
    for value in values:
        hue, shade = value * 0.618034 % 1, value % 4
        rgb = colorsys.hls_to_rgb(hue, (0.45, 0.62, 0.35, 0.75)[shade], (0.75, 0.6, 0.7, 0.65)[shade])
        red, green, blue = (round(255 * part) for part in rgb)
        table[value] = (red, green, blue, 255)
    return table


def _digest(values: np.ndarray) -> int:
    import zlib

    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


def _category_xml(classes: Mapping[int, str]) -> str:
    """Category names and a raster attribute table (value, name, colour) of band 1, as GDAL stores them."""
    names = [escape(printable(classes.get(value, ""))) for value in range(max(classes) + 1)]
    table = colours(tuple(classes))
    fields = [
        ("Value", 0, 5),
        ("Class", 2, 2),
        ("Red", 0, 6),
        ("Green", 0, 7),
        ("Blue", 0, 8),
    ]
    lines = ["<PAMDataset>", '  <PAMRasterBand band="1">', "    <CategoryNames>"]
    lines += [f"      <Category>{name}</Category>" for name in names]
    lines += ["    </CategoryNames>", '    <GDALRasterAttributeTable tableType="thematic">']
    for i, (name, kind, usage) in enumerate(fields):
        lines.append(
            f'      <FieldDefn index="{i}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>'
        )
    for i, (value, name) in enumerate(classes.items()):
        cells = (value, escape(printable(name)), *table[value][:3])
        lines.append(f'      <Row index="{i}">{"".join(f"<F>{c}</F>" for c in cells)}</Row>')
    lines += ["    </GDALRasterAttributeTable>", "  </PAMRasterBand>", "</PAMDataset>", ""]
    return "\n".join(lines)
