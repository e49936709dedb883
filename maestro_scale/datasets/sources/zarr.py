"""Zarr, format 2 and 3: arrays of a folder, an object store, a web server or a zip (``.zarr.zip``).

Metadata is checked before the library sees it: a codec of format 2 named ``pickle`` would run code. The library reads
the rest. Format 3 needs zarr 3, which needs Python 3.11.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.arrays import ArrayFile, list_arrays
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.sources.zarr_files import (
    CheckedFiles,
    Files,
    FilesMapping,
    FolderFiles,
    RemoteFiles,
    ZipFiles,
)
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten
from maestro_scale.remote.errors import StoreError


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`."""
    return list_arrays(section, src, open_file)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[ArrayFile]:
    """As :meth:`.protocol.Source.open_file`."""
    if address.split("?", 1)[0].rstrip("/").endswith(".zip"):
        with remote.open_binary(address) as file:
            yield ArrayFile(open_zip(file, address), section)
    elif remote.is_remote(address):
        yield ArrayFile(ZarrStore(RemoteFiles(remote.reader_of(address)), address), section)
    else:
        yield ArrayFile(ZarrStore(FolderFiles(Path(remote.local_path(address))), address), section)


def open_zip(file: BinaryIO, where: str) -> ZarrStore:
    """The arrays of an open zip."""
    return ZarrStore(ZipFiles(file, where), where)


class ZarrStore:
    """The arrays of a group (an :class:`.arrays.ArrayStore`)."""

    errors = (
        OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError,
        MemoryError, EOFError, StoreError, zipfile.BadZipFile, zlib.error,
    )  # fmt: skip

    def __init__(self, files: Files, where: str) -> None:
        self.where = where
        self._files = files
        self._arrays: dict[str, ZarrArray | None] = {}
        checked = CheckedFiles(files, where)
        try:
            if checked.read("zarr.json") is None and all(
                checked.read(n) is None for n in (".zgroup", ".zarray", ".zmetadata")
            ):
                raise (
                    remote.missing(where)
                    if not files.list_folder("")
                    else DatasetError(f"{where}: is no Zarr: it has neither zarr.json nor .zgroup")
                )
            self._root = _open(checked, where)
        except DatasetError:
            raise
        except self.errors as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise DatasetError(
                f"{where}: cannot be read ({shorten(cause, 200)}); fetch the file again"
            ) from error
        self._is_group = hasattr(self._root, "group_keys")

    def names(self) -> Sequence[str]:
        """Paths of arrays; of those that a listing or the consolidated metadata finds, two levels deep."""
        if not self._is_group:
            return [""]
        names = sorted(self._root.array_keys())
        for group in sorted(self._root.group_keys()):
            names += [f"{group}/{name}" for name in sorted(self._root[group].array_keys())]
        return names

    def find(self, name: str) -> ZarrArray | None:
        """The array at a path."""
        if name not in self._arrays:
            self._arrays[name] = self._find(name.strip("/"))
        return self._arrays[name]

    def _find(self, name: str) -> ZarrArray | None:
        if not self._is_group:
            return ZarrArray(self._root) if not name else None
        try:
            found = self._root[name] if name else None
        except (KeyError, FileNotFoundError):
            return None
        return None if found is None or hasattr(found, "group_keys") else ZarrArray(found)

    def beside(self, name: str, other: str) -> str:
        """The path of what an array names ``other``."""
        folder = name.strip("/").split("/")[:-1]
        while folder and not other.startswith("/"):
            path = "/".join([*folder, other])
            if self.find(path) is not None:
                return path
            folder = folder[:-1]
        return other.strip("/")


class ZarrArray:
    """An array (an :class:`.arrays.StoredArray`)."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._attributes = dict(array.attrs)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._array.dtype)

    @property
    def dimensions(self) -> tuple[str, ...] | None:
        names = getattr(getattr(self._array, "metadata", None), "dimension_names", None)
        names = names or self._attributes.get("_ARRAY_DIMENSIONS")  # of format 2
        if not isinstance(names, (list, tuple)) or len(names) != len(self.shape) or not all(names):
            return None
        return tuple(map(str, names))

    def attribute(self, name: str) -> Any:
        if name in self._attributes:
            value = self._attributes[name]
            # xarray writes NaN, and numbers of format 3, as text.
            return _fill_value(value, self.dtype) if name in ("_FillValue", "missing_value") else value
        if name == "_FillValue":
            # What format 2 has for missing data; 0 is its default, which says nothing.
            fill = getattr(self._array, "fill_value", None)
            version = getattr(getattr(self._array, "metadata", None), "zarr_format", 2)
            if version == 2 and fill is not None and self.dtype.kind in "iuf" and fill != 0:
                return np.asarray(fill).item()
        return None

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        return np.asarray(self._array[index])


def _fill_value(value: Any, dtype: np.dtype) -> Any:
    if not isinstance(value, str) or dtype.kind not in "iuf":
        return value
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value.replace("Infinity", "inf"))
    import base64
    import binascii

    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return value
    for kind in (dtype.newbyteorder("<"), np.dtype("<f8")):
        if len(content) == kind.itemsize:
            return np.frombuffer(content, kind)[0].item()
    return value


def _open(files: CheckedFiles, where: str) -> Any:
    """The root group or array."""
    import zarr

    if int(zarr.__version__.split(".")[0]) >= 3:
        from maestro_scale.datasets.sources.zarr_store import ReadOnlyStore

        return zarr.open(ReadOnlyStore(files), mode="r")
    if files.read("zarr.json") is not None:
        raise DatasetError(f"{where}: is Zarr format 3, which needs zarr 3 (Python 3.11 or later)")
    mapping = FilesMapping(files)
    if ".zmetadata" in mapping:
        return zarr.open_consolidated(mapping, mode="r")
    return zarr.open(mapping, mode="r")
