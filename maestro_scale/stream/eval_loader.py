"""The evaluation loader: every sample exactly once over all ranks, without randomness, padding or dropping."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

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
from maestro_scale.stream.sensor_sets import readable, runs
from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import Pipeline

_PREFETCH_SHARDS = 4  # shards downloaded before they are needed


class _Batch(NamedTuple):
    """The items [start, stop) of all ranks; ``source``: number of the set of sensors that their tiles have."""

    source: int
    start: int
    stop: int


class EvalLoader:
    """One pass over a source per iteration, in the order of the manifest, in batches of at most
    ``batch_size``.

    The batches do not depend on the number of ranks, so one rank and eight compute the same floating-point values.
    Each rank has consecutive batches, and ranks differ by at most one batch: sum counts over ranks at the end, and
    call no collective operation per batch. A tile larger than the crop yields all its crops, row by row
    (``num_crops`` per sample); ``crops=1`` only the first.

    Tiles that lack sensors come in their place in the order, in batches of their own (``sensor_sets.runs``), whose
    ``dataset`` names what they lack. SampleOrderError for tiles that have none of the sensors.
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
        if num_unreadable := readable(source)[1]:
            raise SampleOrderError(
                f"{source.spec.name}: {num_unreadable} tiles have none of the sensors "
                f"{', '.join(s.name for s in source.spec.sensors)}, and every tile is scored: choose other sensors, or "
                "store a split without these tiles"
            )
        of_runs = list(runs(source)) or [((), 0)]
        # In the order of their first run. A source of complete tiles is itself the only one.
        self._absent = list(dict.fromkeys(absent for absent, _ in of_runs))
        sources = [
            source if not a else replace(source, absent=a, store=copy.copy(source.store))
            for a in self._absent
        ]
        self._settings = BuilderSettings(
            tuple(sources),
            num_processes=max(workers, 1) * min(world, MAX_RANKS_PER_NODE),
            entries=(0,) * len(sources),
            names=tuple(s.name for s in sources),
        )
        available = BatchBuilder(self._settings).transform(0).grid.num_crops
        self.num_crops = available if crops is None else min(crops, available)
        self.num_samples = int(source.counts.sum())
        batches = list(self._batches(of_runs))
        # Ranks split whole batches, not samples: the composition of a batch, and so every rounding in it, is the same
        # on any number of ranks. Rounded up, so that rank 0 has a batch whenever there is one.
        first, stop = (-(-r * len(batches) // world) for r in (rank, rank + 1))
        self._own = batches[first:stop]
        total = self.num_samples * self.num_crops
        self._items = range(
            batches[first].start if first < len(batches) else total,
            batches[stop].start if stop < len(batches) else total,
        )
        self._starts = np.concatenate([[0], np.cumsum(source.counts)])
        self.counters = StoreCounters()

    def _batches(self, of_runs: Iterable[tuple[tuple[str, ...], int]]) -> Iterator[_Batch]:
        """The batches of all ranks; none contains items of two runs."""
        first = 0
        for absent, num_samples in of_runs:
            end = first + num_samples * self.num_crops
            number = self._absent.index(absent)
            for start in range(first, end, self.batch_size):
                yield _Batch(number, start, min(start + self.batch_size, end))
            first = end

    @property
    def items(self) -> np.ndarray:
        """(n, 2) int64: sample number (in manifest order) and crop of every item of this rank."""
        return np.stack(np.divmod(np.asarray(self._items, np.int64), self.num_crops), axis=1)

    @property
    def first_row(self) -> int:
        """Index of this rank's first item among those of all ranks."""
        return self._items.start

    def absent_of_items(self) -> np.ndarray | None:
        """(num_samples · num_crops,) text: of the items of all ranks, the sensors that their tiles lack, joined by
        ``+``; None: every tile has all."""
        of_runs = [("+".join(absent), num_samples) for absent, num_samples in runs(self.source)]
        if not any(absent for absent, _ in of_runs):
            return None
        counts = [num_samples * self.num_crops for _, num_samples in of_runs]
        return np.repeat(np.array([absent for absent, _ in of_runs]), counts)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self._own)

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
        for batch in self._own:
            first, stop = batch.start - self.first_row, batch.stop - self.first_row
            refs = tuple(
                SampleRef(int(n), int(s), int(n - self._starts[s]), int(c))
                for (n, c), s in zip(items[first:stop], shards[first:stop], strict=True)
            )
            prefetch: tuple[int, ...] = ()
            if shards[first] != last_shard:
                last_shard = shards[first]
                prefetch = tuple(range(last_shard, min(last_shard + _PREFETCH_SHARDS, shards[-1] + 1)))
            yield BatchRequest(batch.source, None, refs, prefetch)

    def _add_counters(self, more: StoreCounters) -> None:
        self.counters += more
