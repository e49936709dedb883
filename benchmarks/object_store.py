"""Reading shards from object stores: clients side by side, the share of the link, requests, first batch.

    python -m benchmarks.object_store --work /tmp/object_store [--rounds 3] [--datasets treesatai_ts] [--ceph PROGRAM]

The store is an emulated one (benchmarks/slow_store.py) with 30 ms of latency and a rate per connection, once so low
that only the link counts and once so high that the processor does, since the store runs on the same cores. --ceph: a
program whose `up` starts a real S3 server and prints `export AWS_…=…`, and whose `down` stops it. In each round:

- clients: the same ranges of 8 MiB over eight connections by http.client (*bare*), by s3fs, by botocore as the loader
  reads (*ours*), and by obstore, which need not be installed.
- passes: all shards of a dataset through the Store of the loader, with an empty cache (download, SHA-256, write, read
  every field), beside the same ranges by bare connections.

Then the seconds from the creation of a loader with one worker process to its
first batch, in a new process with an empty cache. Writes benchmarks/results/object_store.json.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.loading.data import BATCH, TILES, build, shards_of
from benchmarks.slow_store import Requests, requests_since, serve
from maestro_scale import datasets
from maestro_scale.remote.reader import RemoteReader
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import git_revision

DELAY_S = 0.03
RATES = (5e6, 40e6)  # bytes per second and connection
CONNECTIONS = 8  # of the store
RANGE_BYTES = 8 * 2**20
PASS_BYTES = 128e6  # of a pass, at least one shard
CACHE_BYTES = 100 * 2**30
_CEPH_LOCK = Path(tempfile.gettempdir(), "s3.lock")

Read = Callable[[str, int, int], Sized]
Range = tuple[str, int, int]


@dataclass(frozen=True)
class Cost:
    """Of reading ranges: MB/s, and seconds of processor time of this process per GB."""

    mb_per_s: float
    cpu_s_per_gb: float


def read_all(read: Read, ranges: Sequence[Range]) -> Cost:
    """Read every range over ``CONNECTIONS`` threads; the data is discarded."""
    queue, lock = iter(ranges), threading.Lock()
    errors: list[Exception] = []

    def work() -> None:
        while True:
            with lock:
                item = next(queue, None)
            if item is None or errors:
                return
            try:
                if len(read(*item)) != item[2] - item[1]:
                    raise OSError(f"{item}: another number of bytes")
            except Exception as error:  # noqa: BLE001 - raised below, in the thread of the caller
                errors.append(error)

    started, busy = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    size = sum(stop - start for _, start, stop in ranges)
    elapsed_s, busy_s = time.perf_counter() - started, time.process_time() - busy
    return Cost(size / elapsed_s / 1e6, busy_s / size * 1e9)


def bare(address: Callable[[str], str]) -> Read:
    """Reads by http.client, a connection per thread. ``address``: name of an object → URL."""
    own = threading.local()

    def read(name: str, start: int, stop: int) -> bytes:
        url = urlsplit(address(name))
        if not hasattr(own, "connection"):
            assert url.hostname is not None
            own.connection = http.client.HTTPConnection(url.hostname, url.port)
        path = f"{url.path}?{url.query}" if url.query else url.path
        own.connection.request("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"})
        return own.connection.getresponse().read()

    return read


def by_s3fs(url: str) -> Read:
    """Reads by s3fs, whose requests all run in one event loop."""
    import s3fs

    fs, path = s3fs.S3FileSystem(skip_instance_cache=True), url.removeprefix("s3://")
    return lambda name, start, stop: fs.cat_file(f"{path}/{name}", start=start, end=stop)


def by_ours(url: str) -> Read:
    """Reads as the Store does: by botocore's client, in the thread of the caller."""
    return RemoteReader(url, RetryPolicy(), lambda: None).read_range


def by_obstore(url: str) -> Read:
    """Reads by obstore. ImportError where it is not installed."""
    import obstore
    from obstore.store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix=prefix or None, client_options={"allow_http": True})

    def read(name: str, start: int, stop: int) -> bytes:
        return obstore.get_range(store, name, start=start, end=stop)

    return read


def ranges_of(shards: Sequence[ShardInfo]) -> list[Range]:
    """The ranges that the Store reads of shards."""
    return [
        (s.path, start, min(start + RANGE_BYTES, s.bytes))
        for s in shards
        for start in range(0, s.bytes, RANGE_BYTES)
    ]


def some_shards(folder: Path) -> list[ShardInfo]:
    """The first shards of a dataset, up to ``PASS_BYTES``."""
    found: list[ShardInfo] = []
    size = 0
    for info in Manifest.load(str(folder)).shards_of(["train"]):
        if found and size + info.bytes > PASS_BYTES:
            break
        found.append(info)
        size += info.bytes
    return found


def one_pass(store: str, url: str, shards: Sequence[ShardInfo], cache: Path) -> tuple[float, Requests]:
    """Seconds from the first request for a shard until every field of the shards has been read, and the requests.

    The cache is empty: shards are downloaded, verified and written to it.
    """
    shutil.rmtree(cache, ignore_errors=True)
    requests_since(store)
    reader = Store(url, cache, CACHE_BYTES)
    reader.prefetch(shards)
    for info in shards:
        with reader.shard(info) as shard:
            for sample in shard:
                for name in sample.names:
                    sample.array(name)
    ended = time.monotonic()
    reader.close()
    seen = requests_since(store)
    assert seen.first is not None
    return ended - seen.first, seen


def object_url(folder: str, name: str) -> str:
    """URL of an object of the emulated store."""
    return f"{folder}/{name}"


def clients(url: str, address: Callable[[str], str]) -> dict[str, Read]:
    """The clients by name. ``address``: of an object, for bare connections."""
    found = {"bare": bare(address), "ours": by_ours(url), "s3fs": by_s3fs(url)}
    with suppress(ImportError):
        found["obstore"] = by_obstore(url)
    return found


def compare_clients(
    place: str, readers: dict[str, Read], ranges: Sequence[Range], rounds: int
) -> dict[str, Any]:
    """The result of reading the same ranges by each client, by turns."""
    found: dict[str, Any] = {"place": place}
    for read in readers.values():  # imports, settings and connections do not count
        read_all(read, [(name, start, start + 1) for name, start, _ in ranges[:CONNECTIONS]])
    for _ in range(rounds):
        for name, read in readers.items():
            cost = read_all(read, ranges)
            of_client = found.setdefault(name, {"mb_per_s": [], "cpu_s_per_gb": []})
            of_client["mb_per_s"].append(round(cost.mb_per_s, 1))
            of_client["cpu_s_per_gb"].append(round(cost.cpu_s_per_gb, 3))
            print(f"{place}, {name}: {cost}", file=sys.stderr, flush=True)
    return found


def compare_passes(
    dataset: str, codec: str, folder: Path, store: str, rate: float, rounds: int, cache: Path
) -> dict[str, Any]:
    """The result of passes over a dataset beside the bare link.

    The fewest requests possible: one per range of 8 MiB.
    """
    shards, url = some_shards(folder), f"s3://{dataset}/{folder.name}"
    size, samples = sum(s.bytes for s in shards), sum(s.samples for s in shards)
    read = bare(partial(object_url, f"{store}/{dataset}/{folder.name}"))
    speeds, shares = [], []
    for _ in range(rounds):
        link = read_all(read, ranges_of(shards)).mb_per_s
        seconds, seen = one_pass(store, url, shards, cache)
        speeds.append(round(size / seconds / 1e6, 1))
        shares.append(round(speeds[-1] / link, 3))
    row = {
        "dataset": dataset,
        "codec": codec,
        "link_mb_per_s": CONNECTIONS * rate / 1e6,
        "shards": len(shards),
    }
    row |= {
        "samples": samples,
        "bytes": size,
        "mb_per_s": speeds,
        "share": shares,
        "get": seen.get,
        "head": seen.head,
    }
    row |= {"fewest_requests": len(ranges_of(shards))}
    print(row, file=sys.stderr, flush=True)
    return row


def first_batch(url: str, dataset: str, cache: Path) -> float:
    """Seconds from the creation of the loader to its first batch, with one worker process."""
    started = time.perf_counter()
    store = Store(url, cache, CACHE_BYTES)
    source = Source(datasets.spec(dataset), Manifest.load(url).shards_of(["train"]), store)
    size = BATCH[dataset]
    loader = TrainLoader([source], 0, lanes=1, global_batch=size, micro_batch=size, workers=1)
    try:
        next(loader.steps(0, 10))
        return time.perf_counter() - started
    finally:
        loader.close()


def first_batches(dataset: str, folder: Path, cache: Path, rounds: int) -> list[float]:
    """``first_batch`` in new processes with an empty cache."""
    found = []
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.object_store", "--work", str(cache)]
        command += ["--first-batch", f"s3://{dataset}/{folder.name}", dataset]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(round(float(done.stdout.split()[-1]), 2))
    return found


@contextmanager
def ceph(program: str, bucket: str, files: Sequence[Path]) -> Iterator[None]:
    """A real S3 server with the files, to which the environment points."""
    before = dict(os.environ)
    with _CEPH_LOCK.open(
        "w"
    ) as held:  # only one can run per machine; tests/services/conftest.py takes it, too
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            done = subprocess.run([program, "up"], capture_output=True, text=True, timeout=300, check=True)
            os.environ.update(re.findall(r"(AWS_\w+)=(\S+)", done.stdout))
            _upload(bucket, files)
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            subprocess.run([program, "down"], capture_output=True, timeout=60, check=False)


def _upload(bucket: str, files: Sequence[Path]) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir(bucket)
    for path in files:
        fs.put_file(str(path), f"{bucket}/{path.name}")


def signed(bucket: str) -> Callable[[str], str]:
    """Signed URLs of the objects of a bucket."""
    import s3fs

    fs, known = s3fs.S3FileSystem(skip_instance_cache=True), {}

    def address(name: str) -> str:
        if name not in known:
            known[name] = fs.url(f"{bucket}/{name}", expires=3600)
        return known[name]

    return address


def measure(folders: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """The part of the result that is measured."""
    cache = args.work / "cold"
    found: dict[str, Any] = {"clients": [], "passes": [], "first_batch_s": {}}
    client, folder = next(iter(folders.items()))
    folder = shards_of(folder, "raw")
    ranges = ranges_of(some_shards(folder))
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for rate in RATES:
        with serve(args.work, DELAY_S, rate) as store:
            os.environ |= {"AWS_ENDPOINT_URL": store, "AWS_ALLOW_HTTP": "true"}
            url = f"s3://{client}/{folder.name}"
            readers = clients(url, partial(object_url, f"{store}/{client}/{folder.name}"))
            place = f"emulated, {CONNECTIONS * rate / 1e6:.0f} MB/s"
            found["clients"].append(compare_clients(place, readers, ranges, args.rounds))
            for dataset, data in folders.items():
                for codec in CODECS:
                    shards = shards_of(data, codec)
                    row = compare_passes(dataset, codec, shards, store, rate, args.rounds, cache)
                    found["passes"].append(row)
            if rate == RATES[-1]:
                for dataset, data in folders.items():
                    seconds = first_batches(dataset, shards_of(data, "raw"), cache, args.rounds)
                    found["first_batch_s"][dataset] = seconds
    if args.ceph:
        paths = [folder / s.path for s in some_shards(folder)]
        with ceph(args.ceph, "shards", paths):
            readers = clients("s3://shards", signed("shards"))
            found["clients"].append(compare_clients("Ceph", readers, ranges, args.rounds))
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, kept; 4 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datasets", nargs="+", default=list(TILES), choices=list(TILES))
    parser.add_argument("--ceph", metavar="PROGRAM", help="starts and stops a real S3 server")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "object_store.json")
    parser.add_argument("--first-batch", nargs=2, metavar=("URL", "DATASET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_batch:
        url, dataset = args.first_batch
        print(first_batch(url, dataset, args.work))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    folders = {name: build(args.work, name) for name in args.datasets}
    record = {"revision": git_revision(), "rounds": args.rounds, "delay_s": DELAY_S}
    record["versions"] = {name: _version(name) for name in ("s3fs", "obstore")}
    record |= measure(folders, args)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


if __name__ == "__main__":
    sys.exit(main())
