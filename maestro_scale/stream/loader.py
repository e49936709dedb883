"""The training loader: a rank's part of every global batch, in micro-batches, from any position of the run."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from maestro_scale.datasets.sensor_sets import without
from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.batch_builder import (
    MAX_RANKS_PER_NODE,
    BatchBuilder,
    BatchRequest,
    BuilderSettings,
    SampleRef,
)
from maestro_scale.stream.dates import FirstDate
from maestro_scale.stream.mixture import NestedMixture
from maestro_scale.stream.plan import SampleOrder, SampleOrderError
from maestro_scale.stream.rng import seed_without
from maestro_scale.stream.sensor_sets import divide
from maestro_scale.stream.source import Source, mixture_names
from maestro_scale.stream.workers import LoaderError, Pipeline, start_fork_server

__all__ = ["LoaderError", "Source", "Step", "TrainLoader"]

log = logging.getLogger(__name__)

_KEY = re.compile(r"(?P<epoch>\d+)/(?P<name>.+)/(?P<number>\d+)(~(?P<substitute>\d+)(@(?P<source>[^/@]+))?)?")
_MAX_PREFETCH_SHARDS = 256  # shards named in one request


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step on this rank. ``step``: counted from 1; ``epoch``: of the run, from 0.

    ``samples``: consumed by all ranks after the step, the position that checkpoints save. ``dataset``: name of the
    dataset whose samples the step uses; ``dataset_step``: number of steps that used it so far, including this one.
    ``counters``: ``TrainLoader.counters`` of the steps up to this one; the loader may be further ahead.
    """

    step: int
    epoch: int
    samples: int
    dataset: str
    dataset_step: int
    batches: tuple[Batch, ...]
    counters: Mapping[str, float]


class TrainLoader:
    """The training data of a run on one rank.

    ``lanes``, ``global_batch``, ``window`` and ``seed`` fix the order, see :mod:`maestro_scale.stream.plan`;
    ``rank`` of ``world``, ``workers`` and ``micro_batch`` do not change the samples of a step. A step uses one
    source, chosen by weight, so that all ranks run the same sensors and shapes. With several sources an epoch has
    as many steps as their epochs together. SampleOrderError or ValueError (one line) for numbers that do not fit.

    A source of which some tiles lack sensors is divided by the sensors that the tiles have (``sensor_sets.divide``).
    In each epoch of the source every part has exactly its own steps, evenly spread. ``sources``: after the division, by
    name (``flair_hub``, ``flair_hub~s1_asc``).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        lanes: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        window: int = 4096,
        flips: bool = True,
        on_bad_shard: Literal["fail", "replace"] = "fail",
        pin: bool = False,
        first_date: FirstDate = "any",
    ) -> None:
        self.rank, self.world, self.workers = rank, world, workers
        self.global_batch, self.micro_batch, self.pin = global_batch, micro_batch, pin
        entry_names = mixture_names([s.spec.name for s in sources])
        parts = [_divided(s, name, global_batch, rank) for s, name in zip(sources, entry_names, strict=True)]
        entries = tuple(i for i, of_entry in enumerate(parts) for _ in of_entry)
        divided = tuple(s for of_entry in parts for s in of_entry)
        names = tuple(without(entry_names[i], s.absent) for i, s in zip(entries, divided, strict=True))
        self.sources = dict(zip(names, divided, strict=True))
        self._names = names
        self._orders = [
            SampleOrder(s.counts, seed_without(seed, s.absent), lanes, global_batch, window, dataset=i)
            for i, s in zip(entries, divided, strict=True)
        ]
        steps = [
            [o.steps_per_epoch for i, o in zip(entries, self._orders, strict=True) if i == e]
            for e in range(len(parts))
        ]
        self._mixture = NestedMixture([s.weight for s in sources], steps)
        self._orders[0].lanes_of(rank, world)  # raises unless the ranks divide the lanes
        local = global_batch // world
        if micro_batch < 1 or local % micro_batch:
            raise SampleOrderError(
                f"micro_batch {micro_batch} does not divide the {local} samples of a rank per step"
            )
        self._settings = BuilderSettings(
            divided,
            seed,
            flips,
            on_bad_shard == "replace",
            max(workers, 1) * min(world, MAX_RANKS_PER_NODE),
            first_date,
            entries,
            names,
        )
        BatchBuilder(self._settings)  # raises here what would otherwise be raised in a worker
        if workers:
            start_fork_server(divided)
        self._pipelines: list[Pipeline] = []
        self._first_shards: list[_FirstShards] = []
        self._store_counters, self._num_repeated_dates, self._num_replaced_samples = StoreCounters(), 0, 0
        for name, order in zip(self._names, self._orders, strict=True):
            if order.num_copies > 1 and rank == 0:
                log.warning(
                    "%s has %d samples, fewer than the global batch %d: each is used up to %d times per step",
                    *(name, order.num_samples, global_batch, order.num_copies),
                )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, summed over the datasets of the mixture."""
        return sum(p.steps_per_epoch for p in self._orders)

    @property
    def counters(self) -> dict[str, float]:
        """Totals of this rank since its start: ``filled`` dates, ``replaced`` samples, and the counters of its stores.

        The keys are metric names (``data/filled``, …).
        """
        return {
            "filled": self._num_repeated_dates,
            "replaced": self._num_replaced_samples,
            **dataclasses.asdict(self._store_counters),
        }

    def steps(self, start_samples: int, num_steps: int) -> Iterator[Step]:
        """The steps after ``start_samples`` consumed samples, up to and including step ``num_steps`` of the run.

        Nothing is replayed: the order is a pure function of the step. ValueError if the position is not a whole
        number of steps. The iterator raises BadShard, StoreError or LoaderError.
        """
        start, rest = divmod(start_samples, self.global_batch)
        if rest or start < 0:
            raise ValueError(
                f"{start_samples} samples are not a whole number of steps of {self.global_batch}: the global "
                "batch of a run cannot change"
            )
        return self._steps(start, num_steps)

    def replay(self, keys: Sequence[str]) -> Batch:
        """The batch of the samples with these keys (of one dataset and epoch), from the keys alone."""
        refs, origins = [], set()
        for key in keys:
            match = _KEY.fullmatch(key)
            dataset = self._index_of(match["name"] if match else "", key)
            assert match is not None
            number = int(match["number"])
            origins.add((dataset, int(match["epoch"])))
            source = None if match["source"] is None else self._index_of(match["source"], key)
            order = self._orders[dataset if source is None else source]
            shard, index = order.locate(int(match["substitute"] or number))
            refs.append(SampleRef(number, int(shard), int(index), source=source))
        if len(origins) != 1:
            raise ValueError("the keys of a batch must be of one dataset and one epoch")
        requests = [BatchRequest(*origins.pop(), tuple(refs))]
        pipeline = Pipeline(
            BatchBuilder(self._settings), requests, len(refs), 0, 0, False, self._add_counters
        )
        try:
            # With the keys given: those of the batch lack "~substitute", as the substitute was read directly.
            return dataclasses.replace(next(pipeline), keys=tuple(keys))
        finally:
            pipeline.close()

    def _index_of(self, name: str, key: str) -> int:
        if name not in self._names:
            raise ValueError(f"{key!r} is not a key of a sample of {', '.join(self._names)}")
        return self._names.index(name)

    def close(self) -> None:
        """End the loader processes, and with them the iterators in use."""
        self._end_first_shards()
        while self._pipelines:
            self._pipelines.pop().close()

    def _end_first_shards(self) -> None:
        while self._first_shards:
            self._store_counters += self._first_shards.pop().end()

    def _steps(self, start: int, num_steps: int) -> Iterator[Step]:
        per_step = self.global_batch // self.world // self.micro_batch
        requests = self._requests(start, num_steps)
        # Also when the consumer stops early, or the pipeline cannot start.
        with ExitStack() as stack:
            stack.callback(self._end_first_shards)
            if self.workers and (first := next(self._requests(start, num_steps), None)):
                self._first_shards.append(_FirstShards(self._settings.sources[first.dataset], first))
            pipeline = Pipeline(
                BatchBuilder(self._settings),
                requests,
                batch_size=self.micro_batch,
                workers=self.workers,
                # The next step's batches are built while this step is computed, plus one per worker that is busy.
                prefetch_batches=per_step + self.workers,
                pin=self.pin,
                on_counters=self._add_counters,
            )
            self._pipelines.append(pipeline)
            stack.callback(self._end_pipeline, pipeline)
            for step in range(start, num_steps):
                dataset, dataset_step = self._mixture.at(step)
                batches = tuple(next(pipeline) for _ in range(per_step))
                self._end_first_shards()
                self._num_repeated_dates += sum(b.num_repeated_dates for b in batches)
                self._count_replaced(sum(b.num_replaced_samples for b in batches), step + 1)
                yield Step(
                    step=step + 1,
                    epoch=step // self.steps_per_epoch,
                    samples=(step + 1) * self.global_batch,
                    dataset=self._names[dataset],
                    dataset_step=dataset_step + 1,
                    batches=batches,
                    counters=self.counters,
                )

    def _end_pipeline(self, pipeline: Pipeline) -> None:
        if pipeline in self._pipelines:  # otherwise close() has ended it already
            self._pipelines.remove(pipeline)
            pipeline.close()

    def _requests(self, start: int, num_steps: int) -> Iterator[BatchRequest]:
        lookaheads: dict[int, _Lookahead] = {}
        for step in range(start, num_steps):
            dataset, dataset_step = self._mixture.at(step)
            order = self._orders[dataset]
            if dataset not in lookaheads:
                lookaheads[dataset] = _Lookahead(
                    order, self.rank, self.world, dataset_step, max(self.workers, 1)
                )
            # Epochs of a dataset count its own steps: each sample comes once per epoch whatever the mixture's weights.
            epoch, within = divmod(dataset_step, order.steps_per_epoch)
            ids = order.at(epoch, within, self.rank, self.world)
            refs = [
                SampleRef(*ref)
                for ref in zip(ids.tolist(), *(a.tolist() for a in order.locate(ids)), strict=True)
            ]
            for first in range(0, len(refs), self.micro_batch):
                prefetch = lookaheads[dataset].next_share(dataset_step)
                yield BatchRequest(dataset, epoch, tuple(refs[first : first + self.micro_batch]), prefetch)

    def _add_counters(self, more: StoreCounters) -> None:
        self._store_counters += more

    def _count_replaced(self, count: int, step: int) -> None:
        if count and not self._num_replaced_samples:
            log.warning("step %d: samples of a bad shard are replaced; see the counter 'replaced'", step)
        self._num_replaced_samples += count


def _divided(source: Source, name: str, global_batch: int, rank: int) -> tuple[Source, ...]:
    """The parts of a source by the sensors that its tiles have."""
    try:
        division = divide(source, global_batch)
    except SampleOrderError as error:
        raise SampleOrderError(f"{name}: {error}") from None
    for line in division.lines if rank == 0 else ():
        log.warning("%s: %s", name, line)
    return division.sources


class _FirstShards:
    """Fetches the shards of the first batch in this process while the loader processes start, which takes seconds."""

    def __init__(self, source: Source, request: BatchRequest) -> None:
        self._store = copy.copy(source.store)  # with counters and connections of its own
        shards = dict.fromkeys(ref.shard for ref in request.refs)
        self._store.prefetch([source.shards[s] for s in shards])

    def end(self) -> StoreCounters:
        """Stop, and what was read."""
        self._store.close()
        return self._store.counters


class _Lookahead:
    """The shards that a rank needs soon, distributed over its workers: each request carries a share to download.

    DataLoader gives consecutive requests to different workers, so a shard is downloaded by one of them only.
    """

    def __init__(self, order: SampleOrder, rank: int, world: int, dataset_step: int, workers: int) -> None:
        self._order, self._rank, self._world, self._workers = order, rank, world, workers
        # The lanes of a rank enter their windows one after the other, this many steps apart on average. Looking that
        # far ahead names the shards of about one window in advance.
        num_lanes = len(order.lanes_of(rank, world))
        self._reach = min(max(8, -(-order.window // order.per_lane // num_lanes)), order.steps_per_epoch)
        self._entries = self._upcoming(dataset_step)
        self._next = next(self._entries)
        self._listed: list[tuple[int, int]] = []  # (dataset_step, shard)
        self._shares: list[tuple[int, ...]] = []

    def next_share(self, dataset_step: int) -> tuple[int, ...]:
        """Shards to download, in the order of need; empty if no new one is needed within reach."""
        if not self._shares and self._next[0] <= dataset_step + self._reach:
            # Shards of windows that were entered before are in use by now; they were listed in time.
            self._listed = [(t, s) for t, s in self._listed if t > dataset_step]
            known = len(self._listed)
            while self._next[0] <= dataset_step + self._reach and len(self._listed) < _MAX_PREFETCH_SHARDS:
                self._listed.append(self._next)
                self._next = next(self._entries)
            if len(self._listed) > known:
                shards = list(dict.fromkeys(s for _, s in self._listed))
                self._shares = [tuple(shards[i :: self._workers]) for i in range(self._workers)]
        return self._shares.pop(0) if self._shares else ()

    def _upcoming(self, dataset_step: int) -> Iterator[tuple[int, int]]:
        epoch, step = divmod(dataset_step, self._order.steps_per_epoch)
        while True:
            before = epoch * self._order.steps_per_epoch
            for enters, shard in self._order.upcoming_shards(epoch, step, self._rank, self._world):
                yield before + enters, shard
            epoch, step = epoch + 1, 0
