"""Loader processes: requests in, batches out, in the order of the requests, by any number of processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from maestro_scale.errors import MaestroError
from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.shards.storage import client_module
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.batch_builder import BatchBuilder, BatchRequest, WorkerResult
from maestro_scale.stream.source import Source

# What schedulers and people send to a whole process group; the training process decides what comes of it.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHUTDOWN_TIMEOUT_S = 2.0
_SHARED_MEMORY = "/dev/shm"


class LoaderError(MaestroError):
    """A loader process died or failed; the message says which, where and why, in one line."""


class _WorkerTraceback(Exception):
    """The traceback of another process, as the cause of the error it led to here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def start_fork_server(sources: Iterable[Source]) -> None:
    """Begin to start the process that loader processes are forked from, unless it runs; does not wait for it.

    What they all need is imported there once, in seconds that the caller may use for something else. Forking the
    training process itself, with its CUDA, gloo and S3 threads, would be unsafe.
    """
    clients = {client_module(s.store.url) for s in sources} - {None}
    with _signals_blocked():
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *sorted(clients)])
        forkserver.ensure_running()


class Pipeline:
    """Batches for a sequence of requests, of at most ``batch_size`` samples each.

    ``workers``: processes; 0 does the work here, when a batch is asked for. ``prefetch_batches``: batches that may
    be result ahead. ``pin``: put them in page-locked memory. ``on_counters`` is told what the stores did for each
    batch. LoaderError if the machine has too little shared memory.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        requests: Iterable[BatchRequest],
        batch_size: int,
        workers: int,
        prefetch_batches: int,
        pin: bool,
        on_counters: Callable[[StoreCounters], None],
    ) -> None:
        self._builder, self._requests, self._pin, self._on_counters = (
            builder,
            iter(requests),
            pin,
            on_counters,
        )
        self._pending: deque[tuple[int, BatchRequest]] = deque()
        self._results: Iterator[WorkerResult] | None = None
        if workers:
            per_worker = max(2, -(-prefetch_batches // workers))
            # One more than may be under way, for the one that is being taken. Few blocks, written again and
            # again: the first touch of fresh memory can cost more than reading and preparing together.
            self._blocks = _shared_blocks(per_worker * workers + 2, builder.num_bytes(batch_size))
            self._results = self._start(workers, per_worker)
            processes = tuple(getattr(self._results, "_workers", ()))
            # Also at exit: multiprocessing would ask the workers to end with a signal that they ignore.
            self._kill = weakref.finalize(self, _kill, processes)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        """The next batch. BadShard and other ShardsErrors as they are; LoaderError for all else."""
        if self._results is None:
            request = next(self._requests)
            block = self._fresh_block(request)
            result = self._builder.try_build(request, block)
        else:
            try:
                result = next(self._results)
            # OSError, EOFError: it died while it handed something on.
            except (RuntimeError, OSError, EOFError) as error:
                raise LoaderError(
                    f"{socket.gethostname()}: a loader process died ({error}); if the machine ran out of "
                    "memory, lower data.workers; the same command resumes"
                ) from error
            slot, request = self._pending.popleft()
            block = self._fresh_block(request)
            block.copy_(self._blocks[slot, : len(block)])
        self._on_counters(result.counters)
        if result.error is None:
            return self._builder.unpack(block, request, result.metadata)
        if result.traceback:
            cause = _WorkerTraceback(result.traceback)
            raise LoaderError(f"{socket.gethostname()}: a batch cannot be result: {result.error}") from cause
        raise result.error

    def close(self) -> None:
        """End the processes, within seconds, whatever they are doing; their work survives that."""
        if self._results is None:
            self._builder.close()
        elif self._kill.alive:
            kill_timer = threading.Timer(_SHUTDOWN_TIMEOUT_S, self._kill)
            kill_timer.start()
            self._results._shutdown_workers()
            kill_timer.cancel()
            self._kill()

    def _start(self, workers: int, per_worker: int) -> Iterator[WorkerResult]:
        start_fork_server(self._builder.settings.sources)
        with _signals_blocked():
            loader = DataLoader(
                _WorkerDataset(self._builder, self._blocks),
                sampler=self._numbered_requests(),
                batch_size=None,
                num_workers=workers,
                collate_fn=_identity,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
                worker_init_fn=functools.partial(_init_worker, dict(os.environ)),
                prefetch_factor=per_worker,
                generator=torch.Generator(),  # it draws a seed for the workers, which nothing here uses
            )
            return iter(loader)

    def _numbered_requests(self) -> Iterator[tuple[int, BatchRequest]]:
        for i, request in enumerate(self._requests):
            self._pending.append((i % len(self._blocks), request))
            yield self._pending[-1]

    def _fresh_block(self, request: BatchRequest) -> Tensor:
        size = self._builder.request_bytes(request)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)


class _WorkerDataset:
    """Where a loader process works: it makes the batches, each in the block that comes with the request."""

    def __init__(self, builder: BatchBuilder, blocks: Tensor) -> None:
        self._builder, self._blocks = builder, blocks

    def __getitem__(self, numbered: tuple[int, BatchRequest]) -> WorkerResult:
        slot, request = numbered
        return self._builder.try_build(request, self._blocks[slot])


def _shared_blocks(count: int, size: int) -> Tensor:
    """(count, size) uint8 in shared memory, multiples of a page so that blocks do not touch."""
    size = -(-size // 4096) * 4096
    if os.path.isdir(_SHARED_MEMORY):
        status = os.statvfs(_SHARED_MEMORY)
        if (free := status.f_bavail * status.f_frsize) < count * size:
            raise LoaderError(
                f"{socket.gethostname()}: {_SHARED_MEMORY} has {free >> 20} MiB left, the loader needs "
                f"{count * size >> 20}; raise it (docker run --shm-size), or lower data.workers or "
                "train.micro_batch"
            )
    return torch.empty(count, size, dtype=torch.uint8).share_memory_()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile have the signals blocked from birth; here they arrive afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        resource_tracker.ensure_running()  # unblocks some of them when it has started its process
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(environment: dict[str, str], worker: int) -> None:
    """Runs first in a worker: the environment of the training process (the fork server has that of its own start), no
    signals, and an eye on the training process, to end with it."""
    os.environ.clear()
    os.environ.update(environment)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True, name="maestro-orphan").start()


def _exit_with_parent() -> None:
    # DataLoader looks at the parent's pid for this, but here the parent is the fork server, which stays as
    # long as there are workers.
    multiprocessing.parent_process().join()
    os._exit(1)


def _kill(processes: tuple[BaseProcess, ...]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _identity(result: WorkerResult) -> WorkerResult:
    return result
