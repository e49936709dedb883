"""Shards as a stock WebDataset pipeline, for training loops outside of this project.

The order of samples, their division among ranks and workers and the handling of errors are webdataset's; crops, dates
and masking noise are the caller's. The exact stream of ``maestro_scale.stream`` is what the trainer uses.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import did_you_mean, shorten
from maestro_scale.shards.errors import BadShard, CodecError, ManifestError, StoreError, one_line
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import REF_DATE, dates_field, mask_field, target_field
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.tar import SUFFIX
from maestro_scale.shards.storage import RemoteStorage, Storage, open_storage

if TYPE_CHECKING:
    import webdataset

_SUFFIX = SUFFIX.removeprefix(".")
_BLOCK_BYTES = 8 * 1024 * 1024  # of a range request
# webdataset opens tars of any compression, and a small file can then claim any size.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00", b"\x28\xb5\x2f\xfd")

Splitter = Callable[[Iterable[Any]], Iterable[Any]]


def as_webdataset(
    url: str,
    split: str,
    *,
    fields: Sequence[str] | None = None,
    shardshuffle: int | bool = False,
    seed: int | None = None,
    resampled: bool = False,
    nodesplitter: Splitter | None = None,
    workersplitter: Splitter | None = None,
    handler: Callable[[Exception], bool] | None = None,
) -> webdataset.WebDataset:
    """The tiles of a split as a ``webdataset.WebDataset``, to which its methods can be appended (``.shuffle(1000)``,
    ``.map(…)``, ``.to_tuple("s2", "s2.dates")``, ``.batched(16)``).

    A sample is a dict: ``__key__`` (the tile's key), ``__url__`` (its shard), and arrays in native dtypes by field:
    ``<raster>`` (T, C, H, W), ``<raster>.dates`` (T, 3) int16 (year, day of year, hour), ``<raster>.mask`` (T, M, H, W)
    uint8 0-100, ``target.<name>``, ``ref_date`` (3,). A field that a tile does not have is left out.

    Args:
        url: folder or fsspec URL of the dataset (``s3://…`` as everywhere in this project).
        fields: decode only these; default: all.
        shardshuffle, seed, resampled, handler: as in ``webdataset.WebDataset``.
        nodesplitter: default ``webdataset.split_by_node``: every rank gets other shards. Ranks get different numbers of
            samples; use ``resampled=True`` and ``.with_epoch(n)`` where all must make the same number of steps.
        workersplitter: default ``webdataset.split_by_worker``.

    A shard that is missing or has another size than the manifest says is a BadShard before its first sample, one with
    another SHA-256 after its last; both go to ``handler``. ManifestError if there is no such dataset, split or field.
    """
    import webdataset as wds
    from webdataset.cache import StreamingOpen

    manifest = Manifest.load(url)
    shards = manifest.shards_of([split])
    if fields is not None:
        _check_fields(fields, manifest.spec)
    storage = open_storage(url)
    by_url = {storage.address(info.path): info for info in shards}
    handler = wds.handlers.reraise_exception if handler is None else handler
    dataset = wds.WebDataset(
        list(by_url),
        handler=handler,
        resampled=resampled,
        shardshuffle=False if resampled else shardshuffle,
        nodesplitter=None if resampled else nodesplitter or wds.split_by_node,
        workersplitter=None if resampled else workersplitter or wds.split_by_worker,
        seed=seed,
    )
    # Its own opener takes ? and # in a path for parts of a URL, knows no s3://, and reads a cut shard without an error.
    stages = [isinstance(stage, StreamingOpen) for stage in dataset.pipeline]
    dataset.pipeline[stages.index(True)] = _OpenShards(storage, by_url, handler)
    return dataset.compose(_Decode(None if fields is None else tuple(fields), handler))


def _check_fields(fields: Sequence[str], spec: DatasetSpec) -> None:
    known = [REF_DATE, *(target_field(t.name) for t in spec.targets)]
    for modality in spec.modalities:
        known += [modality.name, dates_field(modality.name)]
        known += [mask_field(modality.name)] if modality.mask_bands else []
    for name in fields:
        if name not in known:
            raise ManifestError(f"{spec.name} has no field {shorten(name)}{did_you_mean(name, known)}")


@dataclass(frozen=True)
class _Decode:
    """A stage of the pipeline: the bytes of a sample become its arrays. Not by ``WebDataset.map``, which would restore
    the encoded key."""

    fields: tuple[str, ...] | None
    handler: Callable[[Exception], bool]

    def __call__(self, items: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            try:
                sample = self._decode(item)
            except BadShard as error:
                if not self.handler(error):
                    break
            else:
                yield sample

    def _decode(self, item: Mapping[str, Any]) -> dict[str, Any]:
        try:
            sample = Sample(item[_SUFFIX])
            names = [n for n in sample.names if self.fields is None or n in self.fields]
            # Copies: the arrays of a sample are views that cannot be written to, which PyTorch warns about.
            arrays = {name: np.array(sample.array(name)) for name in names}
        except (KeyError, CodecError) as error:
            raise BadShard(item["__url__"], f"sample {item['__key__']}: {one_line(error)}") from error
        return {"__key__": sample.key, "__url__": item["__url__"], **arrays}


@dataclass(frozen=True)
class _OpenShards:
    """A stage of the pipeline: addresses become open streams, which are compared with the manifest."""

    storage: Storage
    shards: Mapping[str, ShardInfo]
    handler: Callable[[Exception], bool]

    def __call__(self, urls: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
        for url in (item["url"] for item in urls):
            info = self.shards[url]
            try:
                with closing(_HashedStream(self._open(info, url))) as stream:
                    yield {"url": url, "stream": stream}
                    if stream.sha256_of_all() != info.sha256:
                        cause = "has another SHA-256 than the manifest says: damaged, or another shard"
                        raise BadShard(url, cause)
            except (StoreError, OSError) as error:
                if not self.handler(error):
                    break

    def _open(self, info: ShardInfo, url: str) -> io.BufferedReader:
        if (size := self.storage.size(info.path)) != info.bytes:
            cause = "is missing" if size is None else f"has {size} bytes, the manifest says {info.bytes}"
            raise BadShard(url, cause)
        file: io.BufferedReader | None = None
        try:
            if isinstance(self.storage, RemoteStorage):
                file = io.BufferedReader(_RemoteFile(self.storage, info), _BLOCK_BYTES)
            else:
                file = open(self.storage.folder / info.path, "rb")  # noqa: SIM115 # closed by the stream
            if file.peek(8).startswith(_COMPRESSED):
                raise BadShard(url, "is compressed, which shards are not")
        except OSError as error:
            raise BadShard(url, f"cannot be read ({error.strerror})") from error
        return file


class _HashedStream(io.RawIOBase):
    """The bytes of a file, hashed as they are read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def sha256_of_all(self) -> str:
        """The hash of the whole file; reads what is left, since the reader of a tar stops at the archive's end."""
        while self.read(_BLOCK_BYTES):
            pass
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class _RemoteFile(io.RawIOBase):
    """An object read from its begin to its end by range requests, with the retries of the storage."""

    def __init__(self, storage: RemoteStorage, info: ShardInfo) -> None:
        self._storage, self._info = storage, info
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._info.bytes)
        if stop == self._position:
            return 0
        try:
            data = self._storage.read_range(self._info.path, self._position, stop)
        except FileNotFoundError as error:
            raise BadShard(self._storage.address(self._info.path), "is missing") from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
