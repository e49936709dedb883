"""A few tiny tiles on disk, and descriptions of them, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.spec import RawDataset
from maestro_scale.strict_yaml.loading import validated
from maestro_scale.strict_yaml.merge import Tree, dump_yaml

SIZE = 8
TILE_M = 80.0


def write_tif(
    path: Path,
    values: np.ndarray,
    west: float | None = 0.0,
    pixel_m: float = 10.0,
    crs: str | None = "EPSG:32632",
    north: float = 5_000_000.0,
    tags: Mapping[str, str] | None = None,
    names: tuple[str, ...] = (),
    **profile: Any,
) -> Path:
    """A GeoTIFF of (C, H, W); ``west``: None for one without place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = dict(zip(("count", "height", "width"), values.shape, strict=True))
    place = {} if west is None else {"transform": from_origin(west, north, pixel_m, pixel_m), "crs": crs}
    with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, **shape, **place, **profile) as file:
        file.write(values)
        file.update_tags(**tags or {})
        if names:
            file.descriptions = names
    return path


def pixels(num_bands: int = 1, fill: int = 0, dtype: str = "uint16", size: int = SIZE) -> np.ndarray:
    """(C, H, W) values that differ by band and pixel, from ``fill`` + 1 on."""
    return (np.arange(num_bands * size * size).reshape(num_bands, size, size) + fill + 1).astype(dtype)


def raster(files: str, bands: Any = "B2", **keys: Any) -> dict[str, Any]:
    """Keys of a raster of 8 × 8 pixels of 10 m, with a dummy scale."""
    sensor = {"scale": {"divisor": 1000.0}, "patch": 2}
    return {"files": files, "bands": bands, "resolution_m": 10, "dtype": "uint16", "sensor": sensor, **keys}


def document(rasters: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """A description of tiles of 80 m."""
    return {"name": "tiny", "tile_m": TILE_M, "rasters": dict(rasters), **keys}


def describe(rasters: Mapping[str, Any], **keys: Any) -> Description:
    return validated(Tree(document(rasters, **keys), {(): "test"}), Description)


def opened(src: Path, rasters: Mapping[str, Any], split: str = "train", **keys: Any) -> RawDataset:
    return open_described(describe(rasters, **keys), str(src), split)


def write_yaml(path: Path, rasters: Mapping[str, Any], **keys: Any) -> Path:
    path.write_text(dump_yaml(document(rasters, **keys)))
    return path
