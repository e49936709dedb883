"""Names the extra to install where a library of it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maestro_scale.errors import MaestroError

_GEO = {"rasterio", "h5py", "pandas", "pyogrio", "xarray", "pystac", "zarr", "shapely", "pyproj"}
"""Libraries of the extras ``datasets`` and ``geo``."""


@contextmanager
def geo_libraries() -> Iterator[None]:
    """Within the block, a library of the extra ``geo`` that is not installed is a MaestroError that says how to install
    it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _GEO:
            raise
        raise MaestroError(
            f"reading these files needs {error.name}: pip install 'maestro-scale[geo]'"
        ) from error
