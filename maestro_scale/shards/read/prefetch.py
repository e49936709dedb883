"""JobFunction done ahead of need, on daemon threads: they never keep the interpreter from ending."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from maestro_scale.shards.errors import ShardsError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(read: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """``read(item)`` of each item, in order, up to ``num_threads`` at a time; raises what it raises."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    over = threading.Event()

    def serve() -> None:
        while (task := tasks.get()) is not None:
            item, answer = task
            if over.is_set():
                continue
            try:
                answer.put((read(item), None))
            except Exception as error:  # noqa: BLE001 # it is raised where the result is taken
                answer.put((None, error))

    for _ in range(num_threads):
        threading.Thread(target=serve, daemon=True, name="maestro-range").start()
    pending: deque[queue.SimpleQueue] = deque()
    try:
        for item in items:
            pending.append(queue.SimpleQueue())
            tasks.put((item, pending[-1]))
            if len(pending) > num_threads:
                yield _take(pending.popleft())
        while pending:
            yield _take(pending.popleft())
    finally:
        over.set()
        for _ in range(num_threads):
            tasks.put(None)


class Prefetcher:
    """Calls ``fetch(item, cancel)`` for the items it was last given; ``cancel`` is set when it must end."""

    def __init__(self, fetch: Callable[[Item, threading.Event], None], num_threads: int) -> None:
        self.pid = os.getpid()
        self._fetch = fetch
        self._changed = threading.Condition()
        self._queue: deque = deque()
        self._running: set[threading.Event] = set()
        self._stopped = False
        for _ in range(num_threads):
            threading.Thread(target=self._worker_loop, daemon=True, name="maestro-prefetch").start()

    def replace(self, items: Iterable[Item]) -> None:
        """Forget what was not begun; fetch these, in order."""
        with self._changed:
            self._queue = deque(items)
            self._changed.notify_all()

    def stop(self) -> None:
        """Begin nothing more and end what runs, soon."""
        with self._changed:
            self._stopped = True
            for cancel in self._running:
                cancel.set()
            self._changed.notify_all()

    def _worker_loop(self) -> None:
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
                pass  # asked for in earnest, it fails again and tells why
            finally:
                with self._changed:
                    self._running.discard(cancel)


def _take(answer: queue.SimpleQueue) -> object:
    result, error = answer.get()
    if error is not None:
        raise error
    return result
