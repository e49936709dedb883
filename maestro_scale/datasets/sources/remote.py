"""Addresses of raw data: local paths, and what fsspec reads (``s3://``, ``https://``, ``gs://`` …).

Remote files are read by range requests, with the credentials, retries and time limits of the shards' storage
(maestro_scale.remote): nothing is downloaded as a whole, and GDAL itself never opens a connection.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO
from urllib.parse import urlsplit

from maestro_scale import untrusted
from maestro_scale.datasets.description.patterns import scan_local
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.remote.errors import StoreError
from maestro_scale.remote.reader import RemoteReader, credentials_in, local_folder
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.untrusted import Limits

MISSING = "a file is missing"
"""Kind of the DatasetError for a file that is not there."""

_BLOCK_BYTES = 256 * 1024
_MAX_BLOCKS = 64  # kept per open file: 16 MiB


def is_remote(address: str) -> bool:
    """Whether an address is not a path on this machine."""
    return "://" in address and not address.startswith("file://")


def local_path(address: str) -> str:
    """The path of an address that is not remote."""
    path = local_folder(address)
    assert path is not None
    return str(path)


def join(src: str, path: str) -> str:
    """The address of ``path``, which is relative to ``src`` unless it is absolute or an address itself."""
    if "://" in path or os.path.isabs(path):
        return path
    return posixpath.join(src.rstrip("/"), path) if is_remote(src) else os.path.join(local_path(src), path)


def scan(src: str) -> Callable[[str], Iterable[tuple[str, bool]]]:
    """``list_folder`` of :meth:`.patterns.Pattern.walk` for a folder or a prefix of an object store."""
    if not is_remote(src):
        return scan_local(local_path(src))
    if src.startswith(("http://", "https://")):
        raise DatasetError(
            f"{src}: a web server does not list its files; give the full address of a file, shards by a brace pattern "
            "({000..099}), or a STAC catalog"
        )

    def entries(folder: str) -> Iterator[tuple[str, bool]]:
        reader = reader_of(join(src, folder))
        try:
            yield from reader.list_entries()
        except StoreError as error:
            raise DatasetError(str(error)) from error

    return entries


def open_binary(address: str) -> BinaryIO:
    """A file to be read at any position; DatasetError if it is missing or cannot be read. Close it.

    A remote one is read in blocks as they are needed; errors of its reads are OSErrors.
    """
    if is_remote(address):
        return io.BufferedReader(RemoteFile(address), _BLOCK_BYTES)
    return _open_local(address)


def open_unbuffered(address: str) -> IO[bytes]:
    """As :func:`open_binary`, for small reads far from each other."""
    return RemoteFile(address) if is_remote(address) else _open_local(address)  # type: ignore[return-value]


def _open_local(address: str) -> BinaryIO:
    path = local_path(address)
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise missing(address) from error
    except OSError as error:
        raise DatasetError(f"{address}: cannot be read ({error.strerror}); check the path") from error


def missing(address: str) -> DatasetError:
    """The error for a file that is not there."""
    return DatasetError(f"{address}: is missing; fetch it, or leave the tile out", MISSING)


def read_document(address: str, limits: Limits = untrusted.DOCUMENT) -> bytes:
    """The whole content of a small file; DatasetError if it is missing, unreadable, or larger than ``limits``."""
    try:
        with open_binary(address) as file:
            content = file.read(limits.bytes + 1)
        untrusted.check_size(len(content), address, limits)
    except untrusted.InputError as error:
        raise DatasetError(str(error)) from error
    except OSError as error:
        raise DatasetError(f"{address}: cannot be read ({error})") from error
    return content


def reader_of(url: str) -> RemoteReader:
    """The files below a remote prefix."""
    if problem := credentials_in(url):
        raise DatasetError(problem)
    return RemoteReader(url, RetryPolicy(), _ignore)


def _ignore() -> None:
    """Retries of reading raw data are not counted."""


class _Positioned(io.RawIOBase):
    """A readable file of ``size`` bytes with a position."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("cannot seek before the start")
        self._position = start + offset
        return self._position


class RemoteFile(_Positioned):
    """A remote file, read by range requests of at least 256 KiB, of which the latest 16 MiB are kept.

    Not seekable beyond what it says at first: a file that changes while it is read gives an OSError or damaged data,
    as on disk. DatasetError if it is missing or cannot be reached.
    """

    def __init__(self, address: str) -> None:
        # The query of a signed address belongs to the name.
        head = address.split("?", 1)[0]
        folder, _, name = head.rpartition("/")
        if not name or not urlsplit(head).scheme:
            raise DatasetError(f"{address}: is not the address of a file")
        self.name = address
        self._file = name + address[len(head) :]
        self._storage = reader_of(folder)
        try:
            size = self._storage.size(self._file)
        except StoreError as error:
            raise DatasetError(str(error)) from error
        if size is None:
            raise missing(address)
        super().__init__(size)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        data = self._bytes(self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _bytes(self, start: int, stop: int) -> bytes:
        first, last = start // _BLOCK_BYTES, (stop - 1) // _BLOCK_BYTES
        if last - first >= _MAX_BLOCKS // 2:
            return self._fetch(start, stop)
        number = first
        while number <= last:
            if number in self._blocks:
                number += 1
                continue
            end = number
            while end < last and end + 1 not in self._blocks:
                end += 1
            data = self._fetch(number * _BLOCK_BYTES, min((end + 1) * _BLOCK_BYTES, self._size))
            for i in range(number, end + 1):
                at = (i - number) * _BLOCK_BYTES
                self._blocks[i] = data[at : at + _BLOCK_BYTES]
            number = end + 1
        joined = b"".join(self._blocks[i] for i in range(first, last + 1))
        for i in range(first, last + 1):
            self._blocks.move_to_end(i)
        while len(self._blocks) > _MAX_BLOCKS:
            self._blocks.popitem(last=False)
        return joined[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            data = self._storage.read_range(self._file, start, stop)
        except (StoreError, FileNotFoundError) as error:
            raise OSError(str(error)) from error
        if len(data) == self._size and stop - start < self._size:
            raise OSError("the server ignores range requests; fetch the file")
        if len(data) != stop - start:
            raise OSError(f"the server sent {len(data)} of {stop - start} bytes: the file has changed")
        return data


class Part(_Positioned):
    """Bytes [start, start + size) of an open file, as a file. Closing it leaves the file open."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__(size)
        self._file, self._start = file, start

    def readinto(self, buffer: Any) -> int:
        num_bytes = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(num_bytes)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
