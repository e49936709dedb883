"""Builds batches in a loader process: reads the samples that a request names and writes them into a memory block.

Requests and metadata are small and pickled; pixels are written straight into shared memory and never pickled.
"""

from __future__ import annotations

import logging
import os
import traceback
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from maestro_scale.shards.errors import CodecError, ShardsError
from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.shards.read.store import BadShard
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.dates import FirstDate
from maestro_scale.stream.packing import Arrays, BatchMetadata, arrays_in, num_bytes, unpack
from maestro_scale.stream.rng import CounterRNG, Purpose, seed_without
from maestro_scale.stream.source import OpenShards, Source, mixture_names
from maestro_scale.stream.transform import Transform

log = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 64
MAX_RANKS_PER_NODE = 8  # assumed where ranks share a node's cache; the node's real number is not known here


@dataclass(frozen=True)
class SampleRef:
    """One sample: its number in the dataset (in training of the virtual copies), shard and index in the shard.

    ``crop``: which crop of the tile, in evaluation. ``source``: which source has it, if not that of the request.
    """

    number: int
    shard: int
    index: int
    crop: int = 0
    source: int | None = None


@dataclass(frozen=True)
class BatchRequest:
    """One batch to build. ``epoch``: None in evaluation. ``prefetch``: shards to download in the background."""

    dataset: int
    epoch: int | None
    refs: tuple[SampleRef, ...]
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True)
class WorkerResult:
    """Result of a batch request: either ``metadata`` or ``error``, and the counters of the stores since the last one.

    ``traceback``: of an unexpected error, empty for a ShardsError.
    """

    metadata: BatchMetadata | None
    counters: StoreCounters
    error: Exception | None = None
    traceback: str = ""


@dataclass(frozen=True)
class BuilderSettings:
    """Settings that all loader processes of a rank share. ``num_processes``: processes that share the node's cache.

    ``sources``: what requests name by number. Several may be of one entry of the mixture, each with the tiles that lack
    certain sensors; ``entries``: the entry of each, by number (empty: every source is an entry), ``names``: of each
    (empty: of the datasets).
    """

    sources: tuple[Source, ...]
    seed: int = 0
    flips: bool = True
    replace_bad: bool = False
    num_processes: int = 1
    first_date: FirstDate = "any"
    entries: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


class _Written(NamedTuple):
    """A sample that was written into a batch: its tile's name and place (as of ``Batch``), and how many of its dates
    were repeated or imputed."""

    tile: str
    num_repeated_dates: int
    place: str | None


class BatchBuilder:
    """Builds the batches of a rank.

    Pickles without open files and connections: each process opens its own at the first request, since a file
    position or an S3 connection must not be shared between processes.
    """

    def __init__(self, settings: BuilderSettings) -> None:
        self.settings = settings
        self.names = settings.names or mixture_names([s.name for s in settings.sources])
        self._entries = settings.entries or tuple(range(len(settings.sources)))
        self._transforms = [
            Transform(s.spec, self._seed(s), entry, settings.flips, settings.first_date, s.absent)
            for s, entry in zip(settings.sources, self._entries, strict=True)
        ]
        self._lenders = [self._lenders_of(number) for number in range(len(settings.sources))]
        self._shards: list[OpenShards] = []
        self._pid = 0
        self._last_counters = StoreCounters()

    def __reduce__(self) -> tuple[type[BatchBuilder], tuple[BuilderSettings]]:
        return BatchBuilder, (self.settings,)

    def _lenders_of(self, number: int) -> list[int]:
        """The other sources of the same entry whose tiles have all sensors that source ``number`` reads."""
        absent, entry = {*self.settings.sources[number].absent}, self._entries[number]
        return [
            i
            for i, other in enumerate(self.settings.sources)
            if i != number and self._entries[i] == entry and {*other.absent} <= absent
        ]

    def _seed(self, source: Source) -> int:
        return seed_without(self.settings.seed, source.absent)

    def transform(self, dataset: int) -> Transform:
        """The transform of a source."""
        return self._transforms[dataset]

    def num_bytes(self, size: int) -> int:
        """Bytes that a batch of ``size`` samples takes at most, over all datasets."""
        return max(num_bytes(t.fields, size) for t in self._transforms)

    def request_bytes(self, request: BatchRequest) -> int:
        """Bytes of the batch of a request."""
        return num_bytes(self._transforms[request.dataset].fields, len(request.refs))

    def unpack(self, block: Tensor, request: BatchRequest, metadata: BatchMetadata) -> Batch:
        """The batch in a block that :meth:`build` has written."""
        return unpack(block, self._transforms[request.dataset].fields, metadata)

    def try_build(self, request: BatchRequest, block: Tensor) -> WorkerResult:
        """As :meth:`build`, but returns errors.

        DataLoader would wrap an exception of a worker in one of its own, without its type and attributes.
        """
        try:
            return WorkerResult(self.build(request, block), self._take_counters())
        except ShardsError as error:
            return WorkerResult(None, self._take_counters(), error)
        except Exception as error:  # noqa: BLE001 - the training process raises it
            reason = RuntimeError(f"{type(error).__name__}: {error}")
            return WorkerResult(None, self._take_counters(), reason, traceback.format_exc())

    def build(self, request: BatchRequest, block: Tensor) -> BatchMetadata:
        """Write a batch into a block (bytes,) uint8. BadShard or StoreError if a sample cannot be read."""
        self._open_shards()
        shards, transform = self._shards[request.dataset], self._transforms[request.dataset]
        if request.prefetch:
            shards.prefetch(request.prefetch)
        arrays = arrays_in(block, transform.fields, len(request.refs))
        keys, tiles, places, num_repeated_dates, num_replaced_samples = [], [], [], 0, 0
        for row, ref in enumerate(request.refs):
            written = self._write_sample(request, ref, ref, arrays, row)
            key = self._key(request, ref)
            if isinstance(written, BadShard):
                written, substitute = self._write_replacement(request, ref, written, arrays, row)
                key, num_replaced_samples = f"{key}~{substitute}", num_replaced_samples + 1
            keys.append(key)
            tiles.append(written.tile)
            places.append(written.place)
            num_repeated_dates += written.num_repeated_dates
        if request.epoch is not None:
            transform.finish_noise(arrays)
        return BatchMetadata(
            self.names[request.dataset],
            tuple(keys),
            tuple(tiles),
            num_repeated_dates,
            num_replaced_samples,
            tuple(places),
        )

    def close(self) -> None:
        """Close every shard and connection."""
        for shards in self._shards:
            shards.close()
        self._shards = []

    def _write_sample(
        self, request: BatchRequest, ref: SampleRef, stored: SampleRef, arrays: Arrays, row: int
    ) -> _Written | BadShard:
        """Read the sample ``stored`` and transform it with the random numbers of ``ref``.

        Returns a BadShard if the recipe says to replace samples of bad shards, else raises it.
        """
        transform = self._transforms[request.dataset]
        shards = self._shards[request.dataset if stored.source is None else stored.source]
        try:
            sample = shards.sample(stored.shard, stored.index)
            if request.epoch is None:
                num_repeated_dates = transform.evaluate(sample, ref.crop, arrays, row)
            else:
                num_repeated_dates = transform.write_train(sample, request.epoch, ref.number, arrays, row)
            return _Written(sample.key, num_repeated_dates, sample.place)
        except (BadShard, CodecError) as error:
            if isinstance(error, CodecError):
                error = BadShard(shards.source.shards[stored.shard].path, str(error))
            # Evaluation is exact: a sample that cannot be read is always an error there.
            if not self.settings.replace_bad or request.epoch is None:
                raise error from None
            return error

    def _write_replacement(
        self, request: BatchRequest, ref: SampleRef, error: BadShard, arrays: Arrays, row: int
    ) -> tuple[_Written, str]:
        """Another sample in place of one in a bad shard, and its number, with its source if it is another one.

        Which one depends on (seed, epoch, sample) alone, so that every rank and worker would choose the same, and a
        resumed run repeats the choice. Crop, dates and masks stay those of ``ref``. Tiles that lack sensors may all be
        in one shard: then tiles of the same dataset that have more sensors take their place, without these.
        """
        assert request.epoch is not None  # nothing is replaced in evaluation
        shards = self._shards[request.dataset]
        seed = self._seed(shards.source)
        rng = CounterRNG(seed, Purpose.REPLACEMENT, self._entries[request.dataset])
        rng.seek(request.epoch, ref.number)
        for source in (None, *self._lenders[request.dataset]):
            others = shards if source is None else self._shards[source]
            for _ in range(_MAX_REPLACEMENTS):
                number = rng.below(others.num_samples)
                stored = SampleRef(number, *others.locate(number), source=source)
                written = self._write_sample(request, ref, stored, arrays, row)
                if not isinstance(written, BadShard):
                    substitute = f"{number}" if source is None else f"{number}@{self.names[source]}"
                    log.debug("%s: sample %s replaces %d", error, substitute, ref.number)
                    return written, substitute
        raise BadShard(
            error.path, f"{error.cause}; {_MAX_REPLACEMENTS} samples drawn in its place are bad too"
        )

    def _key(self, request: BatchRequest, ref: SampleRef) -> str:
        name = self.names[request.dataset]
        if request.epoch is None:
            return f"eval/{name}/{ref.number}/{ref.crop}"
        return f"{request.epoch}/{name}/{ref.number}"

    def _open_shards(self) -> None:
        if self._pid == os.getpid() and self._shards:
            return
        # All processes together may pin at most half of the cache by open shards, so that downloads find space.
        share = 2 * self.settings.num_processes
        self._shards = [
            OpenShards(s, s.store.cache_bytes // (share * self._entries.count(entry)))
            for s, entry in zip(self.settings.sources, self._entries, strict=True)
        ]
        self._pid, self._last_counters = os.getpid(), self._sum_counters()

    def _take_counters(self) -> StoreCounters:
        """The counters of the stores since the last call."""
        total = self._sum_counters()
        more, self._last_counters = total - self._last_counters, total
        return more

    def _sum_counters(self) -> StoreCounters:
        return sum((s.store.counters for s in self.settings.sources), StoreCounters())
