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
from maestro_scale.stream.batch_builder import Made, Reading, Request
from maestro_scale.stream.source import Source

# What schedulers and people send to a whole process group; the training process decides what comes of it.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_S = 2.0
_SHARED_MEMORY = "/dev/shm"


class LoaderError(MaestroError):
    """A loader process died or failed; the message says which, where and why, in one line."""


class _WorkerTraceback(Exception):
    """The traceback of another process, as the cause of the error it led to here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def start_server(sources: Iterable[Source]) -> None:
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

    ``workers``: processes; 0 does the work here, when a batch is asked for. ``outstanding``: batches that may
    be made ahead. ``pin``: put them in page-locked memory. ``counted`` is told what the stores did for each
    batch. LoaderError if the machine has too little shared memory.
    """

    def __init__(
        self,
        reading: Reading,
        requests: Iterable[Request],
        batch_size: int,
        workers: int,
        outstanding: int,
        pin: bool,
        counted: Callable[[StoreCounters], None],
    ) -> None:
        self._reading, self._requests, self._pin, self._counted = reading, iter(requests), pin, counted
        self._under_way: deque[tuple[int, Request]] = deque()
        self._results: Iterator[Made] | None = None
        if workers:
            each = max(2, -(-outstanding // workers))
            # One more than may be under way, for the one that is being taken. Few blocks, written again and
            # again: the first touch of fresh memory can cost more than reading and preparing together.
            self._blocks = _shared_blocks(each * workers + 2, reading.num_bytes(batch_size))
            self._results = self._start(workers, each)
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
            made = self._reading.attempt(request, block)
        else:
            try:
                made = next(self._results)
            # OSError, EOFError: it died while it handed something on.
            except (RuntimeError, OSError, EOFError) as error:
                raise LoaderError(
                    f"{socket.gethostname()}: a loader process died ({error}); if the machine ran out of "
                    "memory, lower data.workers; the same command resumes"
                ) from error
            slot, request = self._under_way.popleft()
            block = self._fresh_block(request)
            block.copy_(self._blocks[slot, : len(block)])
        self._counted(made.counters)
        if made.error is None:
            return self._reading.unpack(block, request, made.label)
        if made.trace:
            cause = _WorkerTraceback(made.trace)
            raise LoaderError(f"{socket.gethostname()}: a batch cannot be made: {made.error}") from cause
        raise made.error

    def close(self) -> None:
        """End the processes, within seconds, whatever they are doing; their work survives that."""
        if self._results is None:
            self._reading.close()
        elif self._kill.alive:
            impatience = threading.Timer(_PATIENCE_S, self._kill)
            impatience.start()
            self._results._shutdown_workers()
            impatience.cancel()
            self._kill()

    def _start(self, workers: int, each: int) -> Iterator[Made]:
        start_server(self._reading.settings.sources)
        with _signals_blocked():
            loader = DataLoader(
                _Bench(self._reading, self._blocks),
                sampler=self._numbered(),
                batch_size=None,
                num_workers=workers,
                collate_fn=_same,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
                worker_init_fn=functools.partial(_settle, dict(os.environ)),
                prefetch_factor=each,
                generator=torch.Generator(),  # it draws a seed for the workers, which nothing here uses
            )
            return iter(loader)

    def _numbered(self) -> Iterator[tuple[int, Request]]:
        for i, request in enumerate(self._requests):
            self._under_way.append((i % len(self._blocks), request))
            yield self._under_way[-1]

    def _fresh_block(self, request: Request) -> Tensor:
        size = self._reading.num_bytes_of(request)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)


class _Bench:
    """Where a loader process works: it makes the batches, each in the block that comes with the request."""

    def __init__(self, reading: Reading, blocks: Tensor) -> None:
        self._reading, self._blocks = reading, blocks

    def __getitem__(self, numbered: tuple[int, Request]) -> Made:
        slot, request = numbered
        return self._reading.attempt(request, self._blocks[slot])


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


def _settle(environment: dict[str, str], worker: int) -> None:
    """Runs first in a worker: the environment of the training process (the fork server has that of its own start), no
    signals, and an eye on the training process, to end with it."""
    os.environ.clear()
    os.environ.update(environment)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="maestro-orphan").start()


def _end_with_parent() -> None:
    # DataLoader looks at the parent's pid for this, but here the parent is the fork server, which stays as
    # long as there are workers.
    multiprocessing.parent_process().join()
    os._exit(1)


def _kill(processes: tuple[BaseProcess, ...]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _same(made: Made) -> Made:
    return made
