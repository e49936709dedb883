"""The store returns what the manifest lists, or raises an error that names shard and cause."""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shards.kit import SPEC, TILE_BYTES, Toy, fields_equal, tile, toy_keys

from maestro_scale.shards.errors import BadShard, StoreError, WriteError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.cache import Cache
from maestro_scale.shards.read.counters import CounterTotal
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.storage import client_module
from maestro_scale.shards.write.writer import Writer, write_shards

SMALL = 4 * TILE_BYTES / 1e6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_shards(Toy(12), str(folder), "train", shard_mb=SMALL)
    return folder


@pytest.fixture
def copy(dataset, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def flip(path, position=3000):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_every_sample_is_read(dataset, tmp_path):
    store = Store(str(dataset), tmp_path / "cache", 0)
    seen = []
    for info in Manifest.load(str(dataset)).shards:
        shard = store.shard(info)
        assert len(shard) == len(shard.keys) == info.samples
        samples = list(shard)
        shard.close()
        assert all(
            fields_equal(s, tile(s.key)) for s in samples
        )  # samples stay valid after their shard is closed
        seen += [s.key for s in samples]
    assert sorted(seen) == toy_keys(12)
    with pytest.raises(IndexError):
        store.shard(info)[info.samples]
    with pytest.raises(ValueError, match="is closed"):
        shard[0]


def test_keys_are_read_without_the_shard_where_it_has_an_index(copy, tmp_path):
    first, second = Manifest.load(str(copy)).shards[:2]
    expected = {
        info.path: Store(str(copy), tmp_path / "other", 0).shard(info).keys for info in (first, second)
    }
    store = Store(str(copy), tmp_path / "cache", 0)
    index = copy / first.path.replace(".tar", ".index.json")
    (copy / first.path).rename(copy / "away")
    assert store.read_keys(first) == expected[first.path]
    # The index of another shard, a damaged one, or none: then the shard itself is needed.
    for content in ((copy / second.path.replace(".tar", ".index.json")).read_bytes(), b"{", None):
        index.unlink()
        if content is not None:
            index.write_bytes(content)
        with pytest.raises(BadShard, match="is missing"):
            store.read_keys(first)
        (copy / "away").rename(copy / first.path)
        assert store.read_keys(first) == expected[first.path]
        (copy / first.path).rename(copy / "away")


def test_keys_of_a_verified_shard_need_no_index(copy, tmp_path, monkeypatch):
    info = Manifest.load(str(copy)).shards[0]
    store = Store(str(copy), tmp_path / "cache", 0)
    keys = store.shard(info).keys
    monkeypatch.setattr(store, "_storage", None)
    monkeypatch.setattr(store, "_path", lambda info: copy / info.path)
    assert store.read_keys(info) == keys


def test_a_local_shard_is_hashed_once_per_state(dataset, copy, tmp_path, monkeypatch):
    from maestro_scale.shards.read import store as module

    hashed = []
    whole = module._hash_file
    monkeypatch.setattr(module, "_hash_file", lambda path: hashed.append(path) or whole(path))
    (info, *_) = Manifest.load(str(copy)).shards
    for _ in range(2):
        Store(str(copy), tmp_path / "cache", 0).shard(info).close()
    assert len(hashed) == 1
    before = (copy / info.path).stat()
    flip(copy / info.path)
    os.utime(copy / info.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync --inplace --times
    with pytest.raises(BadShard, match="damaged"):
        Store(str(copy), tmp_path / "cache", 0).shard(info)
    store = pickle.loads(pickle.dumps(Store(str(dataset), tmp_path / "cache", 0)))
    store.shard(info).close()
    store.shard(info).close()
    assert store.counters.hits == 1
    assert store.counters.wait_s > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, path: path.unlink(), "is missing"),
        (lambda folder, path: path.write_bytes(path.read_bytes()[:-2048]), "bytes, the manifest says"),
        (lambda folder, path: flip(path), "damaged, or another shard"),
        (
            lambda folder, path: path.write_bytes((folder / "train-000001.tar").read_bytes()),
            "the manifest says",
        ),
    ],
)
def test_a_bad_shard_is_reported_with_its_cause(copy, tmp_path, damage, message):
    (info, *_) = Manifest.load(str(copy)).shards
    damage(copy, copy / info.path)
    with pytest.raises(BadShard, match=message) as error:
        Store(str(copy), tmp_path / "cache", 0).shard(info)
    assert str(copy / info.path) in str(error.value)
    assert "\n" not in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).cause == error.value.cause
    problems = verify(str(copy), workers=1)
    assert len(problems) == 1
    assert problems[0].startswith(info.path)
    assert message in problems[0]


def test_counts_are_checked(copy, tmp_path):
    manifest = Manifest.load(str(copy))
    wrong = replace(manifest.shards[0], samples=manifest.shards[0].samples + 1)
    with pytest.raises(
        BadShard, match=f"contains {wrong.samples - 1} samples, the manifest says {wrong.samples}"
    ):
        Store(str(copy), tmp_path / "cache", 0).shard(wrong)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(copy, tmp_path):
    (info, *_) = Manifest.load(str(copy)).shards
    shard = Store(str(copy), tmp_path / "cache", 0).shard(info)
    (copy / info.path).write_bytes(b"")
    with pytest.raises(BadShard, match="changed while it was in use"):
        shard[0]


def test_verify_reports_all_other_problems(copy):
    assert verify(str(copy), workers=2) == []
    (copy / "train-000009.tar").write_bytes(b"x")
    (copy / "train-000000.index.json").write_text((copy / "train-000001.index.json").read_text())
    (copy / "train-000001.index.json").unlink()
    problems = verify(str(copy), workers=2)
    assert [p.split(":")[0] for p in problems] == [
        "train-000009.tar",
        "train-000000.index.json",
        "train-000001.index.json",
    ]
    (copy / "manifest.json").unlink()
    assert "not found" in verify(str(copy))[0]


def test_verify_reads_every_sample_against_the_spec(copy):
    """A shard that was written wrongly: its hash matches, its samples do not."""
    import hashlib

    from maestro_scale.shards.format.codec import encode, encode_fields
    from maestro_scale.shards.format.fields import tile_fields
    from maestro_scale.shards.format.tar import TarWriter

    tar = TarWriter(copy / "train-000000.tar")
    tar.add("a", encode(tile("b")))
    tar.add("c", b"nothing")
    fields = tile_fields(tile("d"))
    tar.add("d", encode_fields("d", {**fields, "s2": fields["s2"][:, :1]}))
    tar.add("e", encode(tile("e")))
    tar.finish()
    (copy / "train-000000.index.json").unlink()
    manifest = Manifest.load(str(copy))
    data = (copy / "train-000000.tar").read_bytes()
    info = replace(manifest.shards[0], bytes=len(data), samples=4, sha256=hashlib.sha256(data).hexdigest())
    (copy / "manifest.json").write_text(replace(manifest, shards=(info, *manifest.shards[1:])).dumps())
    (copy / "manifest.sha256").unlink()
    problems = verify(str(copy))
    assert len(problems) == 4
    assert "train-000000.index.json: is missing" in problems[0]
    assert "member a contains the sample b" in problems[1]
    assert "sample c: 7 bytes that do not start" in problems[2]
    assert "tile d: s2 is int16" in problems[3]


def test_only_the_requested_part_of_a_large_sample_is_read(dataset, copy, tmp_path, monkeypatch):
    from maestro_scale.shards.read import shard as module

    monkeypatch.setattr(module, "_WHOLE_BYTES", 1)
    taken = []
    pread, preadv = os.pread, os.preadv

    def counted_pread(*args):
        data = pread(*args)
        taken.append(len(data))
        return data

    def counted_preadv(*args):
        taken.append(preadv(*args))
        return taken[-1]

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    info = Manifest.load(str(copy)).shards[0]
    with Store(str(copy), tmp_path / "cache", 0).shard(info) as shard:
        samples = list(shard)
        taken.clear()
        s2 = samples[0].rows("s2", np.array([1, 0]))
        assert np.array_equal(s2, tile(samples[0].key).arrays["s2"][[1, 0]])
        assert taken == [s2.nbytes]  # both dates in one read
    assert all(
        fields_equal(s, tile(s.key)) for s in samples
    )  # samples stay valid after their shard is closed
    (copy / info.path).write_bytes(b"")
    with pytest.raises(BadShard, match="changed while it was in use"):
        samples[0].array("s2")
    open_files = len(os.listdir("/proc/self/fd"))
    del samples
    assert len(os.listdir("/proc/self/fd")) == open_files - 1


def test_short_reads_of_many_images_are_completed(copy, tmp_path, monkeypatch):
    """Some network file systems return less than was asked for."""
    from maestro_scale.shards.format import codec
    from maestro_scale.shards.read import shard as module

    monkeypatch.setattr(module, "_WHOLE_BYTES", 1)
    monkeypatch.setattr(codec, "_MAX_GAP_BYTES", 0)
    pread, preadv = os.pread, os.preadv
    info = Manifest.load(str(copy)).shards[0]
    with Store(str(copy), tmp_path / "cache", 0).shard(info) as shard:
        sample = shard[0]
        monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, max(size * 2 // 3, 1), start))
        monkeypatch.setattr(
            os, "preadv", lambda file, parts, start: preadv(file, [parts[0][: len(parts[0]) * 2 // 3]], start)
        )
        s2 = sample.rows("s2", np.array([1, 0]), (slice(2, 5), slice(1, 4)))
        assert np.array_equal(s2, tile(sample.key).arrays["s2"][[1, 0], :, 2:5, 1:4])
        (copy / info.path).write_bytes(b"")
        with pytest.raises(BadShard, match="changed while it was in use"):
            sample.rows("s2", np.array([1, 0]), (slice(2, 5), slice(1, 4)))


def test_a_crop_of_many_images_takes_as_many_calls_as_one_of_few(copy, tmp_path, monkeypatch):
    from maestro_scale.shards.format import codec
    from maestro_scale.shards.read import shard as module

    monkeypatch.setattr(module, "_WHOLE_BYTES", 1)
    monkeypatch.setattr(codec, "_MAX_GAP_BYTES", 0)
    info = Manifest.load(str(copy)).shards[0]
    with Store(str(copy), tmp_path / "cache", 0).shard(info) as shard:
        sample = shard[0]

        def num_calls(dates):
            calls = 0

            def count(frame, event, argument):
                nonlocal calls
                calls += event == "call"

            sys.setprofile(count)
            try:
                sample.rows("s2", np.zeros(dates, int), (slice(2, 5), slice(1, 4)))
            finally:
                sys.setprofile(None)
            return calls

        assert num_calls(50) == num_calls(2) < 40


def test_a_folder_without_locks_can_be_read_and_written(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    from maestro_scale.shards import lease, locks

    without = str(tmp_path / "shared")
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(without):
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    manifest = write_shards(Toy(3), without, "train")
    assert "this file system has no file locks; leases protect" in caplog.text
    with Writer(without, SPEC, "val") as writer:
        writer.add(tile("a"))
        with pytest.raises(
            WriteError, match=r"another process is writing split 'val': process \d+ on .* expires in"
        ):
            write_shards(Toy(2), without, "val")
        write_shards(Toy(2), without, "test")
    assert Manifest.load(without).splits == ("train", "test", "val")
    assert not [n for n in os.listdir(without) if n.startswith(".")]
    with Store(without, tmp_path / "cache", 0).shard(manifest.shards[0]) as shard:
        assert len(shard) == 3
    with pytest.raises(StoreError, match=r"cannot be locked .* set data.cache_dir to a local disk"):
        Store(without, tmp_path / "shared" / "cache", 0).shard(manifest.shards[0])


def test_other_files_in_the_cache_folder_are_kept(tmp_path):
    """data.cache_dir may be the parent of a folder ``shards`` with a dataset."""
    folder = tmp_path / "shards"
    folder.mkdir()
    others = [folder / name for name in ("train-000000.tar", "image.iso.part", f"{'a' * 63}.tar")]
    for path in others:
        path.write_bytes(bytes(1000))
    evicted = folder / f"{'a' * 64}.tar"
    evicted.write_bytes(bytes(1000))
    cache = Cache(tmp_path, 1500, CounterTotal())
    cache.prepare()
    with cache.reserve("b" * 64, 1000, 0.0):
        assert not evicted.exists()
    assert sorted(folder.iterdir()) == sorted(others)


def test_a_cache_that_cannot_be_created_is_reported(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file: the cache folder cannot be created .* set data.cache_dir"):
        Store(str(dataset), tmp_path / "file", 0).shard(Manifest.load(str(dataset)).shards[0])


def test_any_fsspec_url_works(tmp_path):
    url = "memory://somewhere/toy"
    manifest = write_shards(Toy(5), url, "train")
    assert Manifest.load(url) == manifest
    with Store(url, tmp_path / "cache", 10**9).shard(manifest.shards[0]) as shard:
        assert all(fields_equal(s, tile(s.key)) for s in shard)
    assert verify(url) == []


def test_a_url_that_lost_a_slash_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StoreError, match="s3:/bucket/toy: is not a URL, and would be a folder; write s3://bucket/toy"
    ):
        write_shards(Toy(5), Path("s3://bucket/toy"), "train")
    with pytest.raises(StoreError, match="write s3://bucket/toy"):
        Manifest.load("s3:/bucket/toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "module"),
    [
        ("/data/toy", None),
        ("file:///data/toy", None),
        ("s3://bucket/toy", "s3fs"),
        ("memory://toy", "fsspec.implementations.memory"),
        ("nothing://toy", None),
    ],
)
def test_the_client_module_of_a_url(url, module):
    assert client_module(url) == module
