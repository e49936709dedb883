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
from maestro_scale.stream.packing import Label, arrays_in, num_bytes, unpack
from maestro_scale.stream.rng import Draws, Purpose
from maestro_scale.stream.source import OpenShards, Source, mixture_names
from maestro_scale.stream.transform import Preparer, View

log = logging.getLogger(__name__)

_MOST_REPLACEMENTS = 64


@dataclass(frozen=True)
class Ref:
    """One sample: its number (of virtual copies, in training) and where it is stored; ``crop`` counts in
    evaluation.
    """

    number: int
    shard: int
    index: int
    crop: int = 0


@dataclass(frozen=True)
class Request:
    """One batch to make. ``epoch``: None in evaluation. ``ahead``: shards to fetch meanwhile."""

    dataset: int
    epoch: int | None
    refs: tuple[Ref, ...]
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Made:
    """What came of a request: the label of the batch that was made, or the error, with its traceback where it
    is none of ours; and what the stores did meanwhile.
    """

    label: Label | None
    counters: StoreCounters
    error: BaseException | None = None
    trace: str = ""


@dataclass(frozen=True)
class Settings:
    """What every loader process of a rank needs to know. ``processes``: how many share the node's cache."""

    sources: tuple[Source, ...]
    seed: int = 0
    flips: bool = True
    replace_bad: bool = False
    processes: int = 1


class Reading:
    """Makes batches. Pickles; files and connections are opened in the process that uses it, at the first
    request.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.labels = mixture_names([s.spec.name for s in settings.sources])
        self._preparers = [
            Preparer(View(s.spec, s.sensors, s.crop_m, settings.flips), settings.seed, i)
            for i, s in enumerate(settings.sources)
        ]
        self._shards: list[OpenShards] = []
        self._pid = 0
        self._counted = StoreCounters()

    def __reduce__(self) -> tuple:
        return Reading, (self.settings,)

    def preparer(self, dataset: int) -> Preparer:
        """What prepares the samples of a dataset."""
        return self._preparers[dataset]

    def num_bytes(self, size: int) -> int:
        """Bytes that a batch of ``size`` samples of any dataset may take."""
        return max(num_bytes(p.fields, size) for p in self._preparers)

    def num_bytes_of(self, request: Request) -> int:
        """Bytes that the batch of a request takes."""
        return num_bytes(self._preparers[request.dataset].fields, len(request.refs))

    def unpack(self, block: Tensor, request: Request, label: Label) -> Batch:
        """The batch that was made in a block."""
        return unpack(block, self._preparers[request.dataset].fields, label)

    def attempt(self, request: Request, block: Tensor) -> Made:
        """As :meth:`make`, but errors are returned, so that they cross between processes whole."""
        try:
            return Made(self.make(request, block), self._counters())
        except ShardsError as error:
            return Made(None, self._counters(), error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training process raises it
            reason = RuntimeError(f"{type(error).__name__}: {error}")
            return Made(None, self._counters(), reason, traceback.format_exc())

    def make(self, request: Request, block: Tensor) -> Label:
        """Write a batch into a block (bytes,) uint8. BadShard or StoreError if a sample cannot be had."""
        self._open()
        shards, preparer = self._shards[request.dataset], self._preparers[request.dataset]
        if request.ahead:
            shards.prefetch(request.ahead)
        arrays = arrays_in(block, preparer.fields, len(request.refs))
        keys, tiles, filled, replaced = [], [], 0, 0
        for row, ref in enumerate(request.refs):
            done = self._put(request, ref, ref, arrays, row)
            key = self._key(request, ref)
            if isinstance(done, BadShard):
                done, stand_in = self._put_other(request, ref, done, arrays, row)
                key, replaced = f"{key}~{stand_in}", replaced + 1
            keys.append(key)
            tiles.append(done[0])
            filled += done[1]
        return Label(self.labels[request.dataset], tuple(keys), tuple(tiles), filled, replaced)

    def close(self) -> None:
        """Close every shard and connection."""
        for shards in self._shards:
            shards.close()
        self._shards = []

    def _put(
        self, request: Request, ref: Ref, place: Ref, arrays: dict, row: int
    ) -> tuple[str, int] | BadShard:
        """Prepare the sample at ``place`` with the randomness of ``ref``: (tile, filled), or why it cannot
        be.
        """
        preparer, shards = self._preparers[request.dataset], self._shards[request.dataset]
        try:
            sample = shards.sample(place.shard, place.index)
            if request.epoch is None:
                return sample.key, preparer.evaluate(sample, ref.crop, arrays, row)
            return sample.key, preparer.train(sample, request.epoch, ref.number, arrays, row)
        except (BadShard, CodecError) as error:
            if isinstance(error, CodecError):
                error = BadShard(shards.source.shards[place.shard].path, str(error))
            if not self.settings.replace_bad or request.epoch is None:
                raise error from None
            return error

    def _put_other(
        self, request: Request, ref: Ref, error: BadShard, arrays: dict, row: int
    ) -> tuple[tuple[str, int], int]:
        """Another sample in place of one in a bad shard: which one depends on (seed, epoch, sample) alone."""
        shards = self._shards[request.dataset]
        draws = Draws(self.settings.seed, Purpose.REPLACEMENT, request.dataset)
        draws.seek(request.epoch, ref.number)
        for _ in range(_MOST_REPLACEMENTS):
            number = draws.below(shards.num_samples)
            done = self._put(request, ref, Ref(number, *shards.locate(number)), arrays, row)
            if not isinstance(done, BadShard):
                log.debug("%s: sample %d stands in for %d", error, number, ref.number)
                return done, number
        raise BadShard(
            error.path, f"{error.cause}; {_MOST_REPLACEMENTS} samples drawn in its place are bad too"
        )

    def _key(self, request: Request, ref: Ref) -> str:
        label = self.labels[request.dataset]
        if request.epoch is None:
            return f"eval/{label}/{ref.number}/{ref.crop}"
        return f"{request.epoch}/{label}/{ref.number}"

    def _open(self) -> None:
        if self._pid == os.getpid() and self._shards:
            return
        share = 2 * self.settings.processes
        self._shards = [OpenShards(s, s.store.cache_bytes // share) for s in self.settings.sources]
        self._pid, self._counted = os.getpid(), self._total()

    def _counters(self) -> StoreCounters:
        """What the stores did since this was last asked."""
        total = self._total()
        more, self._counted = total - self._counted, total
        return more

    def _total(self) -> StoreCounters:
        return sum((s.store.counters for s in self.settings.sources), StoreCounters())
