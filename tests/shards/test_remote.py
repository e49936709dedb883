"""Shards in an object store: moto's S3 over real sockets, with a proxy that injects faults."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import fsspec
import pytest
import s3fs
from shards.kit import SPEC, TILE_BYTES, Toy, fields_equal, tile, toy_keys
from shards.s3 import Fault, Proxy, reset

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards import lease
from maestro_scale.shards.errors import BadShard, ManifestError, StoreError, WriteError
from maestro_scale.shards.format.index import index_path
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read import store as store_module
from maestro_scale.shards.read.as_webdataset import as_webdataset
from maestro_scale.shards.read.cache import CacheFullError
from maestro_scale.shards.read.store import Store, StoreCounters
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.storage import open_storage
from maestro_scale.shards.write.packing import shuffle_keys
from maestro_scale.shards.write.part import WriterPart
from maestro_scale.shards.write.writer import Writer, write_shards

SMALL = 4 * TILE_BYTES / 1e6
QUICK = RetryPolicy(deadline_s=20, attempt_timeout_s=5, initial_wait_s=0.01, max_wait_s=0.05)
URL = "s3://shards/toy"


@pytest.fixture(scope="module")
def server():
    """The port of an S3 server with the bucket "shards"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    reset(port)
    with pytest.MonkeyPatch.context() as patch:
        lead_to(patch, f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem().mkdir("shards")
        yield port
    server.stop()


@pytest.fixture(scope="module")
def dataset(server):
    """The manifest of a dataset at URL, which tests must not modify."""
    return write_shards(Toy(12), URL, "train", shard_mb=SMALL)


@pytest.fixture
def s3(server, monkeypatch):
    """A proxy in front of the server; the environment points clients to it."""
    with Proxy(server) as proxy:
        lead_to(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture
def own(dataset, s3, tmp_path):
    """URL of a copy of the dataset, to be damaged."""
    path = f"shards/{tmp_path.name}"
    fs = s3fs.S3FileSystem()
    for name in ("manifest.json", *(n for s in dataset.shards for n in (s.path, index_path(s.path)))):
        fs.copy(f"shards/toy/{name}", f"{path}/{name}")
    return f"s3://{path}"


def lead_to(monkeypatch, endpoint):
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def make_store(tmp_path, url=URL, retry=QUICK):
    return Store(url, tmp_path / "cache", 10**9, retry)


def without_names(manifest):
    """A manifest without the shards' names, which depend on the storage."""
    return replace(manifest, shards=tuple(replace(info, path="") for info in manifest.shards))


def gets(s3, name):
    return [path for method, path in s3.requests if method == "GET" and path.split("?")[0].endswith(name)]


def test_round_trip_with_cache(s3, dataset, tmp_path):
    assert Manifest.load(URL) == dataset
    local = write_shards(Toy(12), str(tmp_path / "local"), "train", shard_mb=SMALL)
    assert without_names(local) == without_names(dataset)
    assert [i.path for i in local.shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [i.path for i in dataset.shards] == [
        f"train-{number:06d}-{info.sha256[:8]}.tar" for number, info in enumerate(local.shards)
    ]
    store = make_store(tmp_path)
    for _ in range(2):
        keys = []
        for info in dataset.shards:
            with store.shard(info) as shard:
                assert all(fields_equal(s, tile(s.key)) for s in shard)
                keys += shard.keys
        assert sorted(keys) == toy_keys(12)
    n = len(dataset.shards)
    assert store.counters.downloads == store.counters.hits == n
    assert store.counters.downloaded_bytes == sum(s.bytes for s in dataset.shards)
    assert make_store(tmp_path).counters == StoreCounters()
    before = len(s3.requests)
    make_store(tmp_path).shard(info).close()
    assert len(s3.requests) == before


def test_a_stock_webdataset_pipeline_reads_the_store(s3, dataset):
    s3.faults = lambda method, path, n: Fault(503) if method == "GET" and n == 3 else None
    samples = list(as_webdataset(URL, "train", fields=["s2"]))
    assert sorted(s["__key__"] for s in samples) == toy_keys(12)
    assert all((s["s2"] == tile(s["__key__"]).arrays["s2"]).all() for s in samples)


def test_writing_behaves_as_on_disk(own, dataset, s3):
    shard = dataset.shards[1].path
    fs = s3fs.S3FileSystem()
    fs.rm([f"{own}/manifest.json", f"{own}/{shard}"])
    with pytest.raises(ManifestError, match=r"s3://shards/.*/manifest.json: not found"):
        Manifest.load(own)
    s3.requests.clear()
    assert write_shards(Toy(12), own, "train", shard_mb=SMALL, workers=2) == dataset
    written = [p.split("?")[0].rsplit("/", 1)[1] for m, p in s3.requests if m == "PUT"]
    assert [n for n in written if not n.startswith(".")] == [
        index_path(shard),
        shard,
        "manifest.json",
        "manifest.sha256",
    ]
    left = {path.rpartition("/")[2] for path in fs.ls(own.removeprefix("s3://"))}
    assert not [n for n in left if n.startswith(".")]  # leases and probes
    with Writer(own, SPEC, "val") as writer:
        writer.add(tile("a"))
    assert verify(own) == []
    assert [s.num_samples for s in summarize(own).splits] == [12, 1]
    with pytest.raises(WriteError, match="contains a dataset with codec raw, not zstd"):
        write_shards(Toy(12), own, "test", codec="zstd")


def test_concurrent_writers_write_the_same_bytes(dataset, s3):
    assert write_shards(Toy(12), "s3://shards/two", "train", shard_mb=SMALL, workers=2) == dataset


def test_a_missing_bucket_is_reported(s3, monkeypatch):
    with pytest.raises(WriteError, match=r"s3://none/toy/.*: no such bucket"):
        write_shards(Toy(2), "s3://none/toy", "train")
    s3.faults = lambda method, path, n: Fault(403) if method == "PUT" else None
    with pytest.raises(WriteError, match=r"cannot write s3://shards/new/.*: refused .* check credentials"):
        write_shards(Toy(2), "s3://shards/new", "train")


def test_verify_reports_problems(own, dataset):
    a, b, *_ = dataset.shards
    fs = s3fs.S3FileSystem()
    fs.rm(f"{own}/{a.path}")
    fs.pipe(f"{own}/{b.path}", fs.cat(f"{own}/{b.path}")[:-5] + b"12345")
    fs.pipe(f"{own}/stray.tar", b"x")
    problems = verify(own)
    assert [p.split(":")[0] for p in problems] == ["stray.tar", a.path, b.path]
    assert "is missing" in problems[1]


@pytest.mark.parametrize("fault", [Fault(500), Fault(503), Fault(cut=True), Fault(429)], ids=str)
def test_transient_failures_are_retried_and_counted(s3, dataset, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(store_module, "_RANGE_BYTES", 10_000)
    left = [fault] * 6

    def some(method, path, n):
        return left.pop() if method == "GET" and path.endswith(".tar") and left else None

    s3.faults = some
    store = make_store(tmp_path)
    for info in dataset.shards:
        with store.shard(info) as shard:
            assert all(fields_equal(s, tile(s.key)) for s in shard)
    assert store.counters.retries >= 6


@pytest.mark.parametrize(
    ("status", "error", "cause"), [(403, StoreError, "check credentials"), (404, BadShard, "missing")]
)
def test_permanent_failures_are_raised_at_once(s3, dataset, tmp_path, status, error, cause):
    s3.faults = lambda method, path, n: Fault(status) if path.endswith(".tar") else None
    s3.requests.clear()
    store = make_store(tmp_path, retry=RetryPolicy(deadline_s=60))
    started = time.monotonic()
    with pytest.raises(error, match=cause) as raised:
        store.shard(dataset.shards[0])
    assert f"{URL}/{dataset.shards[0].path}" in str(raised.value)
    assert time.monotonic() - started < 30  # far below the deadline of retries
    assert store.counters.retries == 0
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


def test_no_credentials(s3, dataset, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3.faults = lambda method, path, n: Fault(403)
    with pytest.raises(StoreError, match="check credentials"):
        make_store(tmp_path).shard(dataset.shards[0])
    with pytest.raises(ManifestError, match="check credentials"):
        Manifest.load(URL)


def test_a_whole_object_is_one_request(s3, dataset):
    s3.requests.clear()
    assert json.loads(open_storage(URL).read("manifest.json"))["shards"]
    assert [method for method, _ in s3.requests] == ["GET"]


def test_an_unresponsive_endpoint_fails_at_the_deadline(s3, dataset, tmp_path, monkeypatch):
    s3.faults = lambda method, path, n: Fault(hang_s=30)
    with pytest.raises(
        StoreError, match=r"train-000000-\w+.tar: gave up after \d attempts .*no answer within"
    ):
        make_store(
            tmp_path, retry=RetryPolicy(deadline_s=1.5, attempt_timeout_s=0.5, initial_wait_s=0.1)
        ).shard(dataset.shards[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"train-000000-\w+.tar: gave up after \d+ attempts"):
        make_store(
            tmp_path, retry=RetryPolicy(deadline_s=1, attempt_timeout_s=0.5, initial_wait_s=0.1)
        ).shard(dataset.shards[0])


def test_a_corrupted_download_is_repeated_twice_then_reported(s3, dataset, tmp_path):
    info = dataset.shards[0]
    flips = [True, True]
    s3.faults = lambda method, path, n: (
        Fault(flip=True) if method == "GET" and flips and flips.pop() else None
    )
    store = make_store(tmp_path)
    assert len(store.shard(info)) == info.samples
    assert store.counters.refetches == 2
    s3.faults = lambda method, path, n: (
        Fault(flip=True) if path.endswith(".tar") and method == "GET" else None
    )
    with pytest.raises(
        BadShard, match=r"train-000001-\w+.tar: bad shard: has SHA-256 .*in each of 3 downloads"
    ):
        store.shard(dataset.shards[1])
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_a_truncated_object_is_reported(own, dataset, tmp_path):
    info = dataset.shards[0]
    fs = s3fs.S3FileSystem()
    fs.pipe(f"{own}/{info.path}", fs.cat(f"{own}/{info.path}")[:-512])
    with pytest.raises(BadShard, match=f"has {info.bytes - 512} bytes, the manifest says {info.bytes}"):
        make_store(tmp_path, own).shard(info)


def test_a_truncated_object_is_reported_where_a_range_begins_behind_its_end(
    own, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(store_module, "_RANGE_BYTES", 4096)
    info = dataset.shards[0]
    fs = s3fs.S3FileSystem()
    fs.pipe(f"{own}/{info.path}", fs.cat(f"{own}/{info.path}")[:4096])
    with pytest.raises(BadShard, match=f"has 4096 bytes, the manifest says {info.bytes}"):
        make_store(tmp_path, own).shard(info)
    fs.rm(f"{own}/{info.path}")
    with pytest.raises(BadShard, match="is missing"):
        make_store(tmp_path, own).shard(info)


def test_a_shard_costs_one_request_per_range(s3, dataset, tmp_path, monkeypatch):
    info = dataset.shards[0]
    s3.requests.clear()
    make_store(tmp_path).shard(info).close()
    assert [method for method, path in s3.requests if path.endswith(".tar")] == ["GET"]
    monkeypatch.setattr(store_module, "_RANGE_BYTES", info.bytes // 3 + 1)
    s3.requests.clear()
    make_store(tmp_path / "other").shard(info).close()
    assert [method for method, path in s3.requests if path.endswith(".tar")] == ["GET"] * 3


def test_a_damaged_file_in_the_cache_is_downloaded_again(s3, dataset, tmp_path):
    info = dataset.shards[0]
    store = make_store(tmp_path)
    store.shard(info).close()
    (path,) = (tmp_path / "cache" / "shards").glob("*.tar")
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with store.shard(info) as shard:
        assert all(fields_equal(s, tile(s.key)) for s in shard)
    assert store.counters.downloads == 2


def test_the_budget_is_kept_and_the_least_recently_used_is_evicted(s3, tmp_path):
    url = "s3://shards/four"
    shards = write_shards(Toy(15), url, "train", shard_mb=SMALL).shards
    room = 3 * max(s.bytes for s in shards) + 100
    assert len(shards) == 4
    store = Store(url, tmp_path / "cache", room, QUICK)
    cached = lambda: {p.stem for p in (tmp_path / "cache" / "shards").iterdir()}  # noqa: E731
    pinned = store.shard(shards[0])
    for info in shards[1:3]:
        store.shard(info).close()
    store.shard(shards[1]).close()  # now 2 is the least recently used shard that is not pinned
    store.shard(shards[3]).close()
    assert cached() == {shards[i].sha256 for i in (0, 1, 3)}
    assert store.counters.evictions == 1
    pinned.close()
    store.shard(shards[2]).close()
    assert cached() == {shards[i].sha256 for i in (1, 3, 2)}
    with pytest.raises(CacheFullError, match=r"the budget of .* is less than one shard"):
        Store(URL, tmp_path / "tiny", 1000, QUICK).shard(shards[0])


def test_pinned_shards_are_not_evicted(s3, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SPACE_WAIT_S", 0.2)
    store = Store(URL, tmp_path / "cache", max(s.bytes for s in dataset.shards) + 100, QUICK)
    shard = store.shard(dataset.shards[0])
    with pytest.raises(CacheFullError, match=r"shards in use fill the budget .* raise data.cache_gib"):
        store.shard(dataset.shards[1])
    assert fields_equal(shard[0], tile(shard.keys[0]))
    shard.close()
    assert len(store.shard(dataset.shards[1])) > 0


def test_a_full_disk_is_reported(s3, dataset, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"no space left for a shard .* lower data.cache_gib"):
        make_store(tmp_path).shard(dataset.shards[0])


def test_prefetch(s3, dataset, tmp_path):
    store = make_store(tmp_path)
    store.prefetch(dataset.shards)
    until = time.monotonic() + 20
    while store.counters.downloads < len(dataset.shards) and time.monotonic() < until:
        time.sleep(0.01)
    before = len(s3.requests)
    for info in dataset.shards:
        store.shard(info).close()
    assert len(s3.requests) == before
    store.close()


def fetch_all(cache, infos, forked_store, results):
    store = forked_store or Store(URL, cache, 10**9, QUICK)
    for info in infos:
        with store.shard(info) as shard:
            assert all(fields_equal(s, tile(s.key)) for s in shard)
    results.put(store.counters.downloads)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_two_processes_download_once(s3, dataset, tmp_path, method):
    """With fork the parent has used the store before: the child must not use its client."""
    s3.faults = lambda m, path, n: Fault(hang_s=0.05) if path.endswith(".tar") else None
    parent = make_store(tmp_path)
    infos = dataset.shards
    if method == "fork":
        parent.shard(infos[0]).close()
    context = multiprocessing.get_context(method)
    results = context.Queue()
    store = parent if method == "fork" else None
    processes = [
        context.Process(target=fetch_all, args=(tmp_path / "cache", infos, store, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    for info in infos:
        assert len(gets(s3, info.path)) == 1
    assert list((tmp_path / "cache" / "locks").iterdir()) == []


def test_a_killed_download_releases_its_reservation(s3, dataset, tmp_path):
    info, other, *_ = dataset.shards
    s3.faults = lambda method, path, n: (
        Fault(hang_s=20) if method == "GET" and path.endswith(".tar") else None
    )
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=fetch_all, args=(tmp_path / "cache", [info], None, results))
    process.start()
    until = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("shards/*.part")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    s3.faults = lambda method, path, n: None
    assert list((tmp_path / "cache").glob("shards/*.part"))
    store = Store(URL, tmp_path / "cache", max(info.bytes, other.bytes) + 10, QUICK)
    store.shard(other).close()  # one shard fits: the reservation of the killed process is released
    assert not list((tmp_path / "cache").glob("shards/*.part"))
    assert len(store.shard(info)) == info.samples


def objects(url):
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    path = url.removeprefix("s3://")
    return {p.rpartition("/")[2]: fs.cat(p) for p in (fs.ls(path, refresh=True) if fs.exists(path) else ())}


def held(url, name, process="", lifetime_s=60.0):
    """Put the lease of a writer on another machine, or of a process of this one."""
    content = {
        "owner": "0" * 32,
        "host": "elsewhere",
        "pid": 7,
        "process": process,
        "lifetime_s": lifetime_s,
        "renewals": 3,
    }
    s3fs.S3FileSystem().pipe(f"{url}/{name}", json.dumps(content).encode())


@pytest.mark.slow
def test_a_second_writer_is_refused_before_it_writes(s3):
    url = "s3://shards/second"
    with Writer(url, SPEC, "train") as writer:
        writer.add(tile("a"))
        s3.requests.clear()
        with pytest.raises(
            WriteError,
            match=r"second: another process is writing split 'train': process \d+ on .* holds .*\.train\.lease, which "
            r"expires in \d+ s; wait for it or, if it was killed, try again then",
        ):
            write_shards(Toy(6), url, "train")
        with pytest.raises(WriteError, match="another process is writing split 'train'"):
            write_shards(Toy(6), url, "train", part=WriterPart(1, 2))
        own = {path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"}
        assert own <= {".train.part-1-of-2.lease"}
        write_shards(Toy(3), url, "val")  # another split at the same time
    assert Manifest.load(url).splits == ("val", "train")
    assert verify(url) == []
    assert not [name for name in objects(url) if name.startswith(".")]


def test_a_lease_expires_by_the_clock_of_the_store(s3, monkeypatch):
    url = "s3://shards/expired"
    held(url, ".train.lease")
    with pytest.raises(WriteError, match=r"process 7 on 'elsewhere' holds .* expires in \d+ s"):
        write_shards(Toy(2), url, "train")
    monkeypatch.setattr(lease, "_CLOCK_S", 0.0)
    held(url, ".train.lease", lifetime_s=0.5)
    held(url, ".train.part-1-of-3.lease", lifetime_s=0.5)
    time.sleep(2)  # the store counts whole seconds
    assert write_shards(Toy(2), url, "train").splits == ("train",)
    assert verify(url) == []
    assert not [name for name in objects(url) if name.startswith(".")]


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(s3):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = lease._process_name(child.pid)
    assert process
    held("s3://shards/killed", ".train.lease", process)
    with pytest.raises(WriteError, match="another process is writing"):
        write_shards(Toy(2), "s3://shards/killed", "train")
    child.kill()
    child.wait()
    assert write_shards(Toy(2), "s3://shards/killed", "train").splits == ("train",)


def test_a_writer_that_lost_its_lease_publishes_nothing(s3):
    url = "s3://shards/lost"

    def write():
        with Writer(url, SPEC, "train") as writer:
            writer.add(tile("a"))
            held(url, ".train.lease")  # another one has taken it over

    with pytest.raises(
        WriteError, match="did not respond for 60 s, and another one has taken over split 'train'"
    ):
        write()
    assert "manifest.json" not in objects(url)
    assert ".train.lease" in objects(url)  # of the other writer


@pytest.mark.slow
def test_parts_work_together_and_are_resumed(s3, dataset):
    url = "s3://shards/parts"

    def part(number, keys=()):
        part = WriterPart(number, 2)
        return write_shards(Toy(12, keys), url, "train", shard_mb=SMALL, part=part)

    last = shuffle_keys(toy_keys(12), 0)[-1]
    with pytest.raises(DatasetError):
        part(1, (last,))  # it has written its first shard, number 0, and not number 2
    before = objects(url)
    assert [n for n in before if n.endswith(".tar")] == [dataset.shards[0].path]
    held(url, ".train.part-2-of-2.lease")
    with pytest.raises(WriteError, match=r"another process is writing .*part-2-of-2\.lease"):
        part(2)
    assert part(1) is None  # at the same time as part 2
    assert before.items() <= objects(url).items()
    s3fs.S3FileSystem().rm(f"{url}/.train.part-2-of-2.lease")
    assert part(2) == dataset
    assert verify(url) == []


@pytest.mark.slow
def test_leftovers_are_removed_after_the_publication_and_only_without_other_writers(s3):
    url = "s3://shards/left"
    late = shuffle_keys(toy_keys(20), seed=0)[-1]
    with pytest.raises(DatasetError):
        write_shards(Toy(20, broken=(late,)), url, "train", shard_mb=SMALL / 2)
    left = objects(url)
    assert any(name.endswith(".tar") for name in left)
    held(url, ".train.part-1-of-2.lease")
    write_shards(Toy(4), url, "train", part=WriterPart(2, 2))
    with pytest.raises(WriteError, match="another process"):
        write_shards(Toy(4), url, "train", part=WriterPart(1, 2))
    assert left.items() <= objects(url).items()
    s3fs.S3FileSystem().rm(f"{url}/.train.part-1-of-2.lease")
    (info,) = write_shards(Toy(4), url, "train").shards
    assert set(objects(url)) == {"manifest.json", "manifest.sha256", info.path, index_path(info.path)}


@pytest.mark.slow
def test_raw_data_that_changed_between_two_writers_is_reported(s3, dataset):
    """One shard, written twice by writers with equal settings, with different content."""
    url, other = "s3://shards/changed", "s3://shards/changed-too"
    for place, broken in ((url, ()), (other, shuffle_keys(toy_keys(12), 0)[-1:])):
        write_shards(Toy(12, tuple(broken)), place, "train", shard_mb=SMALL, strict=False)
    fs = s3fs.S3FileSystem()
    fs.rm([f"{url}/manifest.json", f"{url}/manifest.sha256"])
    for path in fs.glob(f"{other}/train-000002-*"):
        fs.copy(path, f"{url}/{path.rpartition('/')[2]}")
    with pytest.raises(
        WriteError,
        match=r"train-000002-\w+.tar and train-000002-\w+.tar are the same shard .*: the raw data has changed",
    ):
        write_shards(Toy(12), url, "train", shard_mb=SMALL, strict=False)
    (stranger,) = {p for p in fs.glob(f"{url}/train-000002-*.tar") if not p.endswith(dataset.shards[2].path)}
    fs.rm([stranger, index_path(stranger)])
    assert write_shards(Toy(12), url, "train", shard_mb=SMALL) == dataset


@pytest.mark.slow
def test_datasets_with_plain_names_are_read_and_extended(s3, tmp_path):
    """As earlier revisions have written them to object stores."""
    url = "s3://shards/plain"
    first = write_shards(Toy(12), str(tmp_path), "train", shard_mb=SMALL)
    fs = s3fs.S3FileSystem()
    for path in tmp_path.glob("*.*"):
        if path.name != "manifest.sha256":
            fs.put_file(str(path), f"{url}/{path.name}")
    assert verify(url) == []
    assert write_shards(Toy(12), url, "train", shard_mb=SMALL) == first  # nothing is written again
    fs.rm([f"{url}/manifest.json", f"{url}/{first.shards[1].path}"])
    resumed = write_shards(Toy(12), url, "train", shard_mb=SMALL)
    again = resumed.shards[1]
    assert [s.path for s in resumed.shards] == [
        "train-000000.tar",
        f"train-000001-{again.sha256[:8]}.tar",
        "train-000002.tar",
    ]
    assert write_shards(Toy(2), url, "val").splits == ("train", "val")
    assert verify(url) == []


def test_a_store_without_conditions_and_clock_is_watched(monkeypatch):
    """memory:// stands for any file system of fsspec: a lease that does not change for its lifetime has expired."""
    monkeypatch.setattr(lease, "LIFETIME_S", 0.4)
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    url = "memory://leases/toy"
    with Writer(url, SPEC, "train") as writer:
        writer.add(tile("a"))
        with pytest.raises(WriteError, match="another process is writing split 'train'"):
            write_shards(Toy(2), url, "train")  # it is renewed meanwhile
        write_shards(Toy(2), url, "val")
    assert Manifest.load(url).splits == ("val", "train")
    fs = fsspec.filesystem("memory")
    fs.pipe("/leases/toy/.test.lease", b"not a lease, and not renewed")
    started = time.monotonic()
    write_shards(Toy(2), url, "test")
    assert time.monotonic() - started > 0.4
    assert verify(url) == []
    assert not [p for p in fs.ls("/leases/toy", detail=False) if "lease" in p.rpartition("/")[2]]
