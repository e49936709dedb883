"""Benchmarks of writing data: shards of files, tiles of scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.protocol import Benchmark, Figure, at_most

_GIB = 2**30


def _sharding(result: Any) -> Iterator[Figure]:
    rounds = result["rounds"]
    clock = tuple(r["shard"]["seconds"] / r["read"]["seconds"] for r in rounds)
    cpu = tuple(r["shard"]["cpu_s"] / r["read"]["cpu_s"] for r in rounds)
    bound = f"reading the files: {result['read_s']:.0f} s"
    yield Figure("time of sharding", clock, "× reading", at_most(1.3), bound)
    yield Figure("processor time of sharding", cpu, "× reading", at_most(1.3))
    few, many = sorted(result["peak_bytes"], key=int)
    growth = result["peak_bytes"][many] / result["peak_bytes"][few]
    yield Figure(f"peak memory of a process, {many} tiles", (growth,), f"× that of {few}", at_most(1.1))
    for name, row in result["metadata"].items():
        yield Figure(
            f"opening the metadata of 241,100 patches, {name}", (row["seconds"],), "s", at_most(20.0)
        )


def _scenes(result: Any) -> Iterator[Figure]:
    # Reading keeps the blocks of a small scene in GDAL's cache, which is several times the memory of cutting.
    for rounds, size in ((result["full"], result["size"]), (result["half"], result["size"] // 2)):
        name = f"{size:,} pixels per side"
        clock = tuple(r["cut"]["seconds"] / r["read"]["seconds"] for r in rounds)
        cpu = tuple(r["cpu_ratio"] for r in rounds)
        memory = f"reading: {max(r['read']['peak_bytes'] for r in rounds) / _GIB:.2f} GiB"
        yield Figure(f"time of cutting tiles, {name}", clock, "× reading their windows", at_most(1.3))
        yield Figure(f"processor time of cutting tiles, {name}", cpu, "× reading their windows", at_most(1.3))
        peak = tuple(r["cut"]["peak_bytes"] / _GIB for r in rounds)
        yield Figure(f"memory of all processes, {name}", peak, "GiB", at_most(1.0), memory)
    if shards := result.get("shard"):
        yield Figure(
            "processor time of `shard`, start to manifest", tuple(r["cpu_ratio"] for r in shards), "× reading"
        )


BENCHMARKS = (
    Benchmark(
        "sharding",
        "Sharding of files",
        ("benchmarks/sharding.py", "--work={work}", "--tiles=2000", "--out={out}"),
        _sharding,
        "`maestro-scale shard` on FLAIR-HUB files, from start to manifest, beside reading every file once "
        "with rasterio in "
        "as many processes; files are evicted from the page cache before each.",
        "decompressing the GeoTIFFs, which the lower bound does as well; beyond it, hashing (SHA-256) and "
        "writing the shards.",
        minutes=8,
    ),
    Benchmark(
        "scenes",
        "Cutting of scenes",
        ("benchmarks/scenes.py", "--work={work}", "--size=20000", "--shard-tiles=1600", "--out={out}"),
        _scenes,
        "Tiles cut from scenes of 12 dates as `maestro-scale shard` does, beside reading the window of "
        "every tile and date "
        "with rasterio.",
        "GDAL's decompression of blocks of 512 × 512 pixels: both sides decode each block as often as "
        "their cache allows. The reading beside it "
        "has several times the cache of the cutting (its memory is beside that figure), which helps it in "
        "the smaller scene.",
        minutes=25,
    ),
)
