"""The files of a Zarr, wherever they are, with a check of its metadata before the library sees it."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten
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


class Files(Protocol):
    """The files of a Zarr, by their names relative to its root."""

    def read(self, name: str, start: int, stop: int | None) -> bytes | None:
        """Bytes [start, stop), from the end if ``start`` is negative, to the end if ``stop`` is None; None if there is
        no such file."""

    def list_folder(self, name: str) -> list[str]:
        """Names directly below a folder."""


class FolderFiles:
    """A folder."""

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


class RemoteFiles:
    """A prefix of an object store, or of a web server."""

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


class ZipFiles:
    """An open zip. DatasetError if it is damaged."""

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


class CheckedFiles:
    """Files whose metadata is checked when it is read."""

    def __init__(self, files: Files, where: str) -> None:
        self.files, self._where = files, where
        self._documents: dict[
            str, bytes | None
        ] = {}  # asked for several times, also those that are not there

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        if name.rsplit("/", 1)[-1] not in _DOCUMENTS:
            return self.files.read(name, start, stop)
        if name not in self._documents:
            content = self.files.read(name, 0, untrusted.DOCUMENT.bytes + 1)
            if content is not None:
                where = f"{self._where}: {name}"
                _check_document(untrusted.load_json(content, where, allow_nan=True), where)
            self._documents[name] = content
        known = self._documents[name]
        return None if known is None else known[start:stop]


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


class FilesMapping(dict):
    """The files as zarr 2 wants them: a mapping."""

    def __init__(self, files: CheckedFiles) -> None:
        super().__init__()
        self._source = files

    def __getitem__(self, name: str) -> bytes:
        content = self._source.read(name)
        if content is None:
            raise KeyError(name)
        return content

    def get(self, name: str, default: Any = None) -> Any:
        content = self._source.read(name)
        return default if content is None else content

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._source.read(name) is not None

    def __iter__(self) -> Iterator[str]:
        return self._walk("")

    def keys(self) -> Any:
        return list(self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def listdir(self, path: str = "") -> list[str]:
        return self._source.files.list_folder(path.strip("/"))

    def _walk(self, folder: str) -> Iterator[str]:
        for name in self._source.files.list_folder(folder):
            path = f"{folder}/{name}" if folder else name
            below = list(self._walk(path))
            yield from below or [path]
