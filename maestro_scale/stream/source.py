"""One dataset of a mixture: its resolved spec and shards (Source), and the shards that a process has open.

A source is handed to every loader process. Its long lists, of shards and of samples, are arrays, which these processes
map or share instead of a copy of their own (``ShardTable``, ``SampleNumbers``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.sensor_sets import without
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.shard_table import ShardInfo, ShardTable
from maestro_scale.shards.read.store import BadShard, Shard, Store

_MAX_OPEN = 128  # each holds a file descriptor


class SampleNumbers(Sequence[Sequence[int]]):
    """Of every shard of a source, the samples in use, by their numbers in the shard.

    Those of shard s are the next ``counts[s]`` of ``numbers`` from ``first[s]`` on; without ``numbers``, the integers
    from ``first[s]`` on.
    """

    def __init__(self, first: np.ndarray, counts: np.ndarray, numbers: np.ndarray | None = None) -> None:
        self._first, self.counts, self._numbers = first, counts, numbers
        self._shared: tuple[Tensor | None, ...] | None = None

    @classmethod
    def of(cls, indices: Sequence[Sequence[int]]) -> SampleNumbers:
        """The given numbers of every shard."""
        if isinstance(indices, SampleNumbers):
            return indices
        counts = np.array([len(numbers) for numbers in indices], np.int64)
        ranges = [numbers for numbers in indices if isinstance(numbers, range) and numbers.step == 1]
        if len(ranges) == len(indices):
            return cls(np.array([numbers.start for numbers in ranges], np.int64), counts)
        numbers = np.fromiter((n for of_shard in indices for n in of_shard), np.int64, int(counts.sum()))
        return cls(np.cumsum(counts) - counts, counts, numbers)

    def at(self, shard: int, index: int) -> int:
        """The number of sample ``index`` of those in use of a shard."""
        number = int(self._first[shard]) + index
        return number if self._numbers is None else int(self._numbers[number])

    def take(self, shards: np.ndarray) -> SampleNumbers:
        """Those of the shards with these numbers, in this order."""
        return SampleNumbers(self._first[shards], self.counts[shards], self._numbers)

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, shard: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, shard: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(shard, slice):
            return [self[s] for s in range(*shard.indices(len(self)))]
        first = int(self._first[shard])
        own = range(first, first + int(self.counts[shard]))
        return own if self._numbers is None else self._numbers[own.start : own.stop].tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        # As tensors, whose memory torch shares with the process that unpickles them. Kept: a process that is started
        # gets the handles only after everything for it is pickled.
        if self._shared is None:
            arrays = (self._first, self.counts, self._numbers)
            self._shared = tuple(None if a is None else torch.from_numpy(a).share_memory_() for a in arrays)
        return _sample_numbers, self._shared


def _sample_numbers(*tensors: Tensor | None) -> SampleNumbers:
    first, counts, numbers = (None if t is None else t.numpy() for t in tensors)
    assert first is not None
    assert counts is not None
    return SampleNumbers(first, counts, numbers)


@dataclass(frozen=True)
class Source:
    """A dataset as a run reads it: ``spec`` with the run's sensors and crop, and ``shards`` of the wanted splits in
    manifest order.

    ``weight``: how often a mixture draws a step from it, relative to the others. ``indices``: of every shard, the
    samples in use; None for all. ``absent``: sensors of ``spec`` that are not read, because tiles lack them.

    Any sequences of shards and of indices can be given; they are kept as a ``ShardTable`` and ``SampleNumbers``.
    """

    spec: DatasetSpec
    shards: Sequence[ShardInfo]
    store: Store
    weight: float = 1.0
    indices: Sequence[Sequence[int]] | None = None
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", ShardTable.of(self.shards))
        if self.indices is not None:
            object.__setattr__(self, "indices", SampleNumbers.of(self.indices))

    @property
    def table(self) -> ShardTable:
        """``shards``, by columns."""
        return cast(ShardTable, self.shards)

    @property
    def numbers(self) -> SampleNumbers | None:
        """``indices``, by columns."""
        return cast("SampleNumbers | None", self.indices)

    @property
    def name(self) -> str:
        """The dataset's name, and the sensors that are not read."""
        return without(self.spec.name, self.absent)

    @property
    def counts(self) -> np.ndarray:
        """(shards,) int64: samples in use per shard."""
        return self.table.samples if self.numbers is None else self.numbers.counts

    def select_samples(self, samples: Sequence[int] | np.ndarray) -> Source:
        """The same source with only these samples, given by their numbers in the order of the manifest.

        ValueError if samples were selected before: the numbers would be ambiguous.
        """
        if self.indices is not None:
            raise ValueError(f"{self.spec.name}: samples were selected already")
        stops = np.cumsum(self.counts)
        ordered = np.sort(np.asarray(samples, np.int64))
        shards = np.searchsorted(stops, ordered, side="right")
        inside = ordered - (stops - self.counts)[shards]
        used, first, counts = np.unique(shards, return_index=True, return_counts=True)
        return replace(self, shards=self.table.take(used), indices=SampleNumbers(first, counts, inside))


def mixture_names(names: Sequence[str]) -> tuple[str, ...]:
    """A name for each dataset of a mixture: its own, followed by its index where two have the same (``s2_naip#1``)."""
    return tuple(n if names.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(names))


class OpenShards:
    """The shards of a source that this process has open; the least recently used is closed first.

    ``most_bytes``: limit of what open shards pin in the store's cache. A bad shard is remembered and not fetched again:
    each try would download it twice.
    """

    def __init__(self, source: Source, most_bytes: int) -> None:
        self.source = source
        self._most_bytes = most_bytes
        self._starts = np.concatenate([[0], np.cumsum(source.counts)])
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._bad: dict[int, BadShard] = {}

    def sample(self, shard: int, index: int) -> Sample:
        """A stored sample. BadShard, naming the shard, if it is not what the manifest says; StoreError."""
        if shard in self._bad:
            raise self._bad[shard]
        try:
            handle = self._open[shard] if shard in self._open else self._open_shard(self.source.shards[shard])
            numbers = self.source.numbers
            sample = handle[index if numbers is None else numbers.at(shard, index)]
        except BadShard as error:
            self._bad[shard] = error
            self._open.pop(shard, None)
            raise
        self._open[shard] = handle
        self._open.move_to_end(shard)
        if len(self._open) > _MAX_OPEN:
            self._close_oldest()
        return sample

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, index within the shard) of sample ``number`` of the dataset."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    @property
    def num_samples(self) -> int:
        """Samples in use of the dataset."""
        return int(self._starts[-1])

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, in this order."""
        self.source.store.prefetch([self.source.shards[s] for s in shards if s not in self._bad])

    def close(self) -> None:
        """Close every shard and stop prefetching."""
        while self._open:
            self._close_oldest()
        self.source.store.close()

    def _open_shard(self, info: ShardInfo) -> Shard:
        # Close old shards before the new one is fetched: the store may need the space that they pin in the cache.
        while self._open and self._pinned_bytes() + info.bytes > self._most_bytes:
            self._close_oldest()
        return self.source.store.shard(info)

    def _pinned_bytes(self) -> int:
        return sum(self.source.shards[s].bytes for s in self._open)

    def _close_oldest(self) -> None:
        _, handle = self._open.popitem(last=False)
        handle.close()
