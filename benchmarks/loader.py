"""Processor time of a prepared sample: our loader, those of other projects, the authors' files, and the lower bound.

    python -m benchmarks.loader --work /tmp/loader --venv /tmp/venv-peers [--rounds 3] [--seconds 0.5]

The same synthetic tiles (TreeSatAI-TS, PASTIS-HD, FLAIR-HUB) are written in the format of each loader, once, to --work
(4 GB). Other projects' loaders are installed into --venv, an environment of their own, which is created where it is
missing; one that cannot be installed or fails is in the result with the reason. Each project has one process, and in
every round each loader reads batches for --seconds without worker processes, one after the other, from the page cache:
compare only values of one round. Writes benchmarks/results/loader.json.

The lower bound copies the bytes of a prepared sample and reads the stored bytes that it needs: of a whole tile in one
call, of a crop the rows of pixels that it crosses, in one call per image.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.loading import environment
from benchmarks.loading.data import TILES, build
from benchmarks.loading.peers import PEERS
from benchmarks.loading.prepare import Layout, Preparation
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.training.run_dir import git_revision

ROOT = Path(__file__).parents[1]
OURS = ("lower bound", *(f"ours, {codec}" for codec in CODECS), "authors' files")
_TIMEOUT_S = 300


class Worker:
    """A process that measures on request; see benchmarks/loading/worker.py."""

    def __init__(self, python: str, kind: str, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.loading.worker", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        self._log = log

    def ask(self, **request: Any) -> Any:
        """The answer to a request. RuntimeError, with the reason, if it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"the process ended, see {self._log}") from None
        for line in self._process.stdout:  # libraries print, too
            if line.startswith("RESULT "):
                answer = json.loads(line.removeprefix("RESULT "))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["value"]
        raise RuntimeError(f"the process ended, see {self._log}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def measure(
    folders: Mapping[str, Path], venv: Path, rounds: int, seconds: float, logs: Path
) -> dict[str, Any]:
    """The part of the result that is measured."""
    missing = environment.create(venv)
    python = str(venv / "bin" / "python")
    projects = {name: name.partition(",")[0] for name in PEERS}
    peers = {n: {"does": PEERS[n].does, "error": missing[p]} for n, p in projects.items() if p in missing}
    workers = {"ours": Worker(sys.executable, "ours", logs / "ours.log")}
    of_variant = dict.fromkeys(OURS, workers["ours"])
    for project in dict.fromkeys(projects.values()):
        if project not in missing:
            workers[project] = Worker(python, "peers", logs / f"{project}.log")
            of_variant |= {name: workers[project] for name, p in projects.items() if p == project}
    found: dict[str, dict[str, list[float]]] = {dataset: {} for dataset in folders}
    try:
        for dataset, folder in folders.items():
            for name, worker in of_variant.items():
                if name in PEERS:
                    _try(peers, name, worker, task="write", variant=name, folder=str(folder), dataset=dataset)
        for _ in range(rounds):
            for dataset, folder in folders.items():
                for name, worker in of_variant.items():
                    if "error" in peers.get(name, {}):
                        continue
                    request = {"task": "read", "variant": name, "folder": str(folder), "dataset": dataset}
                    value = _try(peers, name, worker, seconds=seconds, **request)
                    if value is not None:
                        found[dataset].setdefault(name, []).append(round(value, 1))
                        print(f"{dataset}, {name}: {value:.0f} µs", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return {"peers": peers, "cpu_us_per_sample": found}


def _try(peers: dict[str, Any], name: str, worker: Worker, **request: Any) -> float | None:
    """The answer; a peer that fails gets its reason in ``peers``. What the peer says about itself goes there, too."""
    try:
        answer = worker.ask(**request)
    except RuntimeError as error:
        if name not in PEERS:
            raise SystemExit(f"{name}: {error}") from None
        peers.setdefault(name, {"does": PEERS[name].does})["error"] = str(error)
        return None
    if isinstance(answer, dict):
        peers[name] = answer
        return None
    return answer


def show(dataset: str, found: Mapping[str, list[float]]) -> Table:
    """The table of a dataset: ratios within a round."""
    table = Table(title=f"{dataset}: processor time of a prepared sample", title_justify="left")
    for column in ("loader", "µs", "of ours, raw", "of the lower bound"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, values in found.items():
        cells = [f"{sorted(values)[len(values) // 2]:,.0f}"]
        for other in ("ours, raw", "lower bound"):
            ratios = [a / b for a, b in zip(values, found[other], strict=True)]
            cells.append(f"{sorted(ratios)[len(ratios) // 2]:.2f} [{min(ratios):.2f}–{max(ratios):.2f}]")
        table.add_row(name, *cells)
    return table


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, kept; 4 GB")
    parser.add_argument("--venv", type=Path, help="environment of the other loaders; default: in WORK")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--datasets", nargs="+", default=list(TILES), choices=list(TILES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = {name: build(args.work, name) for name in args.datasets}
    sizes = {name: _sizes(folder) for name, folder in folders.items()}
    venv = (args.venv or args.work / "venv-peers").resolve()
    record = {"revision": git_revision(), "rounds": args.rounds, "seconds": args.seconds, "samples": sizes}
    record |= measure(folders, venv, args.rounds, args.seconds, args.work)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for dataset, found in record["cpu_us_per_sample"].items():
        Console(width=120).print(show(dataset, found))
    for name, peer in record["peers"].items():
        if "error" in peer:
            print(f"{name}: not measured: {peer['error']}")
    return 0


def _sizes(folder: Path) -> dict[str, int]:
    samples = [path.stat().st_size for path in sorted((folder / "samples").iterdir())]
    layout = Layout.read(folder / "layout.json")
    return {
        "samples": len(samples),
        "stored_bytes": sum(samples) // len(samples),
        "prepared_bytes": Preparation(layout).num_bytes(),
        "batch": layout.batch,
    }


if __name__ == "__main__":
    sys.exit(main())
