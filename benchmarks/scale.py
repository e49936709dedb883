"""300,000 shards and 100 million samples on one simulated store, read by 1,024 ranks of 8 loader processes each.

    python -m benchmarks.scale --work /scratch/scale --rounds 3

Nothing is downloaded: the manifest is real, its shards are not. What a rank computes does not depend on the others, so
ranks are simulated one after the other, and only those of --nodes of the nodes; totals are scaled to all nodes.

Start: one process for each role, --rounds times, from the bytes of the manifest to a loader that knows its order.
``every rank``: parses the manifest and hashes its shards, as each rank did in earlier revisions. ``first``: rank 0,
which reads for its node, finds no parsed manifest, and hashes the shards for all ranks. ``again``: the same at the next
start. ``other``: the other ranks of a node, which map the manifest. Processor seconds, and memory that the process does
not share.

Loader process: bytes that are pickled for it, and its processor seconds to unpickle them.

Order: processor seconds of the first request after a jump to step 500,000, of a step, and of the step at which an epoch
begins, per rank.

Requests: which shards a node asks for at each step, from the requests of its ranks (``TrainLoader``), each once per
node, times the requests that the project's ``Store`` makes for a shard, counted with a real one in memory. Over a
window of the order after the start, and over a window on each side of a change of the epoch. Shards are asked for
``lookahead`` steps before their window begins, so what a node asks for in one step is a queue and not a rate.

Prints a table, writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.datasets.treesatai_ts.reader import SPEC
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.manifest_cache import load_manifest, mapped_manifest
from maestro_scale.shards.read.store import _RANGE_BYTES, Store
from maestro_scale.shards.storage import RemoteStorage
from maestro_scale.stream.batch_builder import BatchBuilder, BuilderSettings
from maestro_scale.stream.loader import TrainLoader, _Lookahead
from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import _WorkerDataset

SHARDS, SAMPLES, SHARD_BYTES = 300_000, 100_000_000, 128_000_000
RANKS, PER_NODE, WORKERS = 1024, 8, 8
GLOBAL_BATCH, WINDOW, JUMP = 8192, 4096, 500_000
ROLES = ("every rank", "first", "again", "other")
SPLIT = "train"


def write_manifest(folder: Path) -> str:
    """Write the manifest; returns its SHA-256. Shards differ in size by up to a tenth."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = np.full(SHARDS, SAMPLES // SHARDS)
    samples[: SAMPLES % SHARDS] += 1
    sizes = (SHARD_BYTES * rng.uniform(0.9, 1.1, SHARDS)).astype(int).tolist()
    shards = tuple(
        ShardInfo(f"{SPLIT}-{i:06d}.tar", SPLIT, size, count, hashlib.sha256(b"%d" % i).hexdigest())
        for i, (size, count) in enumerate(zip(sizes, samples.tolist(), strict=True))
    )
    manifest = Manifest(1, SPEC, shards)
    (folder / "manifest.json").write_text(manifest.dumps())
    return manifest.digest


def source_of(manifest: Manifest, work: Path) -> Source:
    """The source of a training on the dataset."""
    return Source(
        manifest.spec, manifest.shards_of([SPLIT]), Store("s3://simulated", work / "cache", 100 * 2**30)
    )


def loader_of(source: Source, rank: int) -> TrainLoader:
    """The loader of a rank, without its processes."""
    loader = TrainLoader(
        [source],
        seed=0,
        lanes=RANKS,
        global_batch=GLOBAL_BATCH,
        micro_batch=8,
        rank=rank,
        world=RANKS,
        window=WINDOW,
    )
    loader.workers = WORKERS
    return loader


@dataclass
class Clock:
    """Processor seconds of this process by part."""

    parts: dict[str, float]

    def measure(self, name: str, action: Callable[[], Any]) -> Any:
        """The result of ``action``, whose time is added to the part ``name``."""
        started = time.process_time()
        result = action()
        self.parts[name] = self.parts.get(name, 0.0) + time.process_time() - started
        return result


def private_bytes() -> int:
    """Memory of this process that it shares with no other and with no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def play(role: str, work: Path, digest: str) -> None:
    """Start as one rank, and print what it took as JSON."""
    gc.collect()
    clock, before = Clock({}), private_bytes()
    url, cache = str(work / "data"), work / "cache"
    if role == "every rank":
        manifest = clock.measure("manifest", lambda: Manifest.load(url))
        clock.measure("digest of the splits", lambda: manifest.digest_of([SPLIT]))
    elif role == "other":
        manifest = clock.measure("manifest", lambda: mapped_manifest(cache, digest))
    else:
        manifest = clock.measure("manifest", lambda: load_manifest(url, cache))
        assert manifest.digest == digest
        clock.measure("digest of the splits", lambda: manifest.digest_of([SPLIT]))
    source = clock.measure("source", lambda: source_of(manifest, work))
    loader = clock.measure("order", lambda: loader_of(source, 5))
    gc.collect()
    found = {
        "processor_s": sum(clock.parts.values()),
        "parts": clock.parts,
        "bytes": private_bytes() - before,
    }
    print(json.dumps(found | {"steps_per_epoch": loader.steps_per_epoch}))


def measure_start(work: Path, digest: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What ``play`` prints, by role, in each round."""
    found: dict[str, list[dict[str, Any]]] = {role: [] for role in ROLES}
    for _ in range(rounds):
        shutil.rmtree(work / "cache" / "manifests", ignore_errors=True)
        for role in ROLES:
            command = [sys.executable, "-m", "benchmarks.scale", "--work", str(work), "--role", role]
            done = subprocess.run([*command, "--digest", digest], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{role}: {done.stderr}")
            found[role].append(json.loads(done.stdout))
    return found


def measure_worker(source: Source) -> dict[str, float]:
    """What starting a loader process takes."""
    dataset = _WorkerDataset(BatchBuilder(BuilderSettings((source,))), torch.empty(1, dtype=torch.uint8))
    clock = Clock({})
    data = bytes(clock.measure("pickle", lambda: ForkingPickler.dumps(dataset)))
    clock.measure("unpickle", lambda: ForkingPickler.loads(data))
    return {"bytes": len(data), "pickle_s": clock.parts["pickle"], "unpickle_s": clock.parts["unpickle"]}


def measure_order(source: Source, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of one rank: of the first request after a jump, of a usual step, and of a change of epoch."""
    found: dict[str, list[float]] = {"jump_s": [], "step_s": [], "epoch_s": []}
    for number in range(rounds):
        loader = loader_of(source, 37 * number)
        clock = Clock({})
        requests = loader._requests(JUMP, 2 * JUMP)
        clock.measure("jump", lambda: next(requests))  # noqa: B023 # called here
        clock.measure("steps", lambda: [next(requests) for _ in range(100)])  # noqa: B023
        change = (JUMP // loader.steps_per_epoch + 1) * loader.steps_per_epoch
        requests = loader._requests(change - 20, 2 * JUMP)
        for _ in range(20):
            next(requests)
        clock.measure("epoch", lambda: next(requests))  # noqa: B023
        found["jump_s"].append(clock.parts["jump"])
        found["step_s"].append(clock.parts["steps"] / 100)
        found["epoch_s"].append(clock.parts["epoch"])
    return found


def requests_of_a_shard(work: Path) -> dict[str, Any]:
    """Requests by kind that the store makes for one shard of ``SHARD_BYTES``, counted with one of 20 MB in memory."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for i in range(2):
            member = tarfile.TarInfo(f"{i}.safetensors")
            member.size = 10_000_000
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    data = tar.getvalue()
    fsspec.filesystem("memory").pipe("/scale/train-000000.tar", data)
    info = ShardInfo("train-000000.tar", SPLIT, len(data), 2, hashlib.sha256(data).hexdigest())
    counts = {"HEAD": 0, "range GET": 0}
    size, read_range = RemoteStorage.size, RemoteStorage.read_range

    def counted(kind: str, method: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[kind] += 1
            return method(*args)

        return call

    RemoteStorage.size, RemoteStorage.read_range = counted("HEAD", size), counted("range GET", read_range)  # type: ignore[method-assign]
    try:
        Store("memory://scale", work / "one", 2**30).ensure(info)
    finally:
        RemoteStorage.size, RemoteStorage.read_range = size, read_range  # type: ignore[method-assign]
    assert counts["range GET"] == -(-len(data) // _RANGE_BYTES)
    return {"HEAD": counts["HEAD"], "range GET": -(-SHARD_BYTES // _RANGE_BYTES), "counted": counts}


def downloads_of_node(source: Source, node: int, start: int, steps: int) -> Iterator[tuple[int, int]]:
    """(shards that a node asks for, those of them whose samples the step uses) at each step."""
    ranks = [loader_of(source, rank) for rank in range(node * PER_NODE, (node + 1) * PER_NODE)]
    streams = [loader._requests(start, start + steps) for loader in ranks]
    there: set[int] = set()
    for _ in range(steps):
        asked: set[int] = set()
        used: set[int] = set()
        for stream in streams:
            request = next(stream)  # one micro-batch per step
            used.update(ref.shard for ref in request.refs)
            asked.update(request.prefetch)
        new = (asked | used) - there
        there |= new
        yield len(new), len(new & used)


def measure_requests(source: Source, nodes: int, per_shard: dict[str, Any], step_s: float) -> dict[str, Any]:
    """Downloads and requests per second of all nodes, from ``nodes`` of them."""
    per_epoch = SAMPLES // GLOBAL_BATCH
    window = WINDOW * RANKS // GLOBAL_BATCH  # steps
    change = (JUMP // per_epoch + 1) * per_epoch
    all_nodes = RANKS // PER_NODE
    chosen = [all_nodes * i // nodes for i in range(nodes)]
    order = loader_of(source, 0)._orders[0]
    found: dict[str, Any] = {"lookahead": _Lookahead(order, 0, RANKS, JUMP, WORKERS)._reach}
    for name, start, windows in ("after the start", JUMP, 1), ("epoch change", change - 2 * window, 2):
        # (nodes, steps, 2): new shards that a node asks for, and those of them that the step itself uses. In the first
        # window each lane asks for what it needs until the end of the next one: a queue, apart from the rate after it.
        steps = (1 + windows) * window
        asked = np.array([list(downloads_of_node(source, n, start, steps)) for n in chosen])
        first, later = asked[:, :window], asked[:, window:, 0]
        rate = later.mean() * all_nodes / step_s
        found[name] = {
            "shards_per_s": rate,
            "head_per_s": rate * per_shard["HEAD"],
            "range_get_per_s": rate * per_shard["range GET"],
            "gb_per_s": rate * SHARD_BYTES / 1e9,
            "gb_per_s_of_a_node": rate * SHARD_BYTES / 1e9 / all_nodes,
            "most_shards_in_a_step_of_a_node": int(later.max()),
            "first_step_of_a_node": float(first[:, 0, 1].mean()),
            "first_window_of_a_node": float(first[:, :, 0].sum(1).mean()),
        }
    # At every start: one rank of each node reads the manifest, and its checksum file.
    found["manifest_get"] = 2 * all_nodes
    found["least_shards_per_s"] = GLOBAL_BATCH / (SAMPLES / SHARDS) / step_s
    return found


def main() -> int:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/maestro-scale"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=4, help="nodes of 8 ranks that are simulated")
    parser.add_argument("--step-s", type=float, default=1.0, help="seconds of a training step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--digest", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        play(args.role, args.work, args.digest)
        return 0
    shutil.rmtree(args.work, ignore_errors=True)
    started = time.monotonic()
    digest = write_manifest(args.work / "data")
    manifest_bytes = (args.work / "data" / "manifest.json").stat().st_size
    start = measure_start(args.work, digest, args.rounds)
    manifest = mapped_manifest(args.work / "cache", digest)
    assert manifest is not None
    source = source_of(manifest, args.work)
    per_shard = requests_of_a_shard(args.work)
    (mapped,) = (args.work / "cache" / "manifests").iterdir()
    result = {
        "shards": SHARDS,
        "samples": SAMPLES,
        "ranks": RANKS,
        "workers": WORKERS,
        "global_batch": GLOBAL_BATCH,
        "window": WINDOW,
        "step_s": args.step_s,
        "simulated": f"{args.nodes * PER_NODE} of {RANKS} ranks, one after the other",
        "manifest_bytes": manifest_bytes,
        "mapped_bytes": mapped.stat().st_size,
        "start": start,
        "worker": measure_worker(source),
        "order": measure_order(source, args.rounds),
        "requests_per_shard": per_shard,
        "requests": measure_requests(source, args.nodes, per_shard, args.step_s),
        "load_average": os.getloadavg()[0],
    }
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["seconds"] = time.monotonic() - started
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(args.work)
    _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    table = Table("start of a rank", "processor s", "own memory, MB")
    for role, runs in result["start"].items():
        seconds = [r["processor_s"] for r in runs]
        size = statistics.median(r["bytes"] for r in runs) / 1e6
        table.add_row(
            role, f"{statistics.median(seconds):.2f} [{min(seconds):.2f}–{max(seconds):.2f}]", f"{size:.0f}"
        )
    Console(width=110).print(table)
    table = Table(
        "requests of all nodes",
        "shards/s",
        "HEAD/s",
        "range GET/s",
        "GB/s",
        "most shards in a step of a node",
    )
    for name in ("after the start", "epoch change"):
        r = result["requests"][name]
        values = (r[k] for k in ("shards_per_s", "head_per_s", "range_get_per_s", "gb_per_s"))
        table.add_row(name, *(f"{v:.1f}" for v in values), str(r["most_shards_in_a_step_of_a_node"]))
    Console(width=130).print(table)
    order = {name: f"{1e3 * statistics.median(values):.2f} ms" for name, values in result["order"].items()}
    print(order, result["worker"], f"{result['peak_memory_bytes'] / 1e6:.0f} MB, {result['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
