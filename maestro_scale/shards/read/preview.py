"""Reads single samples of a shard without the rest of it, by range requests if the shard has an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from maestro_scale.shards.errors import BadShard, CodecError, ManifestError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import LocalStorage, Storage, open_storage
from maestro_scale.shards.temporary import temporary_folder


def read_first_sample(url: str, info: ShardInfo) -> Sample:
    """Read the first sample of a shard into memory, as :func:`read_samples` does."""
    return next(read_samples(url, info, [0]))


def read_samples(url: str, info: ShardInfo, numbers: Sequence[int]) -> Iterator[Sample]:
    """Read the samples with these numbers (from 0, in stored order), one at a time, into memory.

    If the shard has an index, only these samples are transferred and the shard is not verified; otherwise the shard is
    downloaded and verified. BadShard or another StoreError if it cannot be read; ManifestError for an invalid index.
    """
    storage = open_storage(url)
    name = index_path(info.path)
    try:
        index = ShardIndex.read(storage, name)
    except FileNotFoundError:
        with temporary_folder() as cache:
            path, index = Store(url, cache, 2 * info.bytes).ensure(info)
            local = LocalStorage(path.parent)
            for number in numbers:
                yield _sample(local, path.name, index, number, storage.address(info.path))
        return
    # The index is not verified: without this, its numbers could name any range of bytes, or none.
    complete = len(index.keys) > max(numbers, default=0)
    if not complete or (index.bytes, index.sha256) != (info.bytes, info.sha256):
        raise ManifestError(
            f"{storage.address(name)}: is not the index of {info.path}; run `maestro-scale verify`"
        )
    for number in numbers:
        yield _sample(storage, info.path, index, number, storage.address(info.path))


def _read(storage: Storage, name: str, start: int, stop: int) -> bytes:
    try:
        if isinstance(storage, LocalStorage):
            with open(storage.folder / name, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return storage.read_range(name, start, stop)
    except FileNotFoundError as error:
        raise BadShard(storage.address(name), "is missing") from error
    except OSError as error:
        raise BadShard(storage.address(name), f"cannot be read ({error.strerror})") from error


def _sample(storage: Storage, name: str, index: ShardIndex, number: int, address: str) -> Sample:
    start, key = index.offsets[number], index.keys[number]
    data = _read(storage, name, start, start + index.sizes[number])
    try:
        sample = Sample(data)
    except CodecError as error:
        raise BadShard(address, f"sample {key}: {error}") from error
    if sample.key != key:
        raise BadShard(address, f"contains the sample {sample.key} where its index says {key}")
    return sample
