"""Predictions of whole tiles as GeoTIFF, one file per tile, on the ground where the tile lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.evaluation.tasks.task import SegmentationTask, Task
from maestro_scale.stream.source import OpenShards, Source


def georeference(
    origin: GeoOrigin | None, resolution_m: float, south_m: float = 0.0, east_m: float = 0.0
) -> dict[str, Any]:
    """``crs`` and ``transform`` for rasterio of an image whose upper left corner lies so far from the tile's. A tile
    without a known place gets metres from its own corner, and no reference system."""
    from rasterio.transform import from_origin

    west_m, north_m = (origin.west_m, origin.north_m) if origin else (0.0, 0.0)
    transform = from_origin(west_m + east_m, north_m - south_m, resolution_m, resolution_m)
    return {"crs": origin.crs if origin else None, "transform": transform}


class TileMapWriter:
    """Writes ``<folder>/<key>.tif`` of samples by number: uint8 values as in the labels, their names in the tags.

    ResultsError where the task has no map to write.
    """

    def __init__(self, folder: Path, source: Source, task: Task) -> None:
        try:
            import rasterio  # noqa: F401
        except ImportError:
            raise ResultsError("--maps needs rasterio: pip install 'maestro-scale[datasets]'") from None
        if not isinstance(task, SegmentationTask):
            raise ResultsError(f"--maps: {task.target.name} has labels for whole tiles, so there is no map")
        self._folder, self._resolution_m, self._names = folder, task.layout.resolution_m, task.target.classes
        self._values = np.array(
            [i for i, _ in enumerate(self._names) if i not in task.target.ignored], np.uint8
        )
        self._shards = OpenShards(source, source.store.cache_bytes // 4)
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, answer: np.ndarray) -> None:
        """Write the map (H, W) of sample ``number``: indices among the classes that count."""
        import rasterio

        sample = self._shards.sample(*self._shards.locate(number))
        path = self._folder / f"{quote(sample.key, safe='')}.tif"
        partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        profile = {
            "driver": "GTiff",
            "width": answer.shape[1],
            "height": answer.shape[0],
            "count": 1,
            "dtype": "uint8",
            "compress": "deflate",
            **georeference(sample.origin, self._resolution_m),
        }
        with rasterio.open(partial, "w", **profile) as image:
            image.write(self._values[answer][None])
            image.update_tags(1, **{f"class_{v}": self._names[v] for v in self._values})
        os.replace(partial, path)

    def close(self) -> None:
        """Let go of the shards."""
        self._shards.close()
