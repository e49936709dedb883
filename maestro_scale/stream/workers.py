"""Loader processes: requests in, batches out, in the order of the requests, by any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader

from maestro_scale.shards.counters import StoreCounters
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.reading import Made, Reading, Request

# What schedulers and people send to a whole process group; the training process decides what comes of it.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_S = 2.0


class LoaderError(Exception):
    """A loader process died or failed; the message says which, where and why, in one line."""


class _WorkerTraceback(Exception):
    """The traceback of another process, as the cause of the error it led to here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class Pipeline:
    """Batches for a sequence of requests.

    ``workers``: processes; 0 does the work here, when a batch is asked for. ``outstanding``: batches that may
    be made ahead. ``pin``: put them in page-locked memory. ``counted`` is told what the stores did for each
    batch.
    """

    def __init__(
        self,
        reading: Reading,
        requests: Iterable[Request],
        workers: int,
        outstanding: int,
        pin: bool,
        counted: Callable[[StoreCounters], None],
    ) -> None:
        self._reading, self._workers, self._counted = reading, workers, counted
        self._kill: Callable[[], None] | None = None
        if workers == 0:
            self._made: Iterator[Made] = (_pinned(reading.attempt(r), pin) for r in requests)
            return
        context = _context()
        with _signals_blocked():
            forkserver.ensure_running()
            loader = DataLoader(
                reading,
                sampler=requests,
                batch_size=None,
                num_workers=workers,
                collate_fn=_same,
                pin_memory=pin,
                multiprocessing_context=context,
                worker_init_fn=_settle,
                prefetch_factor=max(2, -(-outstanding // workers)),
                generator=torch.Generator(),  # it draws a seed for the workers, which nothing here uses
            )
            self._made = iter(loader)
        processes = tuple(getattr(self._made, "_workers", ()))
        # Also at exit: multiprocessing would ask the workers to stop with a signal that they ignore, and
        # wait.
        self._kill = weakref.finalize(self, _kill, processes)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        """The next batch. BadShard and other ShardsErrors as they are; LoaderError for all else."""
        try:
            made = next(self._made)
        except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while it handed a batch on
            raise LoaderError(
                f"{socket.gethostname()}: a loader process died ({error}); if the machine ran out of memory, "
                "lower data.workers; the same command resumes"
            ) from error
        self._counted(made.counters)
        if made.error is None:
            return made.packed.unpack()
        if made.trace:
            cause = _WorkerTraceback(made.trace)
            raise LoaderError(f"{socket.gethostname()}: a batch cannot be made: {made.error}") from cause
        raise made.error

    def close(self) -> None:
        """End the processes, within seconds, whatever they are doing; their work survives that."""
        if self._kill is None:
            self._reading.close()
        elif self._kill.alive:
            impatience = threading.Timer(_PATIENCE_S, self._kill)
            impatience.start()
            self._made._shutdown_workers()
            impatience.cancel()
            self._kill()
        self._made = iter(())


def _context() -> multiprocessing.context.BaseContext:
    """Forkserver: forking a process with CUDA, gloo or S3 threads is unsafe, a fresh one takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maestro_scale.stream.workers"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile have the signals blocked from birth; here they arrive afterwards."""
    resource_tracker.ensure_running()  # it would unblock some of them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(worker: int) -> None:
    """Runs first in a worker: ignore the signals, and watch over the training process, to end with it."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="maestro-orphan").start()


def _end_with_parent() -> None:
    # DataLoader looks at the parent's pid for this, but here the parent is the fork server, which stays as long as
    # there are workers.
    multiprocessing.parent_process().join()
    os._exit(1)


def _kill(processes: tuple[BaseProcess, ...]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _pinned(made: Made, pin: bool) -> Made:
    return made.pin_memory() if pin else made


def _same(made: Made) -> Made:
    return made
