"""Zarr, format 2 and 3: arrays of a folder, an object store, a web server or a zip (``.zarr.zip``).

Metadata is checked before the library sees it: a codec of format 2 named ``pickle`` would run code. The library reads
the rest. Format 3 needs zarr 3, which needs Python 3.11.
"""

from __future__ import annotations

import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.description.config import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.arrays import ArrayFile, list_arrays
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten
from maestro_scale.remote.errors import StoreError
from maestro_scale.remote.reader import RemoteReader

_MAX_MEMBERS = 250_000
_MAX_CHUNK_BYTES = untrusted.FIELD_BYTES
_DOCUMENTS = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_SAFE_CODECS = frozenset(
    {
        "blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4", "zfpy", "pcodec", "delta", "fixedscaleoffset",
        "quantize", "bitround", "shuffle", "astype", "packbits", "crc32", "crc32c", "adler32", "fletcher32",
        "jenkins_lookup3", "vlen-utf8", "vlen-bytes", "bytes", "transpose", "sharding_indexed",
    }
)  # fmt: skip
_TEXTS = frozenset(("vlen-utf8", "vlen-bytes"))


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
        yield ArrayFile(ZarrStore(_Remote(remote.reader_of(address)), address), section)
    else:
        yield ArrayFile(ZarrStore(_Folder(Path(remote.local_path(address))), address), section)


def open_zip(file: BinaryIO, where: str) -> ZarrStore:
    """The arrays of an open zip."""
    return ZarrStore(_Zip(file, where), where)


class _Files(Protocol):
    """The files of a Zarr, by their names relative to its root."""

    def read(self, name: str, start: int, stop: int | None) -> bytes | None:
        """Bytes [start, stop), from the end if ``start`` is negative, to the end if ``stop`` is None; None if there is
        no such file."""

    def list_folder(self, name: str) -> list[str]:
        """Names directly below a folder."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, start: int, stop: int | None) -> bytes | None:
        if not untrusted.is_relative_path(name):
            return None
        try:
            with open(self._root / name, "rb") as file:
                size = file.seek(0, 2)
                first = start if start >= 0 else max(0, size + start)
                file.seek(first)
                return file.read() if stop is None else file.read(max(0, stop - first))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def list_folder(self, name: str) -> list[str]:
        try:
            return sorted(p.name for p in (self._root / name).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


class _Remote:
    def __init__(self, reader: RemoteReader) -> None:
        self._reader = reader

    def read(self, name: str, start: int, stop: int | None) -> bytes | None:
        try:
            if start == 0 and stop is None:
                return self._reader.read(name)
            if start < 0 or stop is None:
                size = self._reader.size(name)
                if size is None:
                    return None
                start, stop = (max(0, size + start) if start < 0 else start), size if stop is None else stop
            return self._reader.read_range(name, start, stop)
        except FileNotFoundError:
            return None

    def list_folder(self, name: str) -> list[str]:
        if self._reader.url.startswith(("http://", "https://")):
            return []  # without consolidated metadata, arrays are found by their name
        below = RemoteReader(posixpath.join(self._reader.url, name), self._reader.retry, lambda: None)
        return below.list_names()


class _Zip:
    def __init__(self, file: BinaryIO, where: str) -> None:
        try:
            self._archive = untrusted.open_zip(file, _MAX_MEMBERS)
        except (untrusted.InputError, zipfile.BadZipFile, OSError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise DatasetError(
                f"{where}: cannot be read ({shorten(cause, 200)}); fetch the file again"
            ) from error
        self._names = self._archive.namelist()
        # Some tools put the folder itself into the archive.
        tops = {n.split("/", 1)[0] for n in self._names}
        is_nested = len(tops) == 1 and all("/" in n for n in self._names)
        self._prefix = f"{tops.pop()}/" if is_nested else ""

    def read(self, name: str, start: int, stop: int | None) -> bytes | None:
        try:
            file = self._archive.open(self._prefix + name)
        except KeyError:
            return None
        with file:
            content = file.read(_MAX_CHUNK_BYTES + 1)
        if len(content) > _MAX_CHUNK_BYTES:
            raise untrusted.InputError(f"{name} has more than {untrusted.size_text(_MAX_CHUNK_BYTES)}")
        return content[start:stop]

    def list_folder(self, name: str) -> list[str]:
        prefix = f"{self._prefix}{name}/" if name else self._prefix
        return sorted({n[len(prefix) :].split("/", 1)[0] for n in self._names if n.startswith(prefix)} - {""})


class _Checked:
    """Files whose metadata is checked when it is read."""

    def __init__(self, files: _Files, where: str) -> None:
        self.files, self._where = files, where

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        if name.rsplit("/", 1)[-1] not in _DOCUMENTS:
            return self.files.read(name, start, stop)
        content = self.files.read(name, 0, untrusted.DOCUMENT.bytes + 1)
        if content is None:
            return None
        # The library may read parts, so what is checked is all of it.
        _check_document(
            untrusted.load_json(content, f"{self._where}: {name}", allow_nan=True), f"{self._where}: {name}"
        )
        return content[start:stop]


def _check_document(document: Any, where: str) -> None:
    """DatasetError for arrays that would run code, or take too much memory, when they are read."""
    if not isinstance(document, dict):
        raise DatasetError(f"{where}: is not an object; fetch the file again")
    consolidated = document.get("consolidated_metadata")
    parts = [
        document.get("metadata"),
        consolidated.get("metadata") if isinstance(consolidated, dict) else None,
    ]
    for part in parts:
        for name, entry in part.items() if isinstance(part, dict) else ():
            if isinstance(entry, dict):
                _check_array(entry, f"{where}: {shorten(name)}")
    _check_array(document, where)


def _check_array(entry: dict[str, Any], where: str) -> None:
    if "shape" not in entry:
        return  # a group, or attributes
    codecs: list[str] = []
    _add_codecs(
        [entry.get("compressor"), *_listed(entry.get("filters")), *_listed(entry.get("codecs"))], codecs
    )
    unknown = [c for c in codecs if c not in _SAFE_CODECS]
    if unknown:
        raise DatasetError(
            f"{where}: has the codec {shorten(unknown[0])}, which is not read; write it otherwise"
        )
    dtype = entry.get("dtype", entry.get("data_type"))
    if dtype == "|O" and not _TEXTS.intersection(codecs):
        raise DatasetError(f"{where}: holds Python objects, which are not read; write it otherwise")
    grid = entry.get("chunk_grid")
    configuration = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = entry.get(
        "chunks", configuration.get("chunk_shape") if isinstance(configuration, dict) else None
    )
    if any(c.get("name") == "sharding_indexed" for c in _listed(entry.get("codecs")) if isinstance(c, dict)):
        return  # a shard is read chunk by chunk
    total = _item_bytes(dtype)
    for n in _listed(chunks):
        total *= n if isinstance(n, int) and n > 0 else 1
    if total > _MAX_CHUNK_BYTES:
        raise DatasetError(
            f"{where}: has chunks of more than {untrusted.size_text(_MAX_CHUNK_BYTES)}; write it again"
        )


def _add_codecs(items: Sequence[Any], found: list[str], depth: int = 0) -> None:
    """Names of codecs, also of those inside of a shard."""
    for item in items:
        if item is None:
            continue
        name = item.get("id", item.get("name")) if isinstance(item, dict) else item
        found.append(str(name).removeprefix("numcodecs."))
        configuration = item.get("configuration") if isinstance(item, dict) else None
        if isinstance(configuration, dict) and depth < 3:
            inner = [*_listed(configuration.get("codecs")), *_listed(configuration.get("index_codecs"))]
            _add_codecs(inner, found, depth + 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _item_bytes(dtype: Any) -> int:
    try:
        return max(1, np.dtype(dtype).itemsize)
    except (TypeError, ValueError):
        return 8


class ZarrStore:
    """The arrays of a group (an :class:`.arrays.ArrayStore`)."""

    errors = (
        OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError,
        MemoryError, EOFError, StoreError, zipfile.BadZipFile, zlib.error,
    )  # fmt: skip

    def __init__(self, files: _Files, where: str) -> None:
        self.where = where
        self._files = files
        self._arrays: dict[str, ZarrArray | None] = {}
        checked = _Checked(files, where)
        try:
            if checked.read("zarr.json") is None and all(
                checked.read(n) is None for n in (".zgroup", ".zarray", ".zmetadata")
            ):
                raise (
                    remote.missing(where)
                    if not files.list_folder("")
                    else DatasetError(f"{where}: is no Zarr: it has neither zarr.json nor .zgroup")
                )
            self._root = _open(checked)
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


def _open(files: _Checked) -> Any:
    """The root group or array."""
    import zarr

    if int(zarr.__version__.split(".")[0]) >= 3:
        from maestro_scale.datasets.sources.zarr_store import ReadOnlyStore

        return zarr.open(ReadOnlyStore(files), mode="r")
    if files.read("zarr.json") is not None:
        raise DatasetError("Zarr format 3 needs zarr 3 (Python 3.11 or later)")
    mapping = _Mapping(files)
    if ".zmetadata" in mapping:
        return zarr.open_consolidated(mapping, mode="r")
    return zarr.open(mapping, mode="r")


class _Mapping(dict):
    """The files as zarr 2 wants them: a mapping."""

    def __init__(self, files: _Checked) -> None:
        super().__init__()
        self._files_of_zarr = files

    def __getitem__(self, name: str) -> bytes:
        content = self._files_of_zarr.read(name)
        if content is None:
            raise KeyError(name)
        return content

    def get(self, name: str, default: Any = None) -> Any:
        content = self._files_of_zarr.read(name)
        return default if content is None else content

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._files_of_zarr.read(name) is not None

    def __iter__(self) -> Iterator[str]:
        return self._walk("")

    def keys(self) -> Any:
        return list(self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def listdir(self, path: str = "") -> list[str]:
        return self._files_of_zarr.files.list_folder(path.strip("/"))

    def _walk(self, folder: str) -> Iterator[str]:
        for name in self._files_of_zarr.files.list_folder(folder):
            path = f"{folder}/{name}" if folder else name
            below = list(self._walk(path))
            yield from below or [path]
