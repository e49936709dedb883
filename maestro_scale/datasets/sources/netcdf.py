"""NetCDF: variables with coordinates by the CF conventions; version 4, which is HDF5, and version 3."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import hdf5, remote
from maestro_scale.datasets.sources.arrays import ArrayFile, list_arrays
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

_VERSION_3 = b"CDF"
_ERRORS = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError)


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`."""
    return list_arrays(section, src, open_file)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[ArrayFile]:
    """As :meth:`.protocol.Source.open_file`."""
    with remote.open_binary(address) as file:
        is_version_3 = file.read(3) == _VERSION_3
    if not is_version_3:
        with hdf5.open_file(address, section) as opened:
            yield opened
    elif remote.is_remote(address):
        raise DatasetError(
            f"{address}: is NetCDF 3, which is read from disk only; copy it, or convert it to version 4"
        )
    else:
        with _open_version_3(address) as store:
            yield ArrayFile(store, section)


@contextmanager
def _open_version_3(address: str) -> Iterator[_Store]:
    from scipy.io import netcdf_file

    path = remote.local_path(address)
    try:
        # Mapped: variables are read where they are used.
        opened = netcdf_file(path, "r", mmap=True, maskandscale=False)
    except _ERRORS as error:
        cause = " ".join(str(error).split())
        raise DatasetError(
            f"{address}: cannot be read ({shorten(cause, 200)}); fetch the file again"
        ) from error
    try:
        yield _Store(opened, address)
    finally:
        with warnings.catch_warnings():
            # Arrays that refer to the map are left, but nobody reads them any more.
            warnings.simplefilter("ignore", RuntimeWarning)
            opened.close()


class _Store:
    """The variables of a file of version 3 (an :class:`.arrays.ArrayStore`)."""

    errors = _ERRORS

    def __init__(self, file: Any, where: str) -> None:
        self._file, self.where = file, where

    def names(self) -> Sequence[str]:
        return list(self._file.variables)

    def find(self, name: str) -> _Array | None:
        found = self._file.variables.get(name)
        return None if found is None else _Array(found)

    def beside(self, name: str, other: str) -> str:
        return other


class _Array:
    """A variable (an :class:`.arrays.StoredArray`)."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._variable.data.shape)

    @property
    def dtype(self) -> np.dtype:
        return self._variable.data.dtype

    @property
    def dimensions(self) -> tuple[str, ...] | None:
        return tuple(self._variable.dimensions)

    def attribute(self, name: str) -> Any:
        value = self._variable._attributes.get(name)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        return np.array(self._variable.data[index])
