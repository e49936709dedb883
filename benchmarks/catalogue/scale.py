"""Benchmarks of scale: checkpoints of many ranks, many shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.protocol import Benchmark, Figure, at_least, at_most


def _checkpoints(result: Any) -> Iterator[Figure]:
    disk = result["disk"]
    rate = {name: f"{value:,.0f} MB/s" for name, value in disk["mb_per_s"].items()}
    yield Figure(
        "saving a piece",
        tuple(disk["save_ratio"]),
        "× the disk's rate",
        at_least(0.7),
        f"write, fsync: {rate['write']}",
    )
    yield Figure(
        "loading a piece",
        tuple(disk["load_ratio"]),
        "× the disk's rate",
        at_least(0.7),
        f"read: {rate['read']}",
    )
    megabytes = disk["bytes"] / 1e6
    hashing = tuple(1e3 * s / megabytes for s in disk["seconds"]["hash"])
    yield Figure("hashing a piece, processor", hashing, "s/GB")
    for r in result["ranks"]:
        of = f"{r['ranks']:,} ranks"
        blocked = tuple(1e3 * s for s in r["blocked_s"])
        yield Figure(f"training blocked, {of}", blocked, "ms", at_most(500.0), "half a step of 1 s")
        yield Figure(
            f"publication on rank 0, beside training, processor, {of}", tuple(r["publish_processor_s"]), "s"
        )
        yield Figure(f"resume of a rank, processor, {of}", tuple(r["resume_processor_s"]), "s")


def _scale(result: Any) -> Iterator[Figure]:
    names = {
        "first": "start of rank 0, which parses the manifest, processor",
        "again": "start of rank 0 with a parsed manifest in the cache, processor",
        "other": "start of any other rank, processor",
    }
    before = result["start"]["every rank"]
    beside = f"parsed and hashed by the rank: {min(r['processor_s'] for r in before):.1f} s"
    for role, name in names.items():
        yield Figure(name, tuple(r["processor_s"] for r in result["start"][role]), "s", beside=beside)
    yield Figure(
        "own memory of any other rank", tuple(r["bytes"] / 1e6 for r in result["start"]["other"]), "MB"
    )
    yield Figure("memory that the ranks of a node share", (result["mapped_bytes"] / 1e6,), "MB", counted=True)
    yield Figure(
        "bytes pickled for a loader process", (result["worker"]["bytes"],), "", at_most(50_000), counted=True
    )
    for key, name in (
        ("jump_s", "jump to step 500,000"),
        ("step_s", "a step"),
        ("epoch_s", "a change of epoch"),
    ):
        yield Figure(f"order: {name}, processor", tuple(1e3 * s for s in result["order"][key]), "ms")
    requests = result["requests"]
    bound = f"samples that a step uses: {requests['least_shards_per_s']:.1f} shards/s"
    for name in ("after the start", "epoch change"):
        r = requests[name]
        yield Figure(f"shards, {name}", (r["shards_per_s"],), "per s", beside=bound, counted=True)
        yield Figure(f"HEAD requests, {name}", (r["head_per_s"],), "per s", counted=True)
        yield Figure(f"range requests, {name}", (r["range_get_per_s"],), "per s", counted=True)
        yield Figure(f"bytes, {name}", (r["gb_per_s"],), "GB/s", counted=True)
        if name == "after the start":
            first = r["first_step_of_a_node"]
            yield Figure("shards that a node needs for the first step", (first,), counted=True)
        most = r["most_shards_in_a_step_of_a_node"]
        yield Figure(f"most shards that a node asks for in a step, {name}", (most,), counted=True)
    yield Figure("requests for the manifest at a start, all nodes", (requests["manifest_get"],), counted=True)


BENCHMARKS = (
    Benchmark(
        "checkpoints",
        "Checkpoints",
        ("-m", "benchmarks.checkpoints", "--work={work}", "--out={out}"),
        _checkpoints,
        "A piece of 200 MB, written, flushed and hashed beside a plain write and fsync of the same bytes; verified and "
        "loaded beside a plain read; files are evicted from the page cache before each. Checkpoints of simulated ranks "
        "of ZeRO stage 3 with 600 parameters: what rank 0 does in its training thread, what it does beside it, and "
        "what a rank does to resume.",
        "saving: the disk. Loading: SHA-256, which one core computes more slowly than this disk reads; the ranks of a "
        "node hash their pieces at the same time.",
        minutes=6,
    ),
    Benchmark(
        "scale",
        "300,000 shards and 1,024 ranks",
        ("-m", "benchmarks.scale", "--work={work}", "--out={out}"),
        _scale,
        "A manifest of 300,000 shards of 128 MB and 100 million samples; 1,024 ranks of 8 loader processes on 128 "
        "nodes that share one store, a global batch of 8,192 samples and steps of one second. Nothing is downloaded: a "
        "part of the ranks is simulated, one after the other, and their requests are scaled to all.",
        "parsing the manifest, once per node; in the steady state the store's rate, not its requests.",
        minutes=4,
    ),
)
