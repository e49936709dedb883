"""Background reads on threads: an ordered parallel map, connections that several downloads share, and a prefetcher.

The threads are daemons: a read that hangs in the network must not keep the interpreter from exiting.
``ThreadPoolExecutor`` is not used because the interpreter waits for its threads on exit.
"""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from maestro_scale.shards.errors import ShardsError

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALWAYS = 2  # items that are fetched at a time, whatever they cost: while one is finished, the other is read


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

    pending: deque[Future[Result]] = deque()
    try:
        for _ in range(num_threads):
            threading.Thread(target=work, daemon=True, name="maestro-range").start()
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


class Connections:
    """At most ``count`` reads at a time; of those that wait, the one with the lowest ``priority`` is next.

    A read with a negative priority, for which training waits, waits for others of these only: reads in advance may hang
    for the timeout of a request. With these there are up to 2 * ``count`` reads.

    ``pid``: the process that uses it; the locks of a forked child would be those of threads that it does not have.
    """

    def __init__(self, count: int) -> None:
        self.pid = os.getpid()
        self._count = count
        self._used = self._urgent = 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._arrivals = itertools.count()

    @contextmanager
    def use(self, priority: int) -> Iterator[None]:
        """Wait for a connection, and keep it within the context."""
        urgent = priority < 0
        with self._changed:
            own = (priority, next(self._arrivals))
            heapq.heappush(self._waiting, own)
            self._changed.wait_for(
                lambda: self._waiting[0] == own and (self._urgent if urgent else self._used) < self._count
            )
            heapq.heappop(self._waiting)
            self._used += 1
            self._urgent += urgent
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= 1
                self._urgent -= urgent
                self._changed.notify_all()


class Prefetcher(Generic[Item]):
    """Calls ``fetch(item, cancel)`` in the background for the queued items; ``cancel`` is set when it should stop.

    Two items are fetched at a time, and further ones until the sum of ``cost(item)`` reaches ``budget``.
    ``pid``: the process whose threads these are; they do not exist in a forked child.
    """

    def __init__(
        self, fetch: Callable[[Item, threading.Event], None], cost: Callable[[Item], int], budget: int
    ) -> None:
        self.pid = os.getpid()
        self._fetch, self._cost, self._budget = fetch, cost, budget
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._running: dict[threading.Event, Item] = {}
        self._stopped = False
        for _ in range(max(budget, _ALWAYS)):
            threading.Thread(target=self._work, daemon=True, name="maestro-prefetch").start()

    def replace(self, items: Iterable[Item]) -> None:
        """Replace the queue: drop items that have not been started, then fetch these, in order, except those that are
        being fetched."""
        with self._changed:
            running = list(self._running.values())
            self._queue = deque(item for item in items if item not in running)
            self._changed.notify_all()

    def stop(self) -> None:
        """Start no further fetch and cancel the running ones; does not wait for them."""
        with self._changed:
            self._stopped = True
            for cancel in self._running:
                cancel.set()
            self._changed.notify_all()

    def _may_start(self) -> bool:
        if not self._queue:
            return False
        return len(self._running) < _ALWAYS or sum(map(self._cost, self._running.values())) < self._budget

    def _work(self) -> None:
        while True:
            cancel = threading.Event()
            with self._changed:
                self._changed.wait_for(lambda: self._may_start() or self._stopped)
                if self._stopped:
                    return
                item = self._queue.popleft()
                self._running[cancel] = item
            try:
                self._fetch(item, cancel)
            except (ShardsError, OSError):
                # A prefetch is only a hint. The reader that needs the item fetches it again and raises the error.
                pass
            finally:
                with self._changed:
                    del self._running[cancel]
                    self._changed.notify_all()
