"""Counters of a store: downloads, cache hits, retries, evictions and waiting time, for the metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StoreCounters:
    """Totals of one process since its store was created. ``+`` sums over processes, ``-`` gives an interval."""

    downloaded_bytes: int = 0
    downloads: int = 0
    hits: int = 0  # requests for a shard that was present and verified
    retries: int = 0
    refetches: int = 0  # shards that arrived damaged and were downloaded again
    evictions: int = 0
    wait_s: float = 0.0  # total time in Store.shard(), downloads and verification included

    def __add__(self, other: StoreCounters) -> StoreCounters:
        return StoreCounters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: StoreCounters) -> StoreCounters:
        return StoreCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class CounterTotal:
    """Thread-safe sum of counters. A pickled copy starts at zero, so that no process reports another's work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = StoreCounters()

    def __reduce__(self) -> tuple[type[CounterTotal], tuple[()]]:
        return CounterTotal, ()

    @property
    def total(self) -> StoreCounters:
        """The present totals."""
        return self._total

    def add(self, more: StoreCounters) -> None:
        """Add ``more``."""
        with self._lock:
            self._total = self._total + more

    def add_retry(self) -> None:
        """Count one more attempt at a request."""
        self.add(StoreCounters(retries=1))
