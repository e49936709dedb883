"""A verified shard, open: samples by number, straight from a memory map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from maestro_scale.shards.codec import Sample
from maestro_scale.shards.errors import BadShard, CodecError
from maestro_scale.shards.index import ShardIndex

_RESIDENT_BYTES = 8 * 1024 * 1024


class Shard:
    """The samples of one tar. Close it, so that the cache may drop the file; samples stay valid.

    ``descriptor``: an open descriptor of the file, which the shard closes; a lock on it pins the file.
    """

    def __init__(self, path: str, descriptor: int, index: ShardIndex) -> None:
        self.path = path
        self.keys = index.keys
        self._index = index
        self._descriptor: int | None = descriptor
        self._map = mmap.mmap(descriptor, index.bytes, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._touched = 0

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``. IndexError past the end; BadShard if the file changed or holds another sample there."""
        key = self.keys[i]
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the shard is closed")
        # A map of a file that was cut short kills the process when it is touched.
        if os.fstat(self._descriptor).st_size != self._index.bytes:
            raise BadShard(self.path, "the file changed while it was in use")
        start, size = self._index.offsets[i], self._index.sizes[i]
        self._release_pages(size)
        try:
            sample = Sample(self._view[start : start + size])
        except CodecError as error:
            raise BadShard(self.path, f"sample {key}: {error}") from error
        if sample.key != key:
            raise BadShard(self.path, f"member {key} holds the sample {sample.key}")
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            # The map goes when the last sample does.
            del self._map, self._view

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def _release_pages(self, size: int) -> None:
        """Keep the process small: mapped pages count as its memory. They stay valid, and in the page cache."""
        self._touched += size
        if self._touched > _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = size
