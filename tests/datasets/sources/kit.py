"""Small cubes in every storage format, and what a source should read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.sources.protocol import ImageRef, Pixels, Window
from maestro_scale.datasets.sources.table import source_of

ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3  # needs Python 3.11; without it only format 2 is read
DAYS = ("2021-03-01", "2021-04-10", "2021-12-31")
DATES = [(2021, 60, 0), (2021, 100, 0), (2021, 365, 0)]
STAMPS = np.array(DAYS, "datetime64[D]")
CRS = "EPSG:32632"
TRANSFORM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)
X = 500_005.0 + 10 * np.arange(7)
Y = 4_999_995.0 - 10 * np.arange(6)


def cube(num_dates: int = 3, num_bands: int = 2, height: int = 6, width: int = 7) -> np.ndarray:
    """(T, C, H, W) int16, every value different, row 0 in the north."""
    return np.arange(num_dates * num_bands * height * width, dtype=np.int16).reshape(
        num_dates, num_bands, height, width
    )


def section(files: str, bands: Any = ("a", "b"), **options: Any) -> Raster:
    """A raster of a description, as it is in YAML."""
    values = {"files": files, "bands": list(bands), "resolution_m": 10, "dtype": "int16", "series": True}
    return Raster.model_validate({**values, **options})


def refs_of(files: ImageFiles, src: Path | str) -> list[ImageRef]:
    """All images, those that only an open file knows included."""
    source = source_of(files)
    found = []
    for ref in sorted(source.list_images(files, str(src)), key=lambda r: (r.address, r.part, r.bands)):
        with source.open_file(ref.address, files) as file:
            found += file.images(ref)
    return found


def read(files: ImageFiles, ref: ImageRef, window: Window | None = None) -> Pixels:
    with source_of(files).open_file(ref.address, files) as file:
        return file.image(ref).read(window)


def place(files: ImageFiles, ref: ImageRef) -> tuple[Any, Any]:
    """Coordinate system and transform."""
    with source_of(files).open_file(ref.address, files) as file:
        image = file.image(ref)
        return image.crs, image.transform


def stack(files: ImageFiles, refs: list[ImageRef]) -> np.ndarray:
    """(T, C, H, W)."""
    return np.stack([read(files, ref).values for ref in refs])
