"""Background reads on threads: an ordered parallel map, and a prefetcher.

The threads are daemons: a read that hangs in the network must not keep the interpreter from exiting.
``ThreadPoolExecutor`` is not used because the interpreter waits for its threads on exit.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

from maestro_scale.shards.errors import ShardsError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(read: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """``read(item)`` of each item, in order, up to ``num_threads`` at a time. Exceptions of ``read`` are raised."""
    tasks: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
    finished = threading.Event()

    def work() -> None:
        while (task := tasks.get()) is not None:
            item, future = task
            # The consumer has stopped, usually on an error: do not start the reads that are still queued.
            if finished.is_set():
                continue
            try:
                future.set_result(read(item))
            except Exception as error:  # noqa: BLE001 # raised by future.result() in the consumer
                future.set_exception(error)

    for _ in range(num_threads):
        threading.Thread(target=work, daemon=True, name="maestro-range").start()
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(Future())
            tasks.put((item, pending[-1]))
            # Bounded, so that finished reads do not pile up in memory while the consumer is slow.
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        finished.set()
        for _ in range(num_threads):
            tasks.put(None)


class Prefetcher(Generic[Item]):
    """Calls ``fetch(item, cancel)`` in the background for the queued items; ``cancel`` is set when it should stop.

    ``pid``: the process whose threads these are; they do not exist in a forked child.
    """

    def __init__(self, fetch: Callable[[Item, threading.Event], None], num_threads: int) -> None:
        self.pid = os.getpid()
        self._fetch = fetch
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._running: set[threading.Event] = set()
        self._stopped = False
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True, name="maestro-prefetch").start()

    def replace(self, items: Iterable[Item]) -> None:
        """Replace the queue: drop items that have not been started, then fetch these, in order."""
        with self._changed:
            self._queue = deque(items)
            self._changed.notify_all()

    def stop(self) -> None:
        """Start no further fetch and cancel the running ones; does not wait for them."""
        with self._changed:
            self._stopped = True
            for cancel in self._running:
                cancel.set()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            cancel = threading.Event()
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                item = self._queue.popleft()
                self._running.add(cancel)
            try:
                self._fetch(item, cancel)
            except (ShardsError, OSError):
                # A prefetch is only a hint. The reader that needs the item fetches it again and raises the error.
                pass
            finally:
                with self._changed:
                    self._running.discard(cancel)
