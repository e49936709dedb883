"""GeoTIFF scenes for tests, and a minimal source that opens them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.scenes.catalog import Layer, locate, placed, shots
from maestro_scale.datasets.scenes.grid import Grid
from maestro_scale.datasets.scenes.images import Scene, Shot
from maestro_scale.datasets.scenes.problems import Problems
from maestro_scale.datasets.sources.protocol import Date, ImageRef, Pixels


def write_scene(
    path: Path,
    values: np.ndarray,
    west: float,
    north: float,
    pixel_m: float = 10.0,
    crs: str | None = "EPSG:32631",
    nodata: float | None = None,
    block: int = 64,
) -> Path:
    """A GeoTIFF (C, H, W) in blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    tiles = {"tiled": True, "blockxsize": block, "blockysize": block, "compress": "deflate"}
    transform = Affine(pixel_m, 0, west, 0, -pixel_m, north)
    coding = {"dtype": values.dtype, "nodata": nodata, "crs": crs, "transform": transform, **tiles}
    with rasterio.open(path, "w", driver="GTiff", **shape, **coding) as file:
        file.write(values)
    return path


class TiffImage:
    """An image of the protocol; counts the pixels that it reads."""

    def __init__(self, raster, ref: ImageRef) -> None:
        self._raster, self._bands = raster, [min(band + 1, raster.count) for band in ref.bands]
        self.count, self.height, self.width = len(self._bands), raster.height, raster.width
        self.dtype, self.date = np.dtype(raster.dtypes[0]), None
        self.crs = raster.crs.to_string() if raster.crs else None
        self.transform = tuple(raster.transform)[:6]
        self.block = raster.block_shapes[0]
        self.num_read = 0

    def read(self, window=None) -> Pixels:
        rows, cols = (window[0], window[0] + window[2]), (window[1], window[1] + window[3])
        assert 0 <= rows[0] < rows[1] <= self.height
        assert 0 <= cols[0] < cols[1] <= self.width
        values = self._raster.read(self._bands, window=(rows, cols))
        READS.append(values[0].size)
        nodata = self._raster.nodata
        return Pixels(values, None if nodata is None else values == nodata)


READS: list[int] = []


class TiffFile:
    """A file of the protocol."""

    def __init__(self, raster) -> None:
        self._raster = raster

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        return [ref]

    def image(self, ref: ImageRef) -> TiffImage:
        return TiffImage(self._raster, ref)


@contextmanager
def open_tiff(layer: str, address: str) -> Iterator[TiffFile]:
    """An opener of any layer."""
    with rasterio.open(address) as raster:
        yield TiffFile(raster)


def scene_ref(path: Path, date: Date | None = None, bands: tuple[int, ...] = (0,), **names: str) -> ImageRef:
    """A reference to an image."""
    return ImageRef(str(path), None, date, bands, names=tuple(names.items()))


def located_shots(
    refs: Sequence[ImageRef],
    src: Path,
    crs: str,
    num_bands: int = 1,
    masks: dict[str, list[ImageRef]] | None = None,
) -> list[Shot]:
    """Shots of a raster called ``s2`` in the CRS of a grid."""
    problems = Problems()

    def scenes(name: str, of: Sequence[ImageRef]) -> list[Scene]:
        return placed(
            locate(Layer(name, ImageFiles(), tuple(of)), str(src), open_tiff, problems), crs, problems
        )

    found = shots(
        scenes("s2", refs),
        {name: scenes(f"s2.{name}", of) for name, of in (masks or {}).items()},
        num_bands,
        problems,
    )
    problems.check(str(src))
    return found


def utm_grid(tile_m: float = 320.0, stride_m: float = 320.0, origin=(0.0, 0.0)) -> Grid:
    """A grid in UTM zone 31."""
    return Grid("EPSG:32631", tile_m, stride_m, origin)
