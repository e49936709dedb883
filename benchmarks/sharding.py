"""Sharding of FLAIR-HUB compared with only reading its files; time and memory for the metadata.

    python benchmarks/sharding.py --work /scratch/sharding --tiles 2000 --workers 2

Synthesises --scenes tiles and copies their files to the names of the others (once; kept in --work). Then it measures,
with the files evicted from the page cache before every run: reading every file once with rasterio in the same number of
processes; `maestro-scale shard` from start to manifest; the memory of its processes with a quarter and with all of the
tiles; and opening the metadata of 241,100 patches, once with dates shared by the patches of a zone, once with different
dates for each. On a shared machine compare CPU times. Prints a table and writes benchmarks/results/sharding.json. Exit
code 1 if sharding takes more than 1.5 times as long as reading, the metadata 20 s or more, or a process with four times
the tiles more than 1.1 times the memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from maestro_scale import datasets
from maestro_scale.datasets.flair_hub import reader as flair_hub
from maestro_scale.datasets.flair_hub import synth as flair_hub_synth
from maestro_scale.datasets.synthetic.output import Destination
from maestro_scale.training.run_dir import git_revision

NUM_PATCHES, NUM_ZONES, NUM_DOMAINS = 241_100, 2_822, 74
NUM_DATES = {
    "SENTINEL2": 91,
    "SENTINEL1-ASC": 94,
    "SENTINEL1-DESC": 94,
}  # mean numbers per zone in the release
PRODUCTS = (
    *(flair_hub.PRODUCTS[m.name] for m in flair_hub.SPEC.modalities),
    flair_hub.S2_MASK,
    flair_hub.COSIA,
)
MAX_RATIO, MAX_METADATA_S, MAX_GROWTH = 1.5, 20.0, 1.1


def write_raw(src: Path, tiles: int, scenes: int) -> list[str]:
    """Write ``tiles`` tiles that reuse the files of ``scenes`` synthetic ones under new names; returns the keys."""
    pattern = src.parent / f"scenes-{scenes}"
    datasets.synth("flair_hub", pattern, scenes, 0)
    patches = flair_hub_synth.patches(tiles, 0)
    target = Destination(src, {"dataset": "flair_hub", "tiles": tiles, "scenes": scenes})
    given = flair_hub.Folders(pattern, frozenset(os.listdir(pattern)))
    for i, patch in enumerate(patches):
        domain, zone, position = patch.key.split("_")
        for product in PRODUCTS:
            folder = f"{domain}_{product.name}"
            source = given.path(patches[i % scenes].key, product)
            name = f"{folder}/{zone}/{folder}_{zone}_{position}.tif"
            target.write(name, partial(shutil.copyfile, source))
    keys = [patch.key for patch in patches]
    outlines = [flair_hub_synth.square(*patch.origin) for patch in patches]
    for sensor in dict.fromkeys(product.dates for product in PRODUCTS):
        days = [patches[i % scenes].dates[sensor] for i in range(tiles)]
        texts = [json.dumps({str(n): int(d) for n, d in enumerate(of_patch, 1)}) for of_patch in days]
        table = {"patch_id": np.array(keys, object), "acquisition_dates": np.array(texts, object)}
        target.write(
            f"{flair_hub.FOLDER}/GLOBAL_{sensor}_MTD_DATES.gpkg",
            partial(flair_hub_synth.write_gpkg, columns=table, outlines=outlines),
        )
    return keys


def preset_files(src: Path, keys: list[str]) -> list[Path]:
    """All files that the preset needs of these patches."""
    folders = flair_hub.Folders(src, frozenset(os.listdir(src)))
    return [folders.path(key, product) for key in keys for product in PRODUCTS]


def read_all(paths: list[Path]) -> None:
    """The lower bound: open and read every file."""
    import rasterio

    for path in paths:
        with rasterio.open(path) as raster:
            raster.read()


def evict(paths: list[Path]) -> int:
    """Evict files from the page cache; returns their bytes."""
    total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    return total


class Cost(NamedTuple):
    """Cost of a run: wall time, CPU time, and the peak memory of any of its processes."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def cost_of(processes: Callable[[], list[int]], wait: Callable[[float], bool], started: float) -> Cost:
    """Measure processes until ``wait(seconds)`` returns that they have ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    while not wait(0.1):
        peak = max([peak, *(_peak_bytes(pid) for pid in processes())])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.perf_counter() - started, cpu_s, peak)


def timed_read(paths: list[Path], workers: int) -> Cost:
    """Read the files in ``workers`` new processes."""
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    processes = [context.Process(target=read_all, args=(paths[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()

    def over(timeout_s: float) -> bool:
        multiprocessing.connection.wait([p.sentinel for p in processes], timeout_s)
        return not any(p.is_alive() for p in processes)

    cost = cost_of(lambda: [p.pid for p in processes if p.pid is not None], over, started)
    if any(p.exitcode for p in processes):
        raise SystemExit("a reading process failed")
    return cost


def timed_shard(src: Path, dst: Path, split: str, workers: int) -> Cost:
    """Run `maestro-scale shard`, from start to manifest."""
    shutil.rmtree(dst, ignore_errors=True)
    program = Path(sys.executable).parent / "maestro-scale"
    command = [
        str(program),
        "shard",
        "flair_hub",
        str(src),
        str(dst),
        f"--split={split}",
        f"--workers={workers}",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def over(timeout_s: float) -> bool:
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    cost = cost_of(lambda: [process.pid, *_children(process.pid)], over, started)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return cost


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def write_metadata(src: Path, own_dates: bool) -> None:
    """Write the GeoPackages of a dataset as large as the release, with empty folders."""
    rng = np.random.default_rng(0)
    zones = [f"D{i % NUM_DOMAINS:03d}-2019_AF-S1-{i}" for i in range(NUM_ZONES)]
    keys = np.array([f"{zones[i % NUM_ZONES]}_{i // NUM_ZONES}-0" for i in range(NUM_PATCHES)], object)
    days = [int(f"2019{m:02d}{d:02d}") for m in range(1, 13) for d in range(1, 29)]

    def series(count: int) -> str:
        chosen = np.sort(rng.permutation(len(days))[:count])
        return json.dumps({str(n): days[i] for n, i in enumerate(chosen, start=1)})

    def write(path: Path, count: int) -> None:
        if count == 1:
            column, texts = "date", ["20190704"] * NUM_PATCHES
        else:
            column = "acquisition_dates"
            different = [series(count) for _ in (keys if own_dates else zones)]
            texts = [different[i % len(different)] for i in range(NUM_PATCHES)]
        table = {"patch_id": keys, column: np.array(texts, object)}
        outline = flair_hub_synth.square(600_000.0, 6_800_000.0)
        flair_hub_synth.write_gpkg(path, table, [outline] * NUM_PATCHES)

    target = Destination(src, {"dataset": "metadata", "own_dates": str(own_dates)})
    for sensor, count in ({"AERIAL": 1} | NUM_DATES).items():
        target.write(f"{flair_hub.FOLDER}/GLOBAL_{sensor}_MTD_DATES.gpkg", partial(write, count=count))
    for product in PRODUCTS:
        for i in range(NUM_DOMAINS):
            (src / f"D{i:03d}-2019_{product.name}").mkdir(exist_ok=True)
    target.write_text("train.csv", "\n".join(["patch_id", *keys]) + "\n")


def measure_metadata(src: Path, results: multiprocessing.SimpleQueue) -> None:
    """Put into ``results``: wall and CPU seconds to open all patches, bytes sent to a worker, peak memory."""
    started, started_cpu = time.perf_counter(), time.process_time()
    reader = datasets.open_raw("flair_hub", src, "train")
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    if len(reader.keys()) != NUM_PATCHES:
        raise SystemExit(f"{src}: {len(reader.keys())} patches were read")
    results.put((elapsed_s, cpu_s, len(pickle.dumps(reader)), _peak_bytes(os.getpid())))


def in_fresh_process(work: Callable[..., None], *args: object) -> tuple:
    """What ``work`` puts into a queue, in a new process with nothing else in memory."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(*args, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} ended with exit code {process.exitcode}")
    return results.get()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder on the disk to measure; 9 MB per tile"
    )
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=100, help="number of different tiles")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharding.json")
    args = parser.parse_args()

    raw, shards = args.work / f"raw-{args.tiles}", args.work / "shards"
    every = write_raw(raw, args.tiles, min(args.scenes, args.tiles))
    quarter = every[: len(every) // 4]
    for name, keys in (("every", every), ("quarter", quarter)):
        (raw / f"{name}.csv").write_text("\n".join(["patch_id", *keys]) + "\n")
    paths = preset_files(raw, every)
    os.sync()
    rounds: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        num_bytes = evict(paths)
        reading = timed_read(paths, args.workers)
        evict(paths)
        sharding = timed_shard(raw, shards, "every", args.workers)
        rounds.append({"read": reading._asdict(), "shard": sharding._asdict(), "load": os.getloadavg()[0]})
        print(f"read {reading}, shard {sharding}, load {os.getloadavg()[0]:.1f}", flush=True)
    quarter_peak = timed_shard(raw, shards, "quarter", args.workers).peak_bytes
    shutil.rmtree(shards)

    metadata = {}
    for name, own_dates in (("dates of zones", False), ("dates of patches", True)):
        src = args.work / f"metadata-{'own' if own_dates else 'shared'}"
        write_metadata(src, own_dates)
        os.sync()
        files = sorted((src / flair_hub.FOLDER).iterdir())
        num_bytes_metadata = evict(files)
        elapsed_s, cpu_s, sent, peak_bytes = in_fresh_process(measure_metadata, src)
        metadata[name] = {
            "seconds": elapsed_s,
            "cpu_s": cpu_s,
            "gpkg_bytes": num_bytes_metadata,
            "sent_to_worker_bytes": sent,
            "peak_bytes": peak_bytes,
        }
        print(f"metadata, {name}: {elapsed_s:.1f} s, {cpu_s:.1f} s of CPU", flush=True)

    read_s, shard_s = (float(np.median([r[k]["seconds"] for r in rounds])) for k in ("read", "shard"))
    read_cpu_s, shard_cpu_s = (float(np.median([r[k]["cpu_s"] for r in rounds])) for k in ("read", "shard"))
    peak = max(r["shard"]["peak_bytes"] for r in rounds)
    results = {
        "revision": git_revision(),
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "tiles": args.tiles,
        "workers": args.workers,
        "raw_bytes": num_bytes,
        "rounds": rounds,
        "read_s": read_s,
        "shard_s": shard_s,
        "ratio": shard_s / read_s,
        "cpu_ratio": shard_cpu_s / read_cpu_s,
        "peak_bytes": {str(len(quarter)): quarter_peak, str(len(every)): peak},
        "metadata": metadata,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")

    table = Table(title=f"{args.tiles} FLAIR-HUB tiles, {num_bytes / 1e9:.1f} GB, {args.workers} processes")
    for column in ("what", "measured", "limit"):
        table.add_column(column, justify="right")
    table.add_row("reading the files with rasterio", f"{read_s:.1f} s", "")
    table.add_row("sharding them", f"{shard_s:.1f} s", f"{MAX_RATIO * read_s:.1f} s")
    table.add_row("CPU time of reading", f"{read_cpu_s:.1f} s", "")
    table.add_row("CPU time of sharding", f"{shard_cpu_s:.1f} s", f"{MAX_RATIO * read_cpu_s:.1f} s")
    table.add_row(f"peak memory of a process, {len(quarter)} tiles", f"{quarter_peak / 1e6:.0f} MB", "")
    table.add_row(
        f"peak memory of a process, {len(every)} tiles",
        f"{peak / 1e6:.0f} MB",
        f"{MAX_GROWTH * quarter_peak / 1e6:.0f} MB",
    )
    for name, row in metadata.items():
        table.add_row(
            f"metadata of {NUM_PATCHES} patches, {name}",
            f"{row['seconds']:.1f} s",
            f"{MAX_METADATA_S:.0f} s",
        )
    Console().print(table)
    passed = (
        shard_s <= MAX_RATIO * read_s
        and peak <= MAX_GROWTH * quarter_peak
        and all(row["seconds"] < MAX_METADATA_S for row in metadata.values())
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
