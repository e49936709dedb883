"""How near is sharding FLAIR-HUB to merely reading its files? How long does the metadata take, and how much memory?

    python benchmarks/sharding.py --work /scratch/sharding --tiles 2000 --workers 2

Synthesises the tiles (once; kept in --work), then measures, with files out of the page cache before every run:
reading every file once with rasterio in as many processes, and `maestro-scale shard` from start to manifest;
the memory of its processes at a quarter and at all of the tiles; and opening the metadata of 241,100 patches, once
with dates shared by the patches of a zone, once with different dates for each. Prints one table and writes
benchmarks/results/sharding.json. Exit code 1 where sharding takes more than 1.5 times the reading, the metadata
20 s or more, or a process of four times the tiles more than 1.1 times the memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from maestro_scale import datasets
from maestro_scale.datasets import flair_hub, flair_hub_synth
from maestro_scale.datasets.synthetic import Destination
from maestro_scale.training.run_dir import git_revision

NUM_PATCHES, NUM_ZONES, NUM_DOMAINS = 241_100, 2_822, 74
NUM_DATES = {"SENTINEL2": 91, "SENTINEL1-ASC": 94, "SENTINEL1-DESC": 94}  # the release's means per zone
MOST_TIMES, MOST_METADATA_S, MOST_GROWTH = 1.5, 20.0, 1.1


def preset_files(src: Path, keys: list[str]) -> list[Path]:
    """Every file that the preset needs of these patches."""
    folders = flair_hub.Folders(src, frozenset(os.listdir(src)))
    products = [flair_hub.PRODUCTS[m.name] for m in flair_hub.SPEC.modalities]
    products += [flair_hub.S2_MASK, flair_hub.COSIA]
    return [folders.path(key, product) for key in keys for product in products]


def read_all(paths: list[Path]) -> None:
    """The floor: open, read, forget."""
    import rasterio

    for path in paths:
        with rasterio.open(path) as raster:
            raster.read()


def evict(paths: list[Path]) -> int:
    """Take files out of the page cache; returns their bytes."""
    total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    return total


def timed_read(paths: list[Path], workers: int) -> float:
    """Seconds for ``workers`` fresh processes to read a share each."""
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    processes = [context.Process(target=read_all, args=(paths[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a reading process ended with exit code {process.exitcode}")
    return time.perf_counter() - started


def timed_shard(src: Path, dst: Path, split: str, workers: int) -> tuple[float, int]:
    """Seconds for the command, and the most memory that any of its processes held, in bytes."""
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
    peak = 0
    while process.poll() is None:
        peak = max([peak, *(_peak_bytes(pid) for pid in (process.pid, *_children(process.pid)))])
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.perf_counter() - started, peak


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
    """The GeoPackages of a dataset as large as the release, its domains' folders empty."""
    rng = np.random.default_rng(0)
    zones = [f"D{i % NUM_DOMAINS:03d}-2019_AF-S1-{i}" for i in range(NUM_ZONES)]
    keys = np.array([f"{zones[i % NUM_ZONES]}_{i // NUM_ZONES}-0" for i in range(NUM_PATCHES)], object)
    days = [int(f"2019{m:02d}{d:02d}") for m in range(1, 13) for d in range(1, 29)]

    def series(count: int) -> str:
        chosen = np.sort(rng.permutation(len(days))[:count])
        return json.dumps({str(n): days[i] for n, i in enumerate(chosen, start=1)})

    target = Destination(src, {"dataset": "metadata", "own_dates": str(own_dates)})
    square = flair_hub_synth.square(600_000.0, 6_800_000.0)
    for sensor, count in ({"AERIAL": 0} | NUM_DATES).items():
        if count == 0:
            column, texts = "date", np.full(NUM_PATCHES, "20190704", object)
        elif own_dates:
            column, texts = "acquisition_dates", np.array([series(count) for _ in keys], object)
        else:
            column = "acquisition_dates"
            of_zone = np.array([series(count) for _ in zones], object)
            texts = of_zone[np.arange(NUM_PATCHES) % NUM_ZONES]
        table = {"patch_id": keys, column: texts}
        target.write(
            f"{flair_hub.FOLDER}/GLOBAL_{sensor}_MTD_DATES.gpkg",
            lambda path, t=table: flair_hub_synth.write_gpkg(path, t, [square] * NUM_PATCHES),
        )
    for product in (*flair_hub.PRODUCTS.values(), flair_hub.S2_MASK, flair_hub.COSIA):
        for i in range(NUM_DOMAINS):
            (src / f"D{i:03d}-2019_{product.name}").mkdir(exist_ok=True)
    target.write_text("train.csv", "\n".join(["patch_id", *keys]) + "\n")


def measure_metadata(src: Path, results: multiprocessing.SimpleQueue) -> None:
    """Seconds to open all patches, the bytes sent to each worker, and the peak memory; puts them in ``results``."""
    started = time.perf_counter()
    reader = datasets.open_raw("flair_hub", src, "train")
    elapsed_s = time.perf_counter() - started
    if len(reader.keys()) != NUM_PATCHES:
        raise SystemExit(f"{src}: {len(reader.keys())} patches were read")
    results.put((elapsed_s, len(pickle.dumps(reader)), _peak_bytes(os.getpid())))


def in_fresh_process(work: Callable[..., None], *args: object) -> tuple:
    """What ``work`` puts in a queue, of a process that has nothing else in memory."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(*args, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} ended with exit code {process.exitcode}")
    return results.get()


def main() -> None:
    """Measure, print, write, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure; 9 MB a tile")
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharding.json")
    args = parser.parse_args()

    raw, shards = args.work / f"raw-{args.tiles}", args.work / "shards"
    datasets.synth("flair_hub", raw, args.tiles, 0)
    patches = flair_hub_synth.patches(args.tiles, 0)
    every = [patch.key for patch in patches]
    quarter = every[: len(every) // 4]
    for name, keys in (("every", every), ("quarter", quarter)):
        (raw / f"{name}.csv").write_text("\n".join(["patch_id", *keys]) + "\n")
    paths = preset_files(raw, every)
    os.sync()
    rounds = []
    for _ in range(args.repeats):
        num_bytes = evict(paths)
        read_s = timed_read(paths, args.workers)
        evict(paths)
        shard_s, peak = timed_shard(raw, shards, "every", args.workers)
        rounds.append({"read_s": read_s, "shard_s": shard_s, "peak_bytes": peak})
        print(f"read {read_s:.1f} s, shard {shard_s:.1f} s, peak {peak / 1e6:.0f} MB", flush=True)
    _, quarter_peak = timed_shard(raw, shards, "quarter", args.workers)
    shutil.rmtree(shards)

    metadata = {}
    for name, own_dates in (("dates of zones", False), ("dates of patches", True)):
        src = args.work / f"metadata-{'own' if own_dates else 'shared'}"
        write_metadata(src, own_dates)
        os.sync()
        files = sorted((src / flair_hub.FOLDER).iterdir())
        num_bytes_metadata = evict(files)
        elapsed_s, sent, peak = in_fresh_process(measure_metadata, src)
        metadata[name] = {
            "seconds": elapsed_s,
            "gpkg_bytes": num_bytes_metadata,
            "sent_to_worker_bytes": sent,
            "peak_bytes": peak,
        }
        print(f"metadata, {name}: {elapsed_s:.1f} s", flush=True)

    read_s = float(np.median([r["read_s"] for r in rounds]))
    shard_s = float(np.median([r["shard_s"] for r in rounds]))
    peak = max(r["peak_bytes"] for r in rounds)
    results = {
        "revision": git_revision(Path(__file__).parent),
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
        "peak_bytes": {str(len(quarter)): quarter_peak, str(len(every)): peak},
        "metadata": metadata,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")

    table = Table(title=f"{args.tiles} FLAIR-HUB tiles, {num_bytes / 1e9:.1f} GB, {args.workers} processes")
    for column in ("what", "measured", "floor or limit"):
        table.add_column(column, justify="right")
    table.add_row("reading the files with rasterio", f"{read_s:.1f} s", "")
    table.add_row("sharding them", f"{shard_s:.1f} s", f"{MOST_TIMES * read_s:.1f} s")
    table.add_row(f"most memory of a process, {len(quarter)} tiles", f"{quarter_peak / 1e6:.0f} MB", "")
    table.add_row(
        f"most memory of a process, {len(every)} tiles",
        f"{peak / 1e6:.0f} MB",
        f"{MOST_GROWTH * quarter_peak / 1e6:.0f} MB",
    )
    for name, row in metadata.items():
        table.add_row(
            f"metadata of {NUM_PATCHES} patches, {name}",
            f"{row['seconds']:.1f} s",
            f"{MOST_METADATA_S:.0f} s",
        )
    Console().print(table)
    held = (
        shard_s <= MOST_TIMES * read_s
        and peak <= MOST_GROWTH * quarter_peak
        and all(row["seconds"] < MOST_METADATA_S for row in metadata.values())
    )
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
