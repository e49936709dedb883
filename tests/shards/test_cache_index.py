"""The cache keeps its budget without listing its folder, whatever processes are killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import Counter

import pytest

from maestro_scale.shards.read import cache_index
from maestro_scale.shards.read.cache import Cache, CacheFullError
from maestro_scale.shards.read.cache_index import CacheIndex, record_name
from maestro_scale.shards.read.counters import CounterTotal

SIZE = 4096


def name(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def make_cache(folder, budget):
    cache = Cache(folder, budget, CounterTotal())
    cache.prepare()
    return cache


def fetch(cache, number, wait_s=0.0, size=SIZE):
    with cache.lock(name(number)):
        if not cache.path(name(number)).exists():
            with cache.reserve(name(number), size, wait_s) as part:
                os.replace(part, cache.path(name(number)))
                use(cache, number)


def use(cache, number, when=None):
    """As opening a shard does: the record is touched."""
    record = cache.folder / "verified" / record_name(cache.path(name(number)))
    record.touch()
    when = time.time_ns() if when is None else when
    os.utime(record, ns=(when, when))


def old_cache(folder, count):
    """A cache that an earlier revision has written: files and records, no index."""
    cache = make_cache(folder, count * SIZE)
    for number in range(count):
        cache.path(name(number)).write_bytes(bytes(SIZE))
        use(cache, number, when=1 + number)
    return cache


def held(cache):
    return {p.stem for p in (cache.folder / "shards").iterdir()}


def rows(cache):
    with sqlite3.connect(cache.folder / "index.sqlite") as connection:
        files = connection.execute("SELECT name, bytes, part FROM files").fetchall()
        ((total,),) = connection.execute("SELECT bytes FROM total").fetchall()
    return {n: b for n, b, _ in files}, total


def check(cache):
    """The rows cover the files, and their sum is right."""
    files = {p.name: p.stat().st_size for p in (cache.folder / "shards").iterdir()}
    counted, total = rows(cache)
    assert total == sum(counted.values())
    for file, size in files.items():
        # Renamed, but its process was killed before it said so.
        row = counted.get(file, counted.get(file.replace(".tar", ".part")))
        assert row == size
    assert sum(files.values()) <= total <= cache.budget_bytes


def test_a_download_touches_as_many_files_in_a_large_cache_as_in_a_small_one(tmp_path, monkeypatch):
    calls: Counter[str] = Counter()
    for call in ("stat", "scandir", "listdir", "open", "unlink", "mkdir"):
        function = getattr(os, call)

        def counted(*args, _function=function, _call=call, **options):
            calls[_call] += 1
            return _function(*args, **options)

        monkeypatch.setattr(os, call, counted)
    found = []
    for count in (40, 800):
        cache = old_cache(tmp_path / str(count), count)
        fetch(cache, "first")  # lists the folder
        calls.clear()
        for number in range(10):
            fetch(cache, f"new {number}")
        found.append(dict(calls))
        assert held(cache) == {
            name(n) for n in (*range(11, count), "first", *(f"new {i}" for i in range(10)))
        }
    assert found[0] == found[1]
    assert "scandir" not in found[0]
    assert "listdir" not in found[0]
    assert sum(found[0].values()) < 10 * 60


def test_the_order_of_use_of_an_old_cache_is_kept(tmp_path):
    cache = old_cache(tmp_path, 40)
    use(cache, 0, when=30)  # as shard 29, but before it is the order of the names
    use(cache, 1)
    for number in range(28):
        fetch(cache, f"a{number}")
    assert {n for n in range(40) if name(n) in held(cache)} == {1, *range(30, 40)} | (
        {0} if name(0) > name(29) else {29}
    )
    # Without a record: first of all.
    stranger = cache.path(name("unknown"))
    stranger.write_bytes(bytes(SIZE))
    (cache.folder / "index.sqlite").unlink()
    fetch(cache, "b")
    assert not stranger.exists()


def test_after_a_crash_of_the_machine_the_folder_is_listed_again(tmp_path, monkeypatch):
    cache = old_cache(tmp_path, 3)
    fetch(cache, 3)
    assert len(held(cache)) == 3
    cache.path(name(4)).write_bytes(bytes(SIZE))  # a row that was lost
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr(cache_index, "_BOOT_ID", boot)
    cache_index._boot_id.cache_clear()
    try:
        fetch(cache, 5)
        check(cache)
        # Damaged by it.
        (tmp_path / "index.sqlite").write_bytes(os.urandom(9000))
        fetch(cache, 6)
        check(cache)
    finally:
        cache_index._boot_id.cache_clear()


def test_files_that_somebody_removed_do_not_count(tmp_path):
    cache = old_cache(tmp_path, 4)
    fetch(cache, "new")
    for number in (1, 2):
        cache.path(name(number)).unlink()
    fetch(cache, "a")
    fetch(cache, "b")
    assert held(cache) == {name(n) for n in (3, "new", "a", "b")}
    assert cache.total.total.evictions == 1
    check(cache)


def test_a_shard_in_use_is_passed_over_and_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    cache = old_cache(tmp_path, 2)
    with open(cache.path(name(0))) as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
        fetch(cache, "a")
        assert held(cache) == {name(0), name("a")}
        with pytest.raises(CacheFullError):
            fetch(cache, "b", size=2 * SIZE)
    with pytest.raises(KeyError), cache.lock(name("c")), cache.reserve(name("c"), SIZE, 0.0):
        raise KeyError
    assert [*rows(cache)[0].values()].count(SIZE) == len(held(cache))
    check(cache)


def churn(folder, seed):
    cache, chosen = make_cache(folder, 12 * SIZE), random.Random(seed)
    while True:
        number = chosen.randrange(30)
        if cache.path(name(number)).exists():
            use(cache, number)
        else:
            fetch(cache, number, wait_s=5.0)


def test_a_kill_at_any_moment_leaves_a_cache_that_keeps_its_budget(tmp_path):
    context = multiprocessing.get_context("fork")
    cache, chosen = make_cache(tmp_path, 12 * SIZE), random.Random(0)
    running = []
    for seed in range(14):
        running.append(context.Process(target=churn, args=(tmp_path, seed), daemon=True))
        running[-1].start()
        if len(running) == 3:
            time.sleep(0.05 + 0.1 * chosen.random())
            victim = running.pop(0)
            assert victim.is_alive()
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            for process in running:
                os.kill(process.pid, signal.SIGSTOP)
            assert sum(p.stat().st_blocks * 512 for p in (tmp_path / "shards").glob("*")) <= 12 * SIZE
            for process in running:
                os.kill(process.pid, signal.SIGCONT)
    for process in running:
        process.kill()
        process.join()
    check(cache)
    for number in range(100, 112):  # what the killed processes had reserved is released
        fetch(cache, number)
    assert held(cache) == {name(n) for n in range(100, 112)}
    check(cache)


def test_a_reservation_replaces_an_earlier_one_of_the_same_shard(tmp_path):
    cache = make_cache(tmp_path, 10)
    index = CacheIndex(cache.folder)
    part = f"{name(0)}.part"
    assert index.reserve(part, 6, 10) == 0
    assert index.reserve(part, 7, 10) == 0
    assert index.reserve(f"{name(1)}.part", 5, 10) == 2
    assert rows(cache) == ({part: 7}, 7)
    for _ in range(2):  # by its process, and by one that took it for killed
        index.complete(part, f"{name(0)}.tar", 1)
        assert rows(cache) == ({f"{name(0)}.tar": 7}, 7)
