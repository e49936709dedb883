"""The order of reads that share connections, and how many shards are prefetched at a time."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from maestro_scale.shards.read.prefetch import Connections, Prefetcher, ordered_map

WAIT_S = 10.0


def test_the_lowest_priority_number_is_read_first():
    connections = Connections(1)
    order: list[int] = []
    first_reads, may_end = threading.Event(), threading.Event()

    def read(priority: int) -> None:
        with connections.use(priority):
            order.append(priority)
            first_reads.set()
            may_end.wait(WAIT_S)

    threads = [threading.Thread(target=read, args=(5,))]
    threads[0].start()
    assert first_reads.wait(WAIT_S)
    for priority in (3, 1, 2, 0, 1):
        threads.append(threading.Thread(target=read, args=(priority,)))
        threads[-1].start()
    while len(connections._waiting) < 5:
        time.sleep(0.01)
    may_end.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [5, 0, 1, 1, 2, 3]


def test_a_read_that_is_waited_for_does_not_wait_for_reads_in_advance():
    connections = Connections(2)
    running: list[int] = []
    may_end = threading.Event()

    def read(priority: int) -> None:
        with connections.use(priority):
            running.append(priority)
            may_end.wait(WAIT_S)

    threads = [threading.Thread(target=read, args=(priority,)) for priority in (7, 8, -1, -1, 0, -1)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert running == [7, 8, -1, -1]  # of each kind as many as there are connections
    may_end.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert running[4:] == [-1, 0]


def test_a_failed_read_gives_its_connection_back():
    connections = Connections(1)
    for _ in range(3):
        with suppress(OSError), connections.use(0):
            raise OSError
    with connections.use(0):
        pass


def test_no_thread_is_left_where_the_system_starts_no_more(monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start"):
        list(ordered_map(str, range(10), 4))
    for thread in started:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def started(costs: list[int], budget: int, expected: int) -> set[int]:
    """The items, by their number, that are being fetched at the same time, once there are ``expected``."""
    running: set[int] = set()
    end = threading.Event()

    def fetch(item: int, cancel: threading.Event) -> None:
        running.add(item)
        end.wait(WAIT_S)

    prefetcher = Prefetcher(fetch, lambda item: costs[item], budget)
    prefetcher.replace(range(len(costs)))
    deadline = time.monotonic() + WAIT_S
    while len(running) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # for those that must not start
    found = set(running)
    prefetcher.stop()
    end.set()
    return found


def test_small_items_are_fetched_together_and_large_ones_by_twos():
    assert started([16, 16, 16], budget=8, expected=2) == {0, 1}
    assert started([2, 2, 2, 2, 2], budget=8, expected=4) == {0, 1, 2, 3}
    assert started([3, 3, 3, 3], budget=8, expected=3) == {
        0,
        1,
        2,
    }  # two alone would leave connections unused
    assert started([1] * 10, budget=8, expected=8) == set(range(8))
    assert started([7, 1, 1, 1], budget=8, expected=2) == {0, 1}


def test_an_item_that_is_being_fetched_is_not_fetched_again():
    fetched: list[int] = []
    first, done = threading.Event(), threading.Event()

    def fetch(item: int, cancel: threading.Event) -> None:
        fetched.append(item)
        if item == 0:
            first.wait(WAIT_S)
        if item == 2:
            done.set()

    prefetcher = Prefetcher(fetch, lambda item: 100, 8)
    prefetcher.replace([0])
    while not fetched:
        time.sleep(0.01)
    prefetcher.replace([0, 1, 2])
    assert done.wait(WAIT_S)
    first.set()
    prefetcher.stop()
    assert fetched == [0, 1, 2]


def test_an_item_is_started_when_another_has_ended():
    ended: list[int] = []
    done = threading.Event()

    def fetch(item: int, cancel: threading.Event) -> None:
        ended.append(item)
        if item == 4:
            done.set()
        if item == 1:
            raise OSError("the others go on")

    prefetcher = Prefetcher(fetch, lambda item: 100, 8)
    prefetcher.replace(range(5))
    assert done.wait(WAIT_S)
    assert set(ended) == {0, 1, 2, 3, 4}
    prefetcher.stop()
