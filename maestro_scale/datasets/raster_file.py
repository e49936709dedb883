"""Writing of raster files with rasterio, so that a full disk is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_raster(path: Path, **profile: Any) -> Iterator[Any]:
    """A raster to write to, as of ``rasterio.open(path, "w", **profile)``; OSError where the disk is full.

    It is written to memory, and from there to the file: GDAL ignores a full disk when it closes a file, and leaves
    one that cannot be read.
    """
    from rasterio.io import MemoryFile

    with MemoryFile() as memory:
        with memory.open(**profile) as raster:
            yield raster
        path.write_bytes(memory.getbuffer())
