"""An open, verified shard: samples by index, read on access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from maestro_scale.shards.errors import BadShard, CodecError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex

_WHOLE_BYTES = 2 * 1024 * 1024  # larger samples are read field by field, smaller ones as a whole


class Shard:
    """The samples of one tar. After :meth:`close` the cache may evict the file; samples stay valid.

    ``descriptor``: an open descriptor of the file, which this object owns. A shared lock on it pins the file.
    """

    def __init__(self, path: str, descriptor: int, index: ShardIndex) -> None:
        self.path = path
        self.keys = index.keys
        self._index = index
        self._file: _OpenFile | None = _OpenFile(path, descriptor)
        if max(index.sizes) > _WHOLE_BYTES and hasattr(os, "posix_fadvise"):
            # Only a small part of a large sample is read, so readahead would load dates and bands that nobody needs.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``. IndexError past the end; BadShard if the file changed or contains another sample there."""
        key = self.keys[i]
        if self._file is None:
            raise ValueError(f"{self.path}: the shard is closed")
        start, size = self._index.offsets[i], self._index.sizes[i]
        try:
            # pread instead of mmap: page faults for 100 pages cost more than copying them.
            small = size <= _WHOLE_BYTES
            sample = Sample(self._file.read(start, size) if small else _FileRange(self._file, start, size))
        except CodecError as error:
            raise BadShard(self.path, f"sample {key}: {error}") from error
        if sample.key != key:
            raise BadShard(self.path, f"member {key} contains the sample {sample.key}")
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Release the file. It is closed when the last sample that still reads from it is deleted."""
        self._file = None

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _OpenFile:
    """An open file that is closed with the last reference to it.

    Reference counting instead of explicit closing, because large samples read from it after the shard is closed.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def read(self, start: int, size: int) -> bytes:
        """Exactly ``size`` bytes; BadShard if that fails."""
        try:
            data = os.pread(self._descriptor, size, start)
            # pread may return less, for example on network file systems.
            while 0 < len(data) < size and (
                more := os.pread(self._descriptor, size - len(data), start + len(data))
            ):
                data += more
        except OSError as error:
            raise BadShard(self._path, f"cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise BadShard(self._path, "the file changed while it was in use: it is shorter now")
        return data

    def read_many(self, starts: Sequence[int], size: int) -> np.ndarray:
        """``size`` bytes from each of ``starts``, one after the other, uint8; BadShard if that fails."""
        data = np.empty(size * len(starts), np.uint8)
        preadv, descriptor, parts = os.preadv, self._descriptor, data.data
        at, done = 0, 0
        try:
            for start in starts:
                done += preadv(descriptor, (parts[at : at + size],), start)
                at += size
        except OSError as error:
            raise BadShard(self._path, f"cannot be read ({error.strerror})") from error
        # Short reads are rare: then each part is read again, with their handling.
        if done != len(data):
            data[:] = np.frombuffer(b"".join(self.read(s, size) for s in starts), np.uint8)
        return data

    def __del__(self) -> None:
        os.close(self._descriptor)


class _FileRange:
    """A :class:`.codec.ByteReader` of one sample within a file."""

    def __init__(self, file: _OpenFile, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def __len__(self) -> int:
        return self._size

    def read(self, begin: int, end: int) -> memoryview:
        return memoryview(self._file.read(self._start + begin, end - begin))

    def read_many(self, begins: Sequence[int], size: int) -> np.ndarray:
        """``size`` bytes from each of ``begins``, one after the other, uint8."""
        return self._file.read_many([self._start + begin for begin in begins], size)
