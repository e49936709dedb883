"""Downloads from a store in memory, some requests of which fail."""

from __future__ import annotations

import os
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from shards.kit import TILE_BYTES, Toy

from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.errors import StoreError
from maestro_scale.shards.read import store as store_module
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import write_shards

URL = "memory://downloads/toy"
WAIT_S = 10.0


@pytest.fixture(scope="module")
def shards():
    yield write_shards(Toy(12), URL, "train", shard_mb=4 * TILE_BYTES / 1e6).shards
    fsspec.filesystem("memory").rm("/downloads", recursive=True)


@pytest.fixture
def store(shards, tmp_path, monkeypatch):
    """A store that reads a shard by eight requests."""
    monkeypatch.setattr(store_module, "_RANGE_BYTES", -(-max(s.bytes for s in shards) // 8))
    store = Store(URL, tmp_path, 10**9, RetryPolicy(deadline_s=60, initial_wait_s=3))
    yield store
    store.close()


def test_reads_that_wait_for_a_retry_hold_no_connection(shards, store, monkeypatch):
    plain, failed = MemoryFileSystem.cat_file, threading.Barrier(9)

    def cat_file(self, path, **options):
        if path.endswith(shards[0].path):
            failed.wait(WAIT_S)
            raise TimeoutError
        return plain(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    store.prefetch(shards[:1])
    failed.wait(WAIT_S)
    started = time.monotonic()
    store.shard(shards[1]).close()
    assert time.monotonic() - started < 1  # the shortest wait of the others is 1.5 s


def test_a_server_that_ignores_ranges_is_reported(shards, store, monkeypatch):
    plain = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **_: plain(self, path))
    with pytest.raises(StoreError, match=f"{shards[0].path}: the server ignores range requests"):
        store.shard(shards[0])
    assert store.counters.retries == 0


def test_no_download_lists_a_folder(shards, store, monkeypatch):
    store.shard(shards[0]).close()  # the first one of a cache does
    listed = []
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, lambda *args, _name=name: listed.append(_name) or iter(()))
    for info in shards[1:]:
        store.shard(info).close()
    monkeypatch.undo()
    assert listed == []
    assert store.counters.downloads == len(shards)
