"""Preview of a shard: reads its first sample, by a range request if the shard has an index."""

from __future__ import annotations

from maestro_scale.shards.errors import BadShard, CodecError, ManifestError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import LocalStorage, Storage, open_storage
from maestro_scale.shards.temporary import temporary_folder


def read_first_sample(url: str, info: ShardInfo) -> Sample:
    """Read the first sample of a shard into memory.

    If the shard has an index, only this sample is transferred and the shard is not verified; otherwise the shard is
    downloaded and verified. BadShard or another StoreError if it cannot be read; ManifestError for an invalid index.
    """
    storage = open_storage(url)
    name = index_path(info.path)
    try:
        index = ShardIndex.read(storage, name)
    except FileNotFoundError:
        with temporary_folder() as cache:
            store = Store(url, cache, 2 * info.bytes)
            path, index = store.ensure(info)
            return _sample(path.read_bytes(), index, storage.address(info.path))
    # The index is not verified: without this, its numbers could name any range of bytes, or none.
    if not index.keys or (index.bytes, index.sha256) != (info.bytes, info.sha256):
        raise ManifestError(
            f"{storage.address(name)}: is not the index of {info.path}; run `maestro-scale verify`"
        )
    start, size = index.offsets[0], index.sizes[0]
    return _sample(_read(storage, info.path, start + size), index, storage.address(info.path))


def _read(storage: Storage, name: str, stop: int) -> bytes:
    try:
        if isinstance(storage, LocalStorage):
            with open(storage.folder / name, "rb") as file:
                return file.read(stop)
        return storage.read_range(name, 0, stop)
    except FileNotFoundError as error:
        raise BadShard(storage.address(name), "is missing") from error
    except OSError as error:
        raise BadShard(storage.address(name), f"cannot be read ({error.strerror})") from error


def _sample(data: bytes, index: ShardIndex, address: str) -> Sample:
    start, size = index.offsets[0], index.sizes[0]
    try:
        sample = Sample(memoryview(data)[start : start + size])
    except CodecError as error:
        raise BadShard(address, f"sample {index.keys[0]}: {error}") from error
    if sample.key != index.keys[0]:
        raise BadShard(address, f"contains the sample {sample.key} where its index says {index.keys[0]}")
    return sample
