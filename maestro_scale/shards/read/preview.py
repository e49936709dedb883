"""One sample of a dataset in shards, to look at: by one range request where the shard has an index."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from maestro_scale.shards.errors import BadShard, CodecError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex, index_name
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import LocalRoot, Root, open_root


def first_sample(url: str, info: ShardInfo) -> Sample:
    """The first sample of a shard, whole in memory. The shard is not verified where it has an index.

    BadShard or another StoreError if it cannot be had; ManifestError for an index that makes no sense.
    """
    root = open_root(url)
    name = index_name(info.path)
    try:
        index = ShardIndex.loads(root.read(name), root.address(name))
    except FileNotFoundError:
        with TemporaryDirectory(prefix="maestro-scale-") as cache:
            store = Store(url, Path(cache), 2 * info.bytes)
            path, index = store.ensure(info)
            return _sample(path.read_bytes(), index, root.address(info.path))
    start, size = index.offsets[0], index.sizes[0]
    return _sample(_read(root, info.path, start + size), index, root.address(info.path))


def _read(root: Root, name: str, stop: int) -> bytes:
    try:
        if isinstance(root, LocalRoot):
            with open(root.folder / name, "rb") as file:
                return file.read(stop)
        return root.read_range(name, 0, stop)
    except FileNotFoundError as error:
        raise BadShard(root.address(name), "is missing") from error
    except OSError as error:
        raise BadShard(root.address(name), f"cannot be read ({error.strerror})") from error


def _sample(data: bytes, index: ShardIndex, address: str) -> Sample:
    start, size = index.offsets[0], index.sizes[0]
    try:
        sample = Sample(memoryview(data)[start : start + size])
    except CodecError as error:
        raise BadShard(address, f"sample {index.keys[0]}: {error}") from error
    if sample.key != index.keys[0]:
        raise BadShard(address, f"holds the sample {sample.key} where its index says {index.keys[0]}")
    return sample
