"""Variants of loading samples from storage into batches; each function measures one, in a separate process.

All variants produce the same batches: the same dates, crops and dtypes, computed by the same code if a variant has none
of its own. ``per-file`` does what the reference's loader does: it opens a GeoTIFF and an HDF5 (or .npy) file per tile
and sensor, parses all dates, takes the median over all dates, and passes float32 to the collate function.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.slow_store import first_request_time
from maestro_scale import datasets
from maestro_scale.shards.format.fields import tile_fields
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.packing import arrays_in, num_bytes
from maestro_scale.stream.source import Source
from maestro_scale.stream.transform import Transform


@dataclass(frozen=True)
class Task:
    """One measurement. ``stage``: decode (full samples as arrays) or batches (transformed, as the trainer gets them).

    ``source_url``: folder, or URL of the slow store, from which the variant reads. ``data``: the dataset's folder.
    """

    dataset: str
    variant: str
    stage: str
    source_url: str
    data: str
    cache: str
    workers: int = 0
    batch: int = 16
    seconds: float = 4.0
    once: bool = False  # a single pass, timed from the first request for a shard


class ArraySample:
    """A sample given as named arrays, with the interface that the transform needs."""

    def __init__(self, key: str, fields: Mapping[str, np.ndarray]) -> None:
        self.key, self._fields = key, fields

    def array(self, name: str, window: Any = None) -> np.ndarray:
        array = self._fields[name]
        return array if window is None else array[(..., *window)]

    def rows(self, name: str, indices: np.ndarray, window: Any = None) -> np.ndarray:
        array = self._fields[name]
        return array[indices] if window is None else array[(indices, ..., *window)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._fields[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._fields[name].dtype


class Batcher:
    """Packs samples into batches of the stream's layout, as blocks of memory; can be pickled."""

    def __init__(self, dataset: str, size: int) -> None:
        spec = datasets.spec(dataset)
        self.size = size
        self._transform = Transform(spec)

    def __call__(self, samples: Iterable[ArraySample]) -> Iterator[torch.Tensor]:
        numbered = enumerate(samples)
        while chunk := list(itertools.islice(numbered, self.size)):
            block = torch.empty(num_bytes(self._transform.fields, len(chunk)), dtype=torch.uint8)
            out = arrays_in(block, self._transform.fields, len(chunk))
            for row, (number, sample) in enumerate(chunk):
                self._transform.train(sample, 0, number, out, row)
            yield block


def measure(task: Task) -> dict[str, float]:
    """Run a measurement; returns samples_per_s and first_s (time until the first sample or batch)."""
    return VARIANTS[task.variant](task)


def maestro_shards(task: Task) -> dict[str, float]:
    """Shards and loader of maestro_scale."""
    started = time.perf_counter()
    spec = datasets.spec(task.dataset)
    store = Store(task.source_url, Path(task.cache), 100 * 2**30)
    shards = Manifest.load(task.source_url).shards_of(["train"])
    if task.stage == "decode":

        def samples() -> Iterator[int]:
            for info in shards:
                with store.shard(info) as shard:
                    for sample in shard:
                        for name in sample.names:
                            sample.array(name)
                        yield 1

        return _rate(task, samples, started)
    source = Source(spec, shards, store)
    order = {"lanes": 1, "global_batch": task.batch, "micro_batch": task.batch}
    num_steps = 10**9
    if task.once:
        # Several windows long, like a large dataset: a run waits for nearly all shards of its first window.
        num_steps, order["window"] = sum(source.counts) // task.batch, sum(source.counts) // 4
    loader = TrainLoader([source], 0, workers=task.workers, **order)
    steps = loader.steps(0, num_steps)
    try:
        return _rate(task, lambda: (task.batch for _ in steps), started)
    finally:
        loader.close()


def per_file(task: Task) -> dict[str, float]:
    """One file per tile and sensor, as released."""
    started = time.perf_counter()
    raw = datasets.open_raw(task.dataset, Path(task.source_url), "train")
    keys = raw.keys()
    if task.stage == "decode":
        return _rate(task, lambda: (_read(raw, key) for key in keys), started)
    data = _Tiles(raw, Batcher(task.dataset, 1))
    loader = torch.utils.data.DataLoader(
        data, batch_size=task.batch, num_workers=task.workers, drop_last=True, shuffle=True
    )
    return _rate(task, lambda: (len(b[0]) for b in loader), started)


def _read(raw: Any, key: str) -> int:
    raw.read(key)
    return 1


class _Tiles(torch.utils.data.Dataset):
    """Tiles read from their files: the date nearest to the median of each bin, as float32."""

    def __init__(self, raw: Any, batcher: Batcher) -> None:
        self._raw, self._keys, self._transform = raw, raw.keys(), batcher._transform

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        tile = self._raw.read(self._keys[i])
        sample = ArraySample(tile.key, tile_fields(tile))
        fields = self._transform.fields
        block = torch.empty(num_bytes(fields, 1), dtype=torch.uint8)
        out = arrays_in(block, fields, 1)
        self._transform.evaluate(sample, i % self._transform.grid.num_crops, out, 0)
        return [torch.from_numpy(out[f][0].astype(np.float32)) for f in fields]


def webdataset(task: Task) -> dict[str, float]:
    """Stock webdataset: tars of .npy members, read in order; from the store by curl, as its manual recommends."""
    import webdataset as wds

    started = time.perf_counter()
    names = sorted(p.name for p in Path(task.data, "webdataset").glob("*.tar"))
    remote = task.source_url.startswith("http")
    urls = [f"pipe:curl -s -f {task.source_url}/{n}" if remote else f"{task.source_url}/{n}" for n in names]
    data = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    if task.stage == "decode":
        return _rate(task, lambda: (1 for _ in data), started)
    data = data.map(_named).compose(Batcher(task.dataset, task.batch))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=task.workers)
    return _rate(task, lambda: (task.batch for _ in loader), started)


def _named(member: Mapping[str, Any]) -> ArraySample:
    arrays = {k.removesuffix(".npy").replace("+", "."): v for k, v in member.items() if k.endswith(".npy")}
    return ArraySample(member["__key__"], arrays)


def mosaicml(task: Task) -> dict[str, float]:
    """mosaicml-streaming: MDS shards, read in order."""
    from streaming import StreamingDataset

    started = time.perf_counter()
    where = {"local": task.source_url}
    if task.source_url.startswith("s3://"):
        where = {"remote": task.source_url, "local": task.cache}
    data = _Mds(StreamingDataset(**where, batch_size=task.batch, shuffle=False))
    if task.stage == "decode":
        return _rate(task, lambda: (1 for _ in data), started)
    prepared = _Prepared(data, Batcher(task.dataset, task.batch))
    loader = torch.utils.data.DataLoader(prepared, batch_size=None, num_workers=task.workers)
    return _rate(task, lambda: (task.batch for _ in loader), started)


class _Mds(torch.utils.data.IterableDataset):
    def __init__(self, data: Iterable[Mapping[str, Any]]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[ArraySample]:
        for sample in self._data:
            yield ArraySample(sample["key"], {k: v for k, v in sample.items() if k != "key"})


class _Prepared(torch.utils.data.IterableDataset):
    def __init__(self, data: Iterable[ArraySample], batcher: Batcher) -> None:
        self._data, self._batcher = data, batcher

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._batcher(self._data)


def memory(task: Task) -> dict[str, Any]:
    """Memory of the loader process over 20,000 samples, in MB: anonymous, and total resident."""
    spec = datasets.spec(task.dataset)
    store = Store(task.source_url, Path(task.cache), 100 * 2**30)
    source = Source(spec, Manifest.load(task.source_url).shards_of(["train"]), store)
    loader = TrainLoader([source], 0, lanes=1, global_batch=task.batch, micro_batch=task.batch, workers=1)
    num_samples, every = int(task.seconds), max(int(task.seconds) // 8, task.batch)
    measured: list[tuple[int, float, float]] = []
    for step in loader.steps(0, num_samples // task.batch + 1):
        if step.samples >= (len(measured) + 1) * every:
            (pid,) = (w.pid for w in loader._pipelines[0]._results._workers)
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if ":" in line
            )
            anonymous, resident = (int(status[k].split()[0]) / 1e3 for k in ("RssAnon", "VmRSS"))
            measured.append((step.samples, round(anonymous, 1), round(resident, 1)))
    loader.close()
    return {
        "samples": step.samples,
        "own_mb": measured[-1][1],
        "resident_mb": measured[-1][2],
        "course": measured,
    }


def first_batch(task: Task) -> dict[str, float]:
    """Seconds to the first batch in a new process (cold), and of a second loader in the same process (warm)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cold = maestro_shards(task)["first_s"]
    return {"cold_s": cold, "warm_s": maestro_shards(task)["first_s"]}


def bare_link(task: Task) -> dict[str, float]:
    """The emulated link alone: as many connections and ranges of the same size as the store uses; data is discarded."""
    import http.client
    import threading
    from urllib.parse import urlsplit

    from maestro_scale.shards.read import store as module

    manifest = Manifest.load(str(Path(task.data, "raw-codec")))
    base = urlsplit(task.source_url)
    jobs = [
        (f"{base.path}/{s.path}", start, min(start + module._RANGE_BYTES, s.bytes))
        for s in manifest.shards_of(["train"])
        for start in range(0, s.bytes, module._RANGE_BYTES)
    ]
    queue, lock = iter(jobs), threading.Lock()

    def fetch() -> None:
        connection = http.client.HTTPConnection(base.hostname, base.port)
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            connection.request("GET", job[0], headers={"Range": f"bytes={job[1]}-{job[2] - 1}"})
            connection.getresponse().read()

    started = time.perf_counter()
    threads = [threading.Thread(target=fetch) for _ in range(module._CONNECTIONS * module._PREFETCH_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - started
    return {"samples_per_s": sum(s.samples for s in manifest.shards_of(["train"])) / elapsed_s}


VARIANTS: dict[str, Callable[[Task], dict]] = {
    "ours": maestro_shards,
    "per-file": per_file,
    "webdataset": webdataset,
    "mosaicml": mosaicml,
    "memory": memory,
    "first": first_batch,
    "link": bare_link,
}


def _rate(task: Task, passes: Callable[[], Iterable[int]], started: float) -> dict[str, float]:
    """Samples per second of wall time, and of this process's CPU time, which other load affects less.

    Either of one pass from the first request, or of as many passes as fit into the time, after a warm-up of a fifth.
    """
    first_s, total, begun, cpu = 0.0, 0, started, time.process_time()
    if task.once:
        first_request_time(os.environ["AWS_ENDPOINT_URL"])
    warm_s = 0.0 if task.once else task.seconds / 5
    done = False
    while not done:
        for count in passes():
            now = time.perf_counter()
            first_s = first_s or now - started
            total += count
            if warm_s and now - started - first_s >= warm_s:
                total, begun, cpu, warm_s = 0, now, time.process_time(), 0.0
            if not task.once and not warm_s and total and now - begun >= task.seconds:
                done = True
                break
        done = done or task.once
    elapsed_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    if task.once:
        elapsed_s = time.monotonic() - first_request_time(os.environ["AWS_ENDPOINT_URL"])
    return {"samples_per_s": total / elapsed_s, "samples_per_cpu_s": total / cpu_s, "first_s": first_s}


if __name__ == "__main__":
    import sys

    print("RESULT", json.dumps(measure(Task(**json.loads(sys.argv[1])))), flush=True)
    os._exit(0)  # do not wait for threads of libraries
