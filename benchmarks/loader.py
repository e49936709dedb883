"""Loader throughput: shards of maestro_scale compared with other formats, from a local disk and a slow object store.

    python -m benchmarks.loader --work /tmp/loader [--mds-python VENV/bin/python] [--rounds 2] [--seconds 4]

Writes synthetic TreeSatAI-TS and PASTIS-HD tiles in every format to --work, once; shards contain each tile several
times under different names, so that a pass over the network takes longer than its start. Each measurement runs in a new
process; each round runs all of them, and the best round of each counts, so that temporary load does not matter. If
--out exists, rounds are added to it (--only s3/: measurements with this in their name). --mds-python: an environment
with mosaicml-streaming (which installs torchvision, so it needs one of its own) in which maestro_scale can be
imported. Prints the tables and writes benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.loader_variants import Task
from benchmarks.slow_store import serve
from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec, RawDataset, Tile
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.grouping import absent_from
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.training.run_dir import git_revision

DELAY_S, BYTES_PER_S = 0.03, 40e6
TILES = {"treesatai_ts": 300, "pastis_hd": 20}
REPEATS = {"treesatai_ts": 6, "pastis_hd": 1}  # copies of each tile in the shards
BATCH = {"treesatai_ts": 16, "pastis_hd": 4}
SOAK = 20_000
_VARIANTS_SCRIPT = Path(__file__).with_name("loader_variants.py")


@dataclass(frozen=True)
class Repeated:
    """A raw dataset that contains each of its tiles several times, under different keys."""

    raw: RawDataset
    times: int

    @property
    def spec(self) -> DatasetSpec:
        return self.raw.spec

    def keys(self) -> list[str]:
        names = self.raw.keys()
        return [f"{i}-{name}" for i in range(self.times) for name in names]

    def absent(self, key: str) -> tuple[str, ...]:
        return absent_from(self.raw, key.partition("-")[2])

    def read(self, key: str) -> Tile:
        return replace(self.raw.read(key.partition("-")[2]), key=key)


def build(work: Path, dataset: str, mds_python: str | None) -> Path:
    """Write the dataset in every format; existing formats are kept."""
    data = work / dataset
    datasets.synth(dataset, data / "raw", TILES[dataset], seed=0)
    raw = Repeated(datasets.open_raw(dataset, data / "raw", "train"), REPEATS[dataset])
    for codec in CODECS:
        write_shards(raw, str(data / f"{codec}-codec"), "train", workers=2, codec=codec, shard_mb=64)
    if not (data / "webdataset").exists():
        _write_webdataset(data, data / "webdataset")
    if mds_python and not (data / "mds").exists():
        script = "import sys; from benchmarks.loader import write_mds; write_mds(sys.argv[1])"
        subprocess.run([mds_python, "-c", script, str(data)], check=True, env=_environment())
    return data


def write_mds(data: str) -> None:
    """Write the same samples as MDS shards; runs in the environment with mosaicml-streaming."""
    from streaming import MDSWriter

    out, partial = Path(data, "mds"), Path(data, "mds.partial")
    shutil.rmtree(partial, ignore_errors=True)
    samples = _samples(Path(data))
    first = next(samples)
    columns = {"key": "str", **dict.fromkeys(first.names, "ndarray")}
    with MDSWriter(out=str(partial), columns=columns, size_limit=64_000_000) as writer:
        for sample in (first, *samples):
            writer.write({"key": sample.key, **{n: sample.array(n) for n in sample.names}})
    partial.rename(out)


def _write_webdataset(data: Path, out: Path) -> None:
    partial = out.with_name("webdataset.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tar, size, number = None, 0, 0
    for sample in _samples(data):
        if tar is None or size > 64_000_000:
            if tar is not None:
                tar.close()
            tar, size = tarfile.open(partial / f"{number:06d}.tar", "w"), 0  # noqa: SIM115
            number += 1
        for name in sample.names:
            file = io.BytesIO()
            np.save(file, sample.array(name))
            # webdataset takes everything before the first dot as the key.
            member = tarfile.TarInfo(f"{sample.key.replace('.', '_')}.{name.replace('.', '+')}.npy")
            member.size = file.tell()
            size += member.size
            file.seek(0)
            tar.addfile(member, file)
    tar.close()
    partial.rename(out)


def _samples(data: Path) -> Iterator[Sample]:
    url = str(data / "raw-codec")
    for info in Manifest.load(url).shards_of(["train"]):
        with Store(url, data / "cache", 0).shard(info) as shard:
            yield from shard


def tasks(dataset: str, data: Path, store: str, mds: bool, seconds: float) -> dict[str, Task]:
    """{name: measurement}; a name is ``storage/stage/variant/workers``."""
    cache = str(data / "cache")
    common = {"dataset": dataset, "data": str(data), "batch": BATCH[dataset], "seconds": seconds}
    variants = {f"ours {c}": ("ours", f"{c}-codec") for c in CODECS}
    variants |= {"per-file": ("per-file", "raw"), "webdataset": ("webdataset", "webdataset")}
    variants |= {"mosaicml": ("mosaicml", "mds")} if mds else {}
    found: dict[str, Task] = {}
    for name, (variant, folder) in variants.items():
        task = Task(variant=variant, stage="decode", source_url=str(data / folder), cache=cache, **common)
        found[f"local/decode/{name}/0"] = task
        for workers in (0, 1, 2):
            found[f"local/batches/{name}/{workers}"] = replace(task, stage="batches", workers=workers)
        if variant == "per-file":
            continue
        remote = {"ours": "s3://", "mosaicml": "s3://"}.get(variant, f"{store}/") + f"{dataset}/{folder}"
        found[f"s3/batches/{name}/1"] = replace(
            task, stage="batches", workers=1, source_url=remote, cache=str(data / "cold"), once=True
        )
    base = Task(variant="link", stage="", source_url=f"{store}/{dataset}/raw-codec", cache="", **common)
    found["s3/link/link/0"] = base
    local = replace(base, stage="batches", workers=1, source_url=str(data / "raw-codec"), seconds=0.5)
    found["local/first/ours raw/1"] = replace(local, variant="first", cache=cache)
    found["s3/first/ours raw/1"] = replace(
        local, variant="first", source_url=f"s3://{dataset}/raw-codec", cache=str(data / "cold")
    )
    return found


def run(task: Task, python: str, store: str) -> dict:
    """Run a measurement in a new process, with an empty cache if it is a cold one."""
    # Not to measure this machine's disk: all variants read from the page cache.
    local = Path(task.data, Path(task.source_url).name)
    for file in local.rglob("*"):
        if file.is_file():
            file.read_bytes()
    if task.cache.endswith("cold"):
        shutil.rmtree(task.cache, ignore_errors=True)
    command = [python, str(_VARIANTS_SCRIPT), json.dumps(asdict(task))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=_environment(store), timeout=600, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found = json.loads(line.removeprefix("RESULT "))
            return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    raise SystemExit(f"{task} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _environment(store: str = "") -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    endpoint = {"AWS_ENDPOINT_URL": store, "S3_ENDPOINT_URL": store} if store else {}
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **keys, **endpoint}


_LOWER_IS_BETTER = ("first_s", "cold_s", "warm_s")


def best(rounds: Sequence[dict]) -> dict:
    """The best value of each number over the rounds."""
    return {k: (min if k in _LOWER_IS_BETTER else max)(r[k] for r in rounds) for k in rounds[0]}


def show(dataset: str, results: dict[str, list[dict]]) -> Table:
    """Build the table. "Per core" means per second of CPU time of a process without workers."""
    columns = {
        "decode, per core": ("local/decode/{}/0", "samples_per_cpu_s"),
        "batches, per core": ("local/batches/{}/0", "samples_per_cpu_s"),
        "1 worker": ("local/batches/{}/1", "samples_per_s"),
        "2 workers": ("local/batches/{}/2", "samples_per_s"),
        "S3, 1 worker": ("s3/batches/{}/1", "samples_per_s"),
    }
    table = Table(title=f"{dataset}: samples/s")
    table.add_column("variant")
    for column in columns:
        table.add_column(column, justify="right")
    found = {name: best(rounds) for name, rounds in results.items()}
    for variant in dict.fromkeys(name.split("/")[2] for name in results if name.startswith("local/decode")):
        cells = [found.get(name.format(variant), {}).get(number) for name, number in columns.values()]
        table.add_row(variant, *("" if c is None else f"{c:,.0f}" if c >= 20 else f"{c:.1f}" for c in cells))
    if link := found.get("s3/link/link/0"):
        table.add_row("the bare link", "", "", "", "", f"{link['samples_per_s']:,.0f}")
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data; about 8 GB")
    parser.add_argument("--mds-python", help="Python of an environment with mosaicml-streaming")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each local measurement")
    parser.add_argument("--datasets", nargs="+", default=list(TILES), choices=list(TILES))
    parser.add_argument("--build-only", action="store_true", help="write the data and stop")
    parser.add_argument(
        "--only", default="", help="only measurements whose name contains this, e.g. s3/ or raw"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    args = parser.parse_args()
    record: dict = {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load": os.getloadavg(),  # load by other processes
        },
        "revision": git_revision(),
        "store": {"delay_s": DELAY_S, "bytes_per_s_per_connection": BYTES_PER_S},
        "results": {},
    }
    if args.out.exists():
        record = json.loads(args.out.read_text())
    folders = {name: build(args.work, name, args.mds_python) for name in args.datasets}
    if args.build_only:
        return
    with serve(args.work, DELAY_S, BYTES_PER_S) as store:
        for dataset, data in folders.items():
            results = record["results"].setdefault(dataset, {})
            for _ in range(args.rounds):
                for name, task in tasks(dataset, data, store, bool(args.mds_python), args.seconds).items():
                    if args.only not in name:
                        continue
                    python = args.mds_python if task.variant == "mosaicml" else sys.executable
                    results.setdefault(name, []).append(run(task, python, store))
                    print(name, results[name][-1], file=sys.stderr, flush=True)
            Console(width=120).print(show(dataset, results))
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        if "treesatai_ts" in folders and args.only in "memory":
            data = folders["treesatai_ts"]
            soak = Task(
                "treesatai_ts", "memory", "", str(data / "raw-codec"), "", str(data / "cache"), 1, 16, SOAK
            )
            record["memory"] = run(soak, sys.executable, store)
            print("memory of the worker", record["memory"])
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
