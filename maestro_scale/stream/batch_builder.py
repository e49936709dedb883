"""The work of a loader process: from a request, which names samples, to a batch in a block of memory."""

from __future__ import annotations

import logging
import os
import traceback
from dataclasses import dataclass

from torch import Tensor

from maestro_scale.shards.errors import CodecError, ShardsError
from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.shards.read.store import BadShard
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.packing import BatchMetadata, arrays_in, num_bytes, unpack
from maestro_scale.stream.rng import CounterRNG, Purpose
from maestro_scale.stream.source import OpenShards, Source, mixture_names
from maestro_scale.stream.transform import Transform, View

log = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 64


@dataclass(frozen=True)
class SampleRef:
    """One sample: its number (of virtual copies, in training) and where it is stored; ``crop`` counts in
    evaluation.
    """

    number: int
    shard: int
    index: int
    crop: int = 0


@dataclass(frozen=True)
class BatchRequest:
    """One batch to make. ``epoch``: None in evaluation. ``ahead``: shards to fetch meanwhile."""

    dataset: int
    epoch: int | None
    refs: tuple[SampleRef, ...]
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True)
class WorkerResult:
    """What came of a request: the label of the batch that was made, or the error, with its traceback where it
    is none of ours; and what the stores did meanwhile.
    """

    metadata: BatchMetadata | None
    counters: StoreCounters
    error: BaseException | None = None
    traceback: str = ""


@dataclass(frozen=True)
class BuilderSettings:
    """What every loader process of a rank needs to know. ``processes``: how many share the node's cache."""

    sources: tuple[Source, ...]
    seed: int = 0
    flips: bool = True
    replace_bad: bool = False
    num_processes: int = 1


class BatchBuilder:
    """Makes batches. Pickles; files and connections are opened in the process that uses it, at the first
    request.
    """

    def __init__(self, settings: BuilderSettings) -> None:
        self.settings = settings
        self.labels = mixture_names([s.spec.name for s in settings.sources])
        self._transforms = [
            Transform(View(s.spec, s.sensors, s.crop_m, settings.flips), settings.seed, i)
            for i, s in enumerate(settings.sources)
        ]
        self._shards: list[OpenShards] = []
        self._pid = 0
        self._last_counters = StoreCounters()

    def __reduce__(self) -> tuple:
        return BatchBuilder, (self.settings,)

    def transform(self, dataset: int) -> Transform:
        """What prepares the samples of a dataset."""
        return self._transforms[dataset]

    def num_bytes(self, size: int) -> int:
        """Bytes that a batch of ``size`` samples of any dataset may take."""
        return max(num_bytes(t.fields, size) for t in self._transforms)

    def request_bytes(self, request: BatchRequest) -> int:
        """Bytes that the batch of a request takes."""
        return num_bytes(self._transforms[request.dataset].fields, len(request.refs))

    def unpack(self, block: Tensor, request: BatchRequest, metadata: BatchMetadata) -> Batch:
        """The batch that was made in a block."""
        return unpack(block, self._transforms[request.dataset].fields, metadata)

    def try_build(self, request: BatchRequest, block: Tensor) -> WorkerResult:
        """As :meth:`build`, but errors are returned, so that they cross between processes whole."""
        try:
            return WorkerResult(self.build(request, block), self._take_counters())
        except ShardsError as error:
            return WorkerResult(None, self._take_counters(), error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training process raises it
            reason = RuntimeError(f"{type(error).__name__}: {error}")
            return WorkerResult(None, self._take_counters(), reason, traceback.format_exc())

    def build(self, request: BatchRequest, block: Tensor) -> BatchMetadata:
        """Write a batch into a block (bytes,) uint8. BadShard or StoreError if a sample cannot be had."""
        self._open_shards()
        shards, transform = self._shards[request.dataset], self._transforms[request.dataset]
        if request.prefetch:
            shards.prefetch(request.prefetch)
        arrays = arrays_in(block, transform.fields, len(request.refs))
        keys, tiles, num_repeated_dates, num_replaced_samples = [], [], 0, 0
        for row, ref in enumerate(request.refs):
            done = self._write_sample(request, ref, ref, arrays, row)
            key = self._key(request, ref)
            if isinstance(done, BadShard):
                done, stand_in = self._write_replacement(request, ref, done, arrays, row)
                key, num_replaced_samples = f"{key}~{stand_in}", num_replaced_samples + 1
            keys.append(key)
            tiles.append(done[0])
            num_repeated_dates += done[1]
        return BatchMetadata(
            self.labels[request.dataset], tuple(keys), tuple(tiles), num_repeated_dates, num_replaced_samples
        )

    def close(self) -> None:
        """Close every shard and connection."""
        for shards in self._shards:
            shards.close()
        self._shards = []

    def _write_sample(
        self, request: BatchRequest, ref: SampleRef, stored: SampleRef, arrays: dict, row: int
    ) -> tuple[str, int] | BadShard:
        """Prepare the sample at ``stored`` with the randomness of ``ref``: (tile, num_repeated_dates), or why it cannot
        be.
        """
        transform, shards = self._transforms[request.dataset], self._shards[request.dataset]
        try:
            sample = shards.sample(stored.shard, stored.index)
            if request.epoch is None:
                return sample.key, transform.evaluate(sample, ref.crop, arrays, row)
            return sample.key, transform.train(sample, request.epoch, ref.number, arrays, row)
        except (BadShard, CodecError) as error:
            if isinstance(error, CodecError):
                error = BadShard(shards.source.shards[stored.shard].path, str(error))
            if not self.settings.replace_bad or request.epoch is None:
                raise error from None
            return error

    def _write_replacement(
        self, request: BatchRequest, ref: SampleRef, error: BadShard, arrays: dict, row: int
    ) -> tuple[tuple[str, int], int]:
        """Another sample in place of one in a bad shard: which one depends on (seed, epoch, sample) alone."""
        shards = self._shards[request.dataset]
        rng = CounterRNG(self.settings.seed, Purpose.REPLACEMENT, request.dataset)
        rng.seek(request.epoch, ref.number)
        for _ in range(_MAX_REPLACEMENTS):
            number = rng.below(shards.num_samples)
            done = self._write_sample(request, ref, SampleRef(number, *shards.locate(number)), arrays, row)
            if not isinstance(done, BadShard):
                log.debug("%s: sample %d stands in for %d", error, number, ref.number)
                return done, number
        raise BadShard(
            error.path, f"{error.cause}; {_MAX_REPLACEMENTS} samples drawn in its place are bad too"
        )

    def _key(self, request: BatchRequest, ref: SampleRef) -> str:
        label = self.labels[request.dataset]
        if request.epoch is None:
            return f"eval/{label}/{ref.number}/{ref.crop}"
        return f"{request.epoch}/{label}/{ref.number}"

    def _open_shards(self) -> None:
        if self._pid == os.getpid() and self._shards:
            return
        share = 2 * self.settings.num_processes
        self._shards = [OpenShards(s, s.store.cache_bytes // share) for s in self.settings.sources]
        self._pid, self._last_counters = os.getpid(), self._sum_counters()

    def _take_counters(self) -> StoreCounters:
        """What the stores did since this was last asked."""
        total = self._sum_counters()
        more, self._last_counters = total - self._last_counters, total
        return more

    def _sum_counters(self) -> StoreCounters:
        return sum((s.store.counters for s in self.settings.sources), StoreCounters())
