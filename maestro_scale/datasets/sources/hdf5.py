"""HDF5: datasets by path, with the axes that the description gives or their dimension scales name.

Links to other files, and datasets whose values are in other files, are not followed.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.arrays import ArrayFile, list_arrays
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

_MAX_NAMES = 10_000
_CACHE_BYTES = 64 * 1024 * 1024  # of chunks, per dataset: the largest that is read
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)
"""What h5py raises for damaged data."""


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`."""
    return list_arrays(section, src, open_file)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[ArrayFile]:
    """As :meth:`.protocol.Source.open_file`."""
    if remote.is_remote(address):
        with remote.open_binary(address) as file, open_store(file, address) as store:
            yield ArrayFile(store, section)
        return
    with open_store(remote.local_path(address), address) as store:
        yield ArrayFile(store, section)


@contextmanager
def open_store(file: str | BinaryIO, where: str) -> Iterator[Hdf5Store]:
    """The datasets of a file, by its path, or opened."""
    store = new_store(file, where)
    try:
        yield store
    finally:
        store.close()


def new_store(file: str | BinaryIO, where: str) -> Hdf5Store:
    """As :func:`open_store`; it is closed by :meth:`Hdf5Store.close`, or when nothing refers to it any more."""
    import h5py

    try:
        if isinstance(file, str):
            with open(file, "rb"):  # h5py's message for a missing file does not say so
                pass
        # Without a lock: raw data is often on read-only or network file systems, which do not support it.
        if isinstance(file, str):
            opened = h5py.File(file, "r", rdcc_nbytes=_CACHE_BYTES, locking=False)
        else:
            opened = h5py.File(_Uncollected(file), "r", rdcc_nbytes=_CACHE_BYTES)
        return Hdf5Store(opened, where)
    except FileNotFoundError as error:
        raise remote.missing(where) from error
    except ERRORS as error:
        cause = " ".join(str(error).split())
        raise DatasetError(
            f"{where}: cannot be read ({shorten(cause, 200)}); fetch the file again"
        ) from error


class _Uncollected(io.RawIOBase):
    """A file whose reads are never interrupted by the garbage collector.

    h5py holds its lock while it reads. A remote read waits for fsspec's thread, and if the collector runs there and
    finds an object of h5py, that thread waits for the lock: neither would ever continue.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            data = self._file.read(len(buffer))
        finally:
            if was_enabled:
                gc.enable()
        buffer[: len(data)] = data
        return len(data)


class Hdf5Store:
    """The datasets of an open file (an :class:`.arrays.ArrayStore`)."""

    errors = ERRORS

    def __init__(self, file: Any, where: str) -> None:
        self._file, self.where = file, where
        self._names: list[str] | None = None
        self._num_bytes = file.id.get_filesize()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def names(self) -> Sequence[str]:
        """Paths of datasets within the file; links are left out."""
        import h5py

        if self._names is None:
            names: list[str] = []

            def add(name: str, item: Any) -> bool | None:
                if isinstance(item, h5py.Dataset):
                    names.append(name)
                return True if len(names) >= _MAX_NAMES else None

            self._file.visititems(add)
            self._names = names
        return self._names

    def find(self, name: str) -> Hdf5Array | None:
        """The dataset at a path; DatasetError if it, or a group on the way, is in another file."""
        import h5py

        item = self._item(name)
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return None
        if str(_plain(item.attrs.get("NAME", ""))).startswith(_NO_VARIABLE):
            return None  # a dimension without values
        where = f"{self.where}: {shorten(name)}"
        raw.check_storage(item, where)
        return Hdf5Array(item, where, self._num_bytes)

    def beside(self, name: str, other: str) -> str:
        """The path of what a dataset names ``other``."""
        folder = name.strip("/").split("/")[:-1]
        while folder and not other.startswith("/"):
            path = "/".join([*folder, other])
            if self._item(path) is not None:
                return path
            folder = folder[:-1]
        return other.strip("/")

    def _item(self, name: str) -> Any:
        """A group or dataset; None if there is none. One step after the other: a group may be a link, too."""
        import h5py

        item = self._file
        for part in name.strip("/").split("/"):
            if not isinstance(item, h5py.Group) or not part or not item.id.links.exists(part.encode()):
                return None
            raw.check_link(item, part, f"{self.where}: {shorten(name)}")
            item = item[part]
        return item


class Hdf5Array:
    """A dataset (an :class:`.arrays.StoredArray`). Of a table, its first column."""

    def __init__(self, item: Any, where: str, num_bytes: int) -> None:
        self._item, self._where, self._num_bytes = item, where, num_bytes
        self._column = item.dtype.names[0] if item.dtype.names else None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._item.shape

    @property
    def dtype(self) -> np.dtype:
        return self._item.dtype[self._column] if self._column is not None else self._item.dtype

    @property
    def dimensions(self) -> tuple[str, ...] | None:
        names = []
        for dimension in self._item.dims:
            if not len(dimension):
                return None
            names.append(dimension[0].name.rsplit("/", 1)[-1])
        return tuple(names) or None

    def attribute(self, name: str) -> Any:
        return _plain(self._item.attrs[name]) if name in self._item.attrs else None

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        import h5py

        item = self._item if self._column is None else self._item.fields(self._column)
        if h5py.check_string_dtype(self.dtype) is None or self.dtype.kind == "S":
            return np.asarray(item[index])
        # Many elements of variable length may be the same bytes of the file.
        if self._item.size * self._num_bytes <= raw.MAX_TEXT_BYTES:
            return np.asarray(item[index])
        values: list[Any] = []
        total = 0
        for at in np.ndindex(self._item.shape):
            values.append(item[at])
            total += len(values[-1])
            if total > raw.MAX_TEXT_BYTES:
                raise DatasetError(f"{self._where} has texts of more than 64 MiB; fetch the file again")
        array = np.empty(len(values), object)
        array[:] = values
        return array.reshape(self._item.shape)[index]


def _plain(value: Any) -> Any:
    """An attribute as numbers and texts."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[:1000].tolist() if value.size != 1 else value.reshape(-1)[0]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, (int, float, str, list)) else None
