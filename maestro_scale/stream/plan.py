"""The order of samples: pure functions of (manifest, seed, epoch, step), without I/O or state.

An epoch of a dataset of N samples is built in four steps:

1. The shards in random order and the samples of each shard in random order give one sequence.
2. The first ``steps_per_epoch`` · ``global_batch`` samples of it are cut into ``lanes`` equal contiguous *lanes*.
   The rest (fewer than a global batch) is left out; it is another one every epoch.
3. Each lane is shuffled within consecutive *windows*, so that neighbouring samples come from different shards, but
   only the shards of one window are needed at a time.
4. The global batch of a step takes the next ``global_batch / lanes`` samples of every lane. Rank r of R owns the
   lanes r, r + R, ….

Lanes, not ranks, define the order: another number of ranks distributes the same lanes differently, and the global
batches stay the same (invariant 2). As a lane is contiguous in the sequence of shards, a node downloads only the
shards of its lanes. Any step is computed directly, so that a resume costs no replay (invariant 3).

A dataset smaller than a global batch is repeated as virtual copies: sample ``copy · N + i`` is sample i again.
Existing runs depend on every detail here: changing the order changes what a resumed run trains on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np

from maestro_scale.errors import MaestroError
from maestro_scale.stream.rng import CounterRNG, Purpose

_SHARDS, _WITHIN, _WINDOW = range(3)  # random streams of an epoch; part of the order, never renumber


class SampleOrderError(MaestroError, ValueError):
    """No sample order exists for these numbers; the message names them and what to change."""


class SampleOrder:
    """The order of one dataset's samples.

    ``counts``: samples per shard, in manifest order; an array too. ``dataset``: its index in the mixture. ``window``:
    samples of a lane that are shuffled together. SampleOrderError unless lanes divide the global batch and there are
    samples.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        seed: int,
        lanes: int,
        global_batch: int,
        window: int,
        dataset: int = 0,
    ) -> None:
        if lanes < 1 or global_batch < 1 or global_batch % lanes:
            raise SampleOrderError(
                f"lanes {lanes} do not divide the global batch {global_batch}; change one of them"
            )
        if window < 1:
            raise SampleOrderError(f"the shuffle window is {window} samples; at least 1 is needed")
        self.num_samples = int(np.sum(counts))
        if self.num_samples < 1:
            raise SampleOrderError("the dataset holds no samples")
        self.lanes, self.global_batch, self.window = lanes, global_batch, window
        self.per_lane = global_batch // lanes  # samples of a lane in one global batch
        # As few copies as one global batch needs: more would only lengthen the epoch.
        self.num_copies = -(-global_batch // self.num_samples)
        self.steps_per_epoch = self.num_samples * self.num_copies // global_batch
        # Every copy of a shard is a *slot* with a permutation of its own, so that copies are not in the same order.
        self._counts = np.tile(np.asarray(counts, np.int64), self.num_copies)
        self._starts = np.cumsum(self._counts) - self._counts
        self._rng = CounterRNG(seed, Purpose.ORDER, dataset)
        # Two epochs: prefetching reaches into the next one while this one is served.
        self._shard_order = lru_cache(maxsize=2)(self._compute_shard_order)
        self._within = lru_cache(maxsize=64)(self._compute_within)
        # All lanes advance together: around a window boundary a step needs two windows of a lane.
        self._window_ids = lru_cache(maxsize=2 * lanes)(self._compute_window_ids)

    @property
    def lane_length(self) -> int:
        """Samples of one lane in an epoch."""
        return self.steps_per_epoch * self.per_lane

    def at(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """(global_batch / world,) int64 virtual sample ids: a rank's part of a global batch, lane by lane.

        ``step``: within the epoch, from 0; IndexError outside of it. SampleOrderError unless world divides the lanes.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        start = step * self.per_lane
        return np.concatenate([self._lane(epoch, n, start) for n in self.lanes_of(rank, world)])

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes of a rank: rank, rank + world, …"""
        if world < 1 or self.lanes % world:
            raise SampleOrderError(f"{world} ranks do not divide {self.lanes} lanes")
        if not 0 <= rank < world:
            raise SampleOrderError(f"rank {rank} of {world} ranks")
        return range(rank, self.lanes, world)

    def locate(self, samples: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(shards, indices in the shards) of virtual sample ids; shards are numbered in manifest order."""
        samples = np.asarray(samples) % self.num_samples
        # side="right": empty shards share their start with the next shard; this finds the one that has samples.
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        return shards, samples - self._starts[shards]

    def upcoming_shards(self, epoch: int, step: int, rank: int, world: int) -> Iterator[tuple[int, int]]:
        """(step in the epoch, shard) of every window that the lanes of a rank enter, in order of these steps.

        Starts with the windows in use at ``step`` (listed under ``step``) and ends with the epoch. A shard is listed
        once for every step at which a window enters that needs it; shards of one step in order of first use.
        """
        entries = []
        for lane in self.lanes_of(rank, world):
            first = self._window_of(lane, step * self.per_lane)
            last = self._window_of(lane, self.lane_length - 1)
            for window in range(first, last + 1):
                position = max(self._bounds(lane, window)[0], step * self.per_lane)
                entries.append((position // self.per_lane, lane, window, position))
        entries.sort()
        for enters, group in groupby(entries, key=lambda entry: entry[0]):
            uses = [use for _, *start in group for use in self._first_uses(epoch, *start)]
            yield from ((enters, shard) for shard in dict.fromkeys(shard for _, shard in sorted(uses)))

    def _first_uses(self, epoch: int, lane: int, window: int, position: int) -> list[tuple[int, int]]:
        """(step, shard) of the first use of every shard of a window at or after ``position`` of the lane."""
        ids = self._window_ids(epoch, lane, window)[position - self._bounds(lane, window)[0] :]
        shards, first = np.unique(self.locate(ids)[0], return_index=True)
        return list(zip(((position + first) // self.per_lane).tolist(), shards.tolist(), strict=True))

    def _lane(self, epoch: int, lane: int, start: int) -> np.ndarray:
        stop = start + self.per_lane
        parts = []
        while start < stop:
            window = self._window_of(lane, start)
            first, last = self._bounds(lane, window)
            parts.append(self._window_ids(epoch, lane, window)[start - first : stop - first])
            start = last
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window_of(self, lane: int, position: int) -> int:
        # Windows of different lanes start at different steps, which spreads the downloads over time.
        return (position + lane * self.window // self.lanes) // self.window

    def _bounds(self, lane: int, window: int) -> tuple[int, int]:
        start = window * self.window - lane * self.window // self.lanes
        return max(start, 0), min(start + self.window, self.lane_length)

    def _compute_window_ids(self, epoch: int, lane: int, window: int) -> np.ndarray:
        start, stop = self._bounds(lane, window)
        parts = []
        for slot, first, last in self._slices(epoch, lane, start, stop):
            parts.append(self._starts[slot] + self._within(epoch, slot)[first:last])
        ids = np.concatenate(parts)
        # The lane is in the high half of the word, apart from the stream number: no two streams share numbers.
        return ids[self._rng.seek(epoch, _WINDOW + (lane << 32), window).permutation(len(ids))]

    def _slices(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard slot, first, last) of the parts of shards that lane positions [start, stop) consist of."""
        order, ends = self._shard_order(epoch)
        start, stop = start + lane * self.lane_length, stop + lane * self.lane_length
        position_in_order = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            end = int(ends[position_in_order])
            slot = int(order[position_in_order])
            begin = end - int(self._counts[slot])
            if end > start:
                yield slot, start - begin, min(stop, end) - begin
                start = end
            position_in_order += 1

    def _compute_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._rng.seek(epoch, _SHARDS).permutation(len(self._counts))
        return order, np.cumsum(self._counts[order])

    def _compute_within(self, epoch: int, slot: int) -> np.ndarray:
        return self._rng.seek(epoch, _WITHIN, slot).permutation(int(self._counts[slot]))
