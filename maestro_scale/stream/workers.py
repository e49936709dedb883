"""Loader processes: batches in the order of the requests, whatever the number of processes.

DataLoader contributes the processes and the order of results; pixels bypass its queues. Each request comes with the
number of a block in shared memory, in which the worker builds the batch, and from which the training process copies
it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maestro_scale.errors import MaestroError
from maestro_scale.launcher_death import exit_with_parent
from maestro_scale.main_guard import check_main_guard
from maestro_scale.shards.read.counters import StoreCounters
from maestro_scale.shards.storage import client_module
from maestro_scale.shards.temporary import use_for_multiprocessing
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.batch_builder import BatchBuilder, BatchRequest, WorkerResult
from maestro_scale.stream.semaphores import owned_semaphores, start_tracker
from maestro_scale.stream.source import Source

# Schedulers and terminals signal the whole process group; only the training process reacts, and stops its workers.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHUTDOWN_TIMEOUT_S = 2.0
_SHARED_MEMORY = "/dev/shm"


class LoaderError(MaestroError):
    """A loader process died or failed; the message is one line: host, cause, and what to do."""


class _WorkerTraceback(Exception):
    """The traceback of a worker, shown as the cause of the error raised in the training process."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def start_fork_server(sources: Iterable[Source]) -> None:
    """Start the fork server, the process that loader processes are forked from, unless it runs; does not wait.

    It imports the modules that all workers need once, which takes seconds, while the caller continues. The training
    process itself cannot be forked: locks held by its CUDA, gloo and S3 threads would never be released in the child.
    LoaderError, or MainGuardError, if it cannot be started.
    """
    check_main_guard("workers=0")
    clients = {module for s in sources if (module := client_module(s.store.url)) is not None}
    with _signals_blocked():
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *sorted(clients)])
        use_for_multiprocessing()
        try:
            forkserver.ensure_running()
        except OSError as error:
            # Its socket lies in the temporary folder; Linux limits the path of a socket to 107 bytes.
            raise LoaderError(
                f"{socket.gethostname()}: loader processes cannot be started from {tempfile.gettempdir()} ({error}): "
                "set TMPDIR to a writable folder with a path of at most 70 characters, e.g. TMPDIR=/tmp"
            ) from error


class Pipeline:
    """Batches for a sequence of requests, of at most ``batch_size`` samples each.

    ``workers``: processes; 0 builds each batch here, when it is asked for. ``prefetch_batches``: batches that are
    built in advance. ``pin``: batches are in page-locked memory. ``on_counters``: called with the stores' counters
    of each batch. LoaderError if the machine has too little shared memory.
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
        self._builder, self._requests = builder, iter(requests)
        self._pin, self._on_counters = pin, on_counters
        self._pending: deque[tuple[int, BatchRequest]] = deque()
        self._results: Any = None  # DataLoader's iterator, of which close() needs private methods
        if workers:
            per_worker = max(2, -(-prefetch_batches // workers))
            # DataLoader keeps per_worker * workers requests in flight; the others are the block that is being copied
            # out and a spare. The blocks are reused: the first touch of fresh memory can cost more than reading and
            # transforming the samples.
            self._blocks = _shared_blocks(per_worker * workers + 2, builder.num_bytes(batch_size))
            self._results = self._start(workers, per_worker)
            processes = tuple(getattr(self._results, "_workers", ()))
            # Also at interpreter exit, where multiprocessing would send SIGTERM, which the workers ignore.
            self._kill = weakref.finalize(self, _kill, processes)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises the ShardsError of a worker (BadShard, StoreError), LoaderError for any other."""
        if self._results is None:
            request = next(self._requests)
            block = self._fresh_block(request)
            result = self._builder.try_build(request, block)
        else:
            try:
                result = next(self._results)
            # OSError, EOFError: it died while it sent a result.
            except (RuntimeError, OSError, EOFError) as error:
                raise LoaderError(
                    f"{socket.gethostname()}: a loader process died ({error}); if the machine ran out of "
                    "memory, lower data.workers; the same command resumes"
                ) from error
            slot, request = self._pending.popleft()
            # A copy, because the block is reused; into pinned memory, so that the copy to the GPU is asynchronous. A
            # fresh block per batch costs no system call: torch keeps freed pinned blocks, and does not hand one out
            # before the copies from it are done.
            block = self._fresh_block(request)
            block.copy_(self._blocks[slot, : len(block)])
        self._on_counters(result.counters)
        if result.error is None:
            assert result.metadata is not None  # a result has one of the two
            return self._builder.unpack(block, request, result.metadata)
        if result.traceback:
            cause = _WorkerTraceback(result.traceback)
            raise LoaderError(f"{socket.gethostname()}: a batch cannot be built: {result.error}") from cause
        raise result.error

    def close(self) -> None:
        """End the processes within seconds, whatever they are doing.

        Killing them is safe: a download is renamed into the cache only when it is complete.
        """
        if self._results is None:
            self._builder.close()
        elif self._kill.alive:
            # _shutdown_workers waits for each worker, which may hang in a download: the timer kills them meanwhile.
            kill_timer = threading.Timer(_SHUTDOWN_TIMEOUT_S, self._kill)
            kill_timer.start()
            self._results._shutdown_workers()
            kill_timer.cancel()
            self._kill()

    def _start(self, workers: int, per_worker: int) -> Any:
        start_fork_server(self._builder.settings.sources)
        with _signals_blocked(), owned_semaphores(), warnings.catch_warnings():
            # Of more workers than cores: it does not name data.workers, which a recipe gives for any machine.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[WorkerResult] = DataLoader(
                _WorkerDataset(self._builder, self._blocks),
                sampler=self._numbered_requests(),
                batch_size=None,  # a request is a batch already
                num_workers=workers,
                collate_fn=_identity,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
                worker_init_fn=functools.partial(_init_worker, dict(os.environ)),
                prefetch_factor=per_worker,
                # DataLoader draws a seed for its workers, which nothing uses; from here, not from the global generator.
                generator=torch.Generator(),
            )
            return iter(loader)

    def _numbered_requests(self) -> Iterator[tuple[int, BatchRequest]]:
        for i, request in enumerate(self._requests):
            self._pending.append((i % len(self._blocks), request))
            yield self._pending[-1]

    def _fresh_block(self, request: BatchRequest) -> Tensor:
        size = self._builder.request_bytes(request)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)


class _WorkerDataset(Dataset[WorkerResult]):
    """A DataLoader's view of the batches: index (block, request) → result, the batch itself written into the block."""

    def __init__(self, builder: BatchBuilder, blocks: Tensor) -> None:
        self._builder, self._blocks = builder, blocks

    def __getitem__(self, numbered: tuple[int, BatchRequest]) -> WorkerResult:
        slot, request = numbered
        return self._builder.try_build(request, self._blocks[slot])


def _shared_blocks(count: int, size: int) -> Tensor:
    """(count, size) uint8 in shared memory, size rounded up to whole pages so that blocks share none.

    LoaderError if /dev/shm is too small: writing beyond it would end a worker with SIGBUS.
    """
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
    """Block ``_IGNORED`` while processes are started: they inherit the mask, so no signal can end them before
    ``_init_worker`` ignores it. A signal to this process is delivered afterwards."""
    # Read before, not by the call that blocks: that one may end by the exception of a handler of an earlier signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        start_tracker()  # it unblocks some signals, hence the second call
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(environment: dict[str, str], worker: int) -> None:
    """First call in a worker: take over the environment of the training process (the fork server has that of its own
    start), ignore signals, and watch the training process, to exit when it ends."""
    os.environ.clear()
    os.environ.update(environment)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()


def _kill(processes: tuple[BaseProcess, ...]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _identity(result: Any) -> Any:
    return result
