"""Cutting of scenes compared with merely reading the same windows with rasterio; memory.

    python benchmarks/scenes.py --work /scratch/scenes --size 20000

Synthesises a scene of --size × --size pixels, 4 bands, uint16, on 12 dates: GeoTIFFs in blocks of 512×512, deflate with
predictor, of which a few are drawn and all others are references to them, so a scene of 38 GB takes 150 MB on disk.
Reading decompresses every block all the same. Then, in --repeats rounds, each with two processes: reading the window of
every tile (128×128 pixels, which are not aligned with the blocks) of every date with rasterio, row by row, files open,
GDAL's defaults; and cutting the tiles as `maestro-scale shard` does, up to the finished tile in memory. A second
measurement shards --shard-tiles of the tiles, with two workers, from start to manifest, beside reading their windows.
Memory is that of all processes together (PSS), at --size and at half of it. Prints a table and writes
benchmarks/results/scenes.json. Exit code 1 if cutting is slower than 60 % of reading, or if memory reaches 1 GiB.

On a machine that others use, compare ratios within one run only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.description.load import load_description
from maestro_scale.training.run_dir import git_revision

BLOCK, BANDS, DATES, TILE, PIXEL_M = 512, 4, 12, 128, 10
WEST, NORTH = 399_960, 5_000_040  # as of a Sentinel-2 granule: not a multiple of the tiles
DRAWN = 8  # different blocks per date
MIN_SPEED, MAX_BYTES = 0.6, 2**30
DESCRIPTION = f"""
name: scenes
tile_m: {TILE * PIXEL_M}
grid: {{min_valid: 0.5}}
rasters:
  s2:
    files: "S2_{{date:%Y%m%d}}.tif"
    bands: [B2, B3, B4, B8]
    resolution_m: {PIXEL_M}
    dtype: uint16
    series: true
    quantity: reflectance
    sensor: {{patch: 2, num_dates: 4}}
"""


class Cost(NamedTuple):
    """Wall and CPU time, and the peak memory of all processes together."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def write_scene(path: Path, size: int, seed: int) -> None:
    """A GeoTIFF of ``size`` × ``size`` pixels, whose blocks are references to ``DRAWN`` different ones."""
    import rasterio
    from rasterio.transform import Affine

    small = path.with_suffix(".small")
    profile = {"count": BANDS, "width": BLOCK * DRAWN, "height": BLOCK, "dtype": "uint16", "nodata": 0}
    coding = {
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "predictor": 2,
        "interleave": "pixel",
    }
    transform = Affine(PIXEL_M, 0, WEST, 0, -PIXEL_M, NORTH)
    with rasterio.open(
        small, "w", driver="GTiff", crs="EPSG:32631", transform=transform, **profile, **coding
    ) as file:
        file.write(_landscape(seed))
    data = small.read_bytes()
    small.unlink()
    path.write_bytes(_repeated(data, size, seed))


def _landscape(seed: int) -> np.ndarray:
    """(bands, 512, 4096): fields of different brightness, with noise as of Sentinel-2."""
    rng = np.random.default_rng(seed)
    fields = rng.uniform(300, 3500, (BANDS, BLOCK // 16, BLOCK * DRAWN // 16))
    values = fields.repeat(16, 1).repeat(16, 2) + rng.normal(0, 60, (BANDS, BLOCK, BLOCK * DRAWN))
    return values.clip(1, 10_000).astype(np.uint16)


def _repeated(data: bytes, size: int, seed: int) -> bytes:
    """A classic little-endian TIFF of one image directory, with ``size`` pixels a side by references to its blocks."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = {}
    for i in range(count):
        tag, kind, number, value = struct.unpack_from("<HHII", data, start + 2 + 12 * i)
        entries[tag] = (kind, number, value)
    offsets, sizes = (_longs(data, *entries[tag]) for tag in (324, 325))
    blocks = -(-size // BLOCK)
    chosen = np.random.default_rng(seed).integers(0, DRAWN, blocks * blocks)
    body = bytearray(data)
    for tag, values in ((324, offsets), (325, sizes)):
        body += b"\0" * (len(body) % 2)
        entries[tag] = (4, len(chosen), len(body))
        body += np.array(values, "<u4")[chosen].tobytes()
    entries[256] = entries[257] = (4, 1, size)
    body += b"\0" * (len(body) % 2)
    directory = len(body)
    body += struct.pack("<H", len(entries))
    for tag, (kind, number, value) in sorted(entries.items()):
        body += struct.pack("<HHII", tag, kind, number, value)
    body += struct.pack("<I", 0)
    struct.pack_into("<I", body, 4, directory)
    return bytes(body)


def _longs(data: bytes, kind: int, number: int, value: int) -> tuple[int, ...]:
    code = {3: "H", 4: "I"}[kind]
    if number * struct.calcsize(code) <= 4:
        return (value,)
    return struct.unpack_from(f"<{number}{code}", data, value)


def write_scenes(folder: Path, size: int) -> list[Path]:
    """The scene on all dates; kept if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"S2_2020{i + 1:02d}15.tif" for i in range(DATES)]
    for i, path in enumerate(paths):
        if not path.exists():
            write_scene(path.with_suffix(".part"), size, i)
            path.with_suffix(".part").rename(path)
    return paths


def read_windows(paths: list[Path], windows: list[tuple[int, int]]) -> None:
    """The lower bound: the window of every tile of every date, with open files."""
    import rasterio
    from rasterio.windows import Window

    files = [rasterio.open(path) for path in paths]
    for row, col in windows:
        for file in files:
            file.read(window=Window(col, row, TILE, TILE))


def cut_tiles(dataset: Any, runs: list[list[str]]) -> None:
    """The tiles of runs, as a writer process reads them."""
    for run in runs:
        with dataset.run(run):
            for key in run:
                dataset.read(key)


def in_processes(work: Callable[..., None], jobs: list[tuple]) -> Cost:
    """Run each job in a process of its own."""
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [context.Process(target=work, args=job) for job in jobs]
    started, before = time.perf_counter(), children_s()
    for process in processes:
        process.start()
    peak = 0
    while any(p.is_alive() for p in processes):
        peak = max(peak, sum(pss_bytes(p.pid) for p in processes))
        time.sleep(0.1)
    if any(p.exitcode for p in processes):
        raise SystemExit(f"{work.__name__} failed")
    for process in processes:
        process.join()
    return Cost(time.perf_counter() - started, children_s() - before, peak)


def shard(description: Path, src: Path, dst: Path, workers: int) -> Cost:
    """Run `maestro-scale shard`, from start to manifest."""
    shutil.rmtree(dst, ignore_errors=True)
    program = Path(sys.executable).parent / "maestro-scale"
    words = ["shard", str(description), str(src), str(dst), "--split=train", f"--workers={workers}"]
    started, before = time.perf_counter(), children_s()
    process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss_bytes, [process.pid, *_children(process.pid)])))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"maestro-scale shard ended with exit code {process.returncode}")
    return Cost(time.perf_counter() - started, children_s() - before, peak)


def children_s() -> float:
    """CPU time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def pss_bytes(pid: int | None) -> int:
    """Memory of a process; pages that several share count in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def windows_of(dataset: Any, keys: list[str]) -> list[tuple[int, int]]:
    """Row and column of each tile in the scene, row by row."""
    grid = dataset.reader.grid
    boxes = [grid.box(grid.cell(key)) for key in keys]
    return sorted((round((NORTH - b.north) / PIXEL_M), round((b.west - WEST) / PIXEL_M)) for b in boxes)


def halves(items: list, parts: int) -> list[list]:
    """Consecutive parts of equal length."""
    step = -(-len(items) // parts)
    return [items[i : i + step] for i in range(0, len(items), step)]


def compare(
    paths: list[Path], description: Path, src: Path, workers: int, repeats: int
) -> list[dict[str, Any]]:
    """Rounds of reading and cutting, one after the other."""
    dataset: Any = open_described(load_description(description), str(src), "train")
    keys = [k for k in sorted(dataset.keys()) if _inside(dataset, k, src)]
    windows = halves(windows_of(dataset, keys), workers)
    runs = dataset.runs(keys)
    rounds = []
    for _ in range(repeats):
        read = in_processes(read_windows, [(paths, part) for part in windows])
        cut = in_processes(cut_tiles, [(dataset, runs[i::workers]) for i in range(workers)])
        speed = read.seconds / cut.seconds
        rounds.append(
            {
                "read": read._asdict(),
                "cut": cut._asdict(),
                "speed": speed,
                "cpu_ratio": cut.cpu_s / read.cpu_s,
                "load": os.getloadavg()[0],
            }
        )
        print(f"{len(keys)} tiles: read {read}, cut {cut}, speed {speed:.2f}", flush=True)
    return rounds


def _inside(dataset: Any, key: str, src: Path) -> bool:
    """Whether a tile lies in the scene as a whole: rasterio's windows are not padded."""
    grid = dataset.reader.grid
    box, scene = grid.box(grid.cell(key)), dataset.reader.series[0].shots[0].box
    return (
        box.west >= scene.west
        and box.east <= scene.east
        and box.south >= scene.south
        and box.north <= scene.north
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the scenes, 0.5 GB, and the shards"
    )
    parser.add_argument("--size", type=int, default=20_000, help="pixels per side")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--shard-tiles", type=int, default=1600, help="1.6 MB each, twice on disk; 0: do not shard"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scenes.json")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    description = args.work / "scenes.yaml"
    description.write_text(DESCRIPTION)
    results: dict[str, Any] = {
        "revision": git_revision(),
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "size": args.size,
        "dates": DATES,
        "bands": BANDS,
        "tile": TILE,
        "block": BLOCK,
        "workers": args.workers,
    }
    for name, size, repeats in (("half", args.size // 2, 1), ("full", args.size, args.repeats)):
        src = args.work / f"scene-{size}"
        results[name] = compare(write_scenes(src, size), description, src, args.workers, repeats)
    if args.shard_tiles:
        side = max(TILE, int(args.shard_tiles**0.5) * TILE)
        src = args.work / f"scene-{side}"
        paths = write_scenes(src, side)
        rounds = []
        for _ in range(args.repeats):
            dataset: Any = open_described(load_description(description), str(src), "train")
            keys = [k for k in sorted(dataset.keys()) if _inside(dataset, k, src)]
            windows = halves(windows_of(dataset, keys), args.workers)
            read = in_processes(read_windows, [(paths, part) for part in windows])
            written = shard(description, src, args.work / "shards", args.workers)
            # The tiles at the edges are shards, too, but cannot be read as windows.
            share = len(dataset.keys()) / len(keys)
            rounds.append(
                {
                    "tiles": len(dataset.keys()),
                    "read": read._asdict(),
                    "shard": written._asdict(),
                    "speed": read.seconds * share / written.seconds,
                    "cpu_ratio": written.cpu_s / read.cpu_s / share,
                    "load": os.getloadavg()[0],
                }
            )
            print(f"{len(dataset.keys())} tiles: read {read}, shard {written}", flush=True)
        shutil.rmtree(args.work / "shards")
        results["shard"] = rounds

    speeds = [r["speed"] for r in results["full"]]
    peak = max(r["cut"]["peak_bytes"] for r in results["full"])
    half_peak = results["half"][0]["cut"]["peak_bytes"]
    results["speed"] = {"median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
    results["peak_bytes"] = {str(args.size // 2): half_peak, str(args.size): peak}
    if args.shard_tiles:
        peak = max(peak, *(r["shard"]["peak_bytes"] for r in results["shard"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")

    table = Table(
        title=f"{args.size}×{args.size} pixels, {BANDS} bands, {DATES} dates, {args.workers} processes"
    )
    for column in ("what", "measured", "limit"):
        table.add_column(column, justify="right")
    read_s = statistics.median(r["read"]["seconds"] for r in results["full"])
    cut_s = statistics.median(r["cut"]["seconds"] for r in results["full"])
    table.add_row("reading the windows with rasterio", f"{read_s:.1f} s", "")
    table.add_row("cutting the tiles", f"{cut_s:.1f} s", "")
    spread = f"{min(speeds):.0%} to {max(speeds):.0%}"
    table.add_row("speed of cutting", f"{results['speed']['median']:.0%} ({spread})", f"{MIN_SPEED:.0%}")
    cpu = [r["cpu_ratio"] for r in results["full"]]
    table.add_row("CPU time of cutting, of that of reading", f"{statistics.median(cpu):.0%}", "")
    for size, num_bytes in results["peak_bytes"].items():
        table.add_row(f"memory of all processes, {size} pixels", f"{num_bytes / 2**20:.0f} MiB", "1024 MiB")
    if args.shard_tiles:
        shards = results["shard"]
        of_shard = [r["speed"] for r in shards]
        table.add_row(
            f"speed of `shard` from start to manifest, {shards[0]['tiles']} tiles",
            f"{statistics.median(of_shard):.0%} ({min(of_shard):.0%} to {max(of_shard):.0%})",
            "",
        )
        cpu = [r["cpu_ratio"] for r in shards]
        table.add_row("its CPU time, of that of reading", f"{statistics.median(cpu):.0%}", "")
        most = max(r["shard"]["peak_bytes"] for r in shards)
        table.add_row("memory of all its processes", f"{most / 2**20:.0f} MiB", "1024 MiB")
    Console().print(table)
    sys.exit(0 if results["speed"]["median"] >= MIN_SPEED and peak < MAX_BYTES else 1)


if __name__ == "__main__":
    main()
