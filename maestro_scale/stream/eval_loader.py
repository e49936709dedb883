"""The evaluation loader: every sample exactly once over all ranks, without randomness, padding or dropping."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.batch_builder import (
    MAX_RANKS_PER_NODE,
    BatchBuilder,
    BatchRequest,
    BuilderSettings,
    SampleRef,
)
from maestro_scale.stream.plan import SampleOrderError
from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import Pipeline

_PREFETCH_SHARDS = 4  # shards downloaded before they are needed


class EvalLoader:
    """One pass over a source per iteration, in the order of the manifest, in batches of at most
    ``batch_size``.

    The batches do not depend on the number of ranks, so one rank and eight compute the same floating-point values.
    Each rank has consecutive batches, and ranks differ by at most one batch: sum counts over ranks at the end, and
    call no collective operation per batch. A tile larger than the crop yields all its crops, row by row
    (``num_crops`` per sample); ``crops=1`` only the first.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        crops: int | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise SampleOrderError(
                f"batch_size {batch_size}, rank {rank} of {world}: do not make an evaluation"
            )
        self.source, self.batch_size, self.workers, self.pin = source, batch_size, workers, pin
        self._settings = BuilderSettings(
            (source,), num_processes=max(workers, 1) * min(world, MAX_RANKS_PER_NODE)
        )
        available = BatchBuilder(self._settings).transform(0).grid.num_crops
        self.num_crops = available if crops is None else min(crops, available)
        self.num_samples = sum(source.counts)
        total = self.num_samples * self.num_crops
        batches = -(-total // batch_size)
        # Ranks split whole batches, not samples: the composition of a batch, and so every rounding in it, is the same
        # on any number of ranks. Rounded up, so that rank 0 has a batch whenever there is one.
        first, stop = (min(-(-r * batches // world) * batch_size, total) for r in (rank, rank + 1))
        self._items = range(first, stop)
        self._starts = np.cumsum((0, *source.counts))
        self.counters = StoreCounters()

    @property
    def items(self) -> np.ndarray:
        """(n, 2) int64: sample number (in manifest order) and crop of every item of this rank."""
        return np.stack(np.divmod(np.asarray(self._items, np.int64), self.num_crops), axis=1)

    @property
    def first_row(self) -> int:
        """Index of this rank's first item among those of all ranks."""
        return self._items.start

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return -(-len(self._items) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches with noise 0 and keys "eval/dataset/sample/crop". BadShard, StoreError or LoaderError."""
        workers = min(self.workers, len(self))
        pipeline = Pipeline(
            BatchBuilder(self._settings),
            self._requests(),
            batch_size=self.batch_size,
            workers=workers,
            prefetch_batches=2 * workers,
            pin=self.pin,
            on_counters=self._add_counters,
        )
        try:
            yield from pipeline
        finally:
            pipeline.close()

    def _requests(self) -> Iterator[BatchRequest]:
        items = self.items
        shards = np.searchsorted(self._starts, items[:, 0], side="right") - 1
        last_shard = -1
        for first in range(0, len(items), self.batch_size):
            stop = min(first + self.batch_size, len(items))
            refs = tuple(
                SampleRef(int(n), int(s), int(n - self._starts[s]), int(c))
                for (n, c), s in zip(items[first:stop], shards[first:stop], strict=True)
            )
            prefetch: tuple[int, ...] = ()
            if shards[first] != last_shard:
                last_shard = shards[first]
                prefetch = tuple(range(last_shard, min(last_shard + _PREFETCH_SHARDS, shards[-1] + 1)))
            yield BatchRequest(0, None, refs, prefetch)

    def _add_counters(self, more: StoreCounters) -> None:
        self.counters += more
