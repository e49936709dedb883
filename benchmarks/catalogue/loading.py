"""Benchmarks of reading: loaders on the same samples, and object stores."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.page import table
from benchmarks.protocol import Benchmark, Figure, at_least, at_most, number

_OURS, _BOUND = "ours, raw", "lower bound"


def _ratios(values: list[float], others: list[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(values, others, strict=True))


def _loader(result: Any) -> Iterator[Figure]:
    for dataset, found in result["cpu_us_per_sample"].items():
        ours, bound = found[_OURS], found[_BOUND]
        beside = f"{statistics.median(ours):,.0f} µs; bound {statistics.median(bound):,.0f} µs"
        yield Figure(f"{dataset}: ours", _ratios(ours, bound), "× lower bound", at_most(4.0), beside)
        for name, values in found.items():
            if name in (_OURS, _BOUND):
                continue
            # A peer that is slower than ours: its ratio is above 1. Codecs of ours trade time for bytes.
            aim = None if name.startswith("ours") else at_least(1.0)
            yield Figure(
                f"{dataset}: {name}",
                _ratios(values, ours),
                "× ours",
                aim,
                f"{statistics.median(values):,.0f} µs",
            )


def _loader_notes(result: Any) -> str:
    sizes = [
        (
            f"`{dataset}`",
            f"{s['stored_bytes'] / 1e6:.2f} MB",
            f"{s['prepared_bytes'] / 1e6:.2f} MB",
            str(s["batch"]),
            f"{s['prepared_bytes'] / statistics.median(result['cpu_us_per_sample'][dataset][_OURS]):,.0f} MB/s",
        )
        for dataset, s in result["samples"].items()
    ]
    peers = [
        (
            name,
            f"{peer['does']}; {peer.get('version', 'not installed')}"
            + (f". **Not measured:** {peer['error']}" if "error" in peer else ""),
        )
        for name, peer in result["peers"].items()
    ]
    return "\n".join(
        (
            table(("samples", "stored", "prepared", "batch", "prepared by one core of ours"), sizes),
            "\nAll but ours share one preparation (`benchmarks/loading/prepare.py`): dates drawn from "
            "bins, without cloud and "
            "snow, one crop, flips, noise. It does less than ours: no counter per sample, so that its "
            "order and draws cannot "
            "be resumed, and NaN becomes 0. Ours reads in random order, the others in the order of "
            "storage, which costs them "
            "less. Ours is measured with the checks of every header against the manifest.\n",
            table(("peer", "what it stores and how it reads"), peers),
        )
    )


def _loader_bottleneck(result: Any) -> str:
    found = result["cpu_us_per_sample"]
    shares = ", ".join(
        f"{number(statistics.median(_ratios(of[_OURS], of[_BOUND])))} × ({dataset})"
        for dataset, of in found.items()
    )
    return (
        f"Python calls per sample and field (headers, date draws, one copy per field), not bytes: "
        f"{shares} the time of copying "
        "and reading them. Where the samples are large, the flips and the transposition of images."
    )


def _shard_mb(row: Any) -> float:
    return row["bytes"] / row["shards"] / 1e6


def _object_store(result: Any) -> Iterator[Figure]:
    for row in result["clients"]:
        place = row["place"]
        for client in ("ours", "s3fs", "obstore"):
            if client in row:
                shares = _ratios(row[client]["mb_per_s"], row["bare"]["mb_per_s"])
                yield Figure(f"{place}: range reads by {client}", shares, "× bare connections")
                cpu = _ratios(row[client]["cpu_s_per_gb"], row["bare"]["cpu_s_per_gb"])
                shown = f"{statistics.median(row[client]['cpu_s_per_gb']):.2f} s/GB"
                yield Figure(f"{place}: processor time of {client}", cpu, "× bare connections", beside=shown)
    for row in result["passes"]:
        name = f"{row['dataset']}, {row['codec']}, {row['link_mb_per_s']:.0f} MB/s"
        shares = tuple(100 * s for s in row["share"])
        yield Figure(
            f"share of the link, {name}",
            shares,
            "%",
            at_least(80.0),
            f"{statistics.median(row['mb_per_s']):.0f} MB/s; {row['shards']} shards of {_shard_mb(row):.0f} MB",
        )
    for row in result["passes"][len(result["passes"]) // 2 :]:  # the same at both rates
        name = f"requests per sample, {row['dataset']}, {row['codec']}"
        beside = f"{row['samples']} samples in {row['shards']} shards: {row['get']} GET, {row['head']} HEAD"
        aim = at_most(row["fewest_requests"] / row["samples"])
        yield Figure(name, ((row["get"] + row["head"]) / row["samples"],), "", aim, beside, counted=True)
    for dataset, seconds in result["first_batch_s"].items():
        yield Figure(f"first batch, cold, {dataset}", tuple(seconds), "s", at_most(2.0))


def _object_store_bottleneck(result: Any) -> str:
    clients = [row for row in result["clients"] if row["place"].startswith("emulated")][-1]
    ours, s3fs, obstore = (statistics.median(clients[c]["cpu_s_per_gb"]) for c in ("ours", "s3fs", "obstore"))
    return (
        "on the slow link the link; on the fast one the processor, since the store runs on the same cores: receiving, "
        f"SHA-256, and writing to the page cache. On the fast link obstore takes {obstore / ours:.2f} times the "
        f"processor time of ours, s3fs {s3fs / ours:.2f} times; the processor times on the slow one differ by less "
        "than their spread. obstore is not used: it would read neither the profiles nor the certificates that botocore "
        "is set up with, and reports the status of a failed request as text only."
    )


BENCHMARKS = (
    Benchmark(
        "loader",
        "Loader",
        ("-m", "benchmarks.loader", "--work={work}", "--venv={venv}", "--out={out}"),
        _loader,
        "Processor time of a prepared sample from the page cache, without worker processes: the same "
        "synthetic tiles in the "
        "format of each loader, prepared to the same tensors. The lower bound copies the prepared bytes "
        "and reads as many "
        "stored bytes that they need: of a whole tile in one call, of a crop one call per image, for the "
        "rows that it crosses.",
        _loader_bottleneck,
        _loader_notes,
        minutes=5,
    ),
    Benchmark(
        "object_store",
        "Object store",
        ("-m", "benchmarks.object_store", "--work={work}", "--out={out}"),
        _object_store,
        "Shards on an emulated store with 30 ms of latency and a limited rate per connection "
        "(`benchmarks/slow_store.py`), "
        "which runs on the same cores, and on Ceph's S3 gateway where it is installed. *Bare connections* "
        "read the same "
        "ranges with as many connections and discard the data. The clients read 8 MiB ranges: *ours* is "
        "botocore's client in "
        "the thread of the caller, *s3fs* the same client behind an event loop, *obstore* a client in Rust.",
        _object_store_bottleneck,
        minutes=6,
        folder="loader",
    ),
)
