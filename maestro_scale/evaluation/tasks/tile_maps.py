"""Write predicted maps of whole tiles as georeferenced GeoTIFF, one file per tile."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.escaping import file_name, ignores_case, printable
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.protocol import Task
from maestro_scale.stream.source import OpenShards, Source


def georeference(
    origin: GeoOrigin | None, resolution_m: float, south_m: float = 0.0, east_m: float = 0.0
) -> dict[str, Any]:
    """``crs`` and ``transform`` for rasterio of an image whose upper left corner is ``south_m`` and ``east_m`` from the
    tile's. Without a known origin: metres from the tile's corner, and no reference system."""
    from rasterio.transform import from_origin

    west_m, north_m = (origin.west_m, origin.north_m) if origin else (0.0, 0.0)
    transform = from_origin(west_m + east_m, north_m - south_m, resolution_m, resolution_m)
    return {"crs": origin.crs if origin else None, "transform": transform}


class TileMapWriter:
    """Writes ``<folder>/<key>.tif``: values as in the labels (uint8, or float32 of a regression), with the key and the
    class names or units as tags.

    The key is escaped for a file name (``escaping.file_name``).

    EvaluationError where the task predicts no map.
    """

    def __init__(self, folder: Path, source: Source, task: Task) -> None:
        try:
            import rasterio  # noqa: F401
        except ImportError:
            raise EvaluationError("--maps needs rasterio: pip install 'maestro-scale[datasets]'") from None
        if task.layout is None:
            raise EvaluationError(
                f"--maps: {task.target.name} has labels for whole tiles, so there is no map"
            )
        self._folder = folder
        self._resolution_m = task.layout.resolution_m
        self._target = task.target
        counted = [i for i, _ in enumerate(task.target.classes) if i not in task.target.ignored]
        self._values = np.array(counted, np.uint8)  # index among the classes that count -> label value
        # A quarter of the cache: the loader of the same shards is still in use.
        self._shards = OpenShards(source, source.store.cache_bytes // 4)
        folder.mkdir(parents=True, exist_ok=True)
        self._ignore_case = ignores_case(folder)

    def write(self, number: int, tile_map: np.ndarray) -> None:
        """Write the map (H, W) of sample ``number``: indices among the classes that count, or numbers."""
        sample = self._shards.sample(*self._shards.locate(number))
        path = self._folder / file_name(sample.key, ".tif", self._ignore_case)
        partial = path.with_name(
            f".partial-{uuid.uuid4().hex}.tif"
        )  # ranks on several nodes share the folder
        values, tags = self._stored(tile_map)
        profile = {
            "driver": "GTiff",
            "width": tile_map.shape[1],
            "height": tile_map.shape[0],
            "count": 1,
            "dtype": str(values.dtype),
            "compress": "deflate",
            **georeference(sample.origin, self._resolution_m),
        }
        with new_raster(partial, **profile) as image:
            image.write(values[None])
            image.update_tags(key=printable(sample.key))
            image.update_tags(1, **tags)
        os.replace(partial, path)

    def _stored(self, tile_map: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """(values as in the labels, tags of the band): class names, or the units of a regression."""
        if self._target.kind == "regression":
            return tile_map.astype(np.float32), {"units": printable(self._target.units)}
        names = self._target.classes
        return self._values[tile_map], {f"class_{v}": printable(names[v]) for v in self._values}

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()
