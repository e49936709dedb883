"""One dataset of a mixture: its resolved spec and shards (Source), and the shards that a process has open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from maestro_scale.datasets.sensor_sets import without
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.read.store import BadShard, Shard, Store

_MAX_OPEN = 128  # each holds a file descriptor


@dataclass(frozen=True)
class Source:
    """A dataset as a run reads it: ``spec`` with the run's sensors and crop, and ``shards`` of the wanted splits in
    manifest order.

    ``weight``: how often a mixture draws a step from it, relative to the others. ``indices``: of every shard, the
    samples in use; None for all. ``absent``: sensors of ``spec`` that are not read, because tiles lack them.
    """

    spec: DatasetSpec
    shards: tuple[ShardInfo, ...]
    store: Store
    weight: float = 1.0
    indices: tuple[Sequence[int], ...] | None = None
    absent: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The dataset's name, and the sensors that are not read."""
        return without(self.spec.name, self.absent)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples in use per shard."""
        if self.indices is not None:
            return tuple(map(len, self.indices))
        return tuple(s.samples for s in self.shards)

    def select_samples(self, samples: Sequence[int] | np.ndarray) -> Source:
        """The same source with only these samples, given by their numbers in the order of the manifest.

        ValueError if samples were selected before: the numbers would be ambiguous.
        """
        if self.indices is not None:
            raise ValueError(f"{self.spec.name}: samples were selected already")
        stops = np.cumsum([s.samples for s in self.shards])
        shards = np.searchsorted(stops, np.sort(samples), side="right")
        inside = np.sort(samples) - (stops - [s.samples for s in self.shards])[shards]
        used = np.unique(shards)
        return replace(
            self,
            shards=tuple(self.shards[s] for s in used),
            indices=tuple(tuple(inside[shards == s].tolist()) for s in used),
        )


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
        self._starts = np.cumsum((0, *source.counts))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._bad: dict[int, BadShard] = {}

    def sample(self, shard: int, index: int) -> Sample:
        """A stored sample. BadShard, naming the shard, if it is not what the manifest says; StoreError."""
        if shard in self._bad:
            raise self._bad[shard]
        info = self.source.shards[shard]
        try:
            handle = self._open[shard] if shard in self._open else self._open_shard(info)
            indices = self.source.indices
            sample = handle[index if indices is None else indices[shard][index]]
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
