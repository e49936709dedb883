"""The table of sources: which module reads which storage format."""

from __future__ import annotations

import importlib
from typing import cast

from maestro_scale.datasets.description.sections.fields import SourceKind
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources.protocol import Source
from maestro_scale.datasets.spec import DatasetError

MODULES: dict[SourceKind, str] = {
    "geotiff": "files",
    "netcdf": "netcdf",
    "hdf5": "hdf5",
    "zarr": "zarr",
    "numpy": "numpy_files",
    "parquet": "parquet",
    "webdataset": "webdataset_tars",
    "stac": "stac",
}

SUFFIXES: dict[str, SourceKind] = {
    ".tif": "geotiff",
    ".tiff": "geotiff",
    ".png": "geotiff",
    ".jp2": "geotiff",
    ".nc": "netcdf",
    ".nc4": "netcdf",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".he5": "hdf5",
    ".zarr": "zarr",
    ".zarr.zip": "zarr",
    ".npy": "numpy",
    ".npz": "numpy",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "stac",
    ".geojson": "stac",
}


def source_kind(section: ImageFiles) -> SourceKind:
    """The storage format of ``section``; DatasetError if neither ``source`` nor the suffix of ``files`` says."""
    if section.source is not None:
        return section.source
    name = (section.files or "").rstrip("/").lower()
    found = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    if not found:
        raise DatasetError(
            f"{section.files}: the suffix does not say the storage format; set source to one of {', '.join(MODULES)}"
        )
    return SUFFIXES[max(found, key=len)]


def source_of(section: ImageFiles) -> Source:
    """The module that reads ``section``."""
    # Imported on demand: each needs a library of its own.
    return cast(
        Source, importlib.import_module(f"maestro_scale.datasets.sources.{MODULES[source_kind(section)]}")
    )
