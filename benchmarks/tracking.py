"""Effect of a slow MLflow server on training: runs without tracking and with a server that responds after 2 s.

    python -m benchmarks.tracking --work /tmp/tracking --rounds 4

Starts a real MLflow server, and a proxy in front of it that delays every byte of a response by --delay-s. Each run logs
every step. Throughput is that of a run's median step, without the first ten; runs are compared in pairs, one of each
kind, in alternating order, so that load from other processes affects both alike. Prints a table and writes
benchmarks/results/tracking.json; exit code 1 if the median loss of throughput exceeds 2 %, or a metric is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import make_shards
from maestro_scale.parent_death import guarded
from maestro_scale.training.distributed import free_port
from maestro_scale.training.run_dir import JsonLines, git_revision

MAX_LOST = 0.02
WARMUP_STEPS = 10
REPO = Path(__file__).parents[1]


class DelayProxy:
    """A proxy on ``port`` to ``target`` on this machine; responses arrive ``delay_s`` later, in order."""

    def __init__(self, target: int, delay_s: float) -> None:
        self.port, self._target, self._delay_s = free_port(), target, delay_s
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True).start()
        ready.wait(10)

    async def _serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        ready.set()
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(
            _forward(reader, server_writer, 0.0), _forward(server_reader, writer, self._delay_s)
        )


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while chunk := await reader.read(1 << 16):
            loop.call_later(delay_s, writer.write, chunk)
    loop.call_later(delay_s, writer.close)


def start_server(work: Path) -> tuple[subprocess.Popen, int]:
    """Start a real MLflow server on an empty store; returns it, once it responds, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers=1", f"--port={port}"]
    command += [f"--backend-store-uri=sqlite:///{work / 'mlflow.db'}"]
    command += [f"--artifacts-destination={work / 'artifacts'}"]
    with (work / "server.log").open("w") as log:
        server = subprocess.Popen(
            guarded(command), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return server, port
        except OSError:
            time.sleep(0.2)
    server.terminate()
    raise SystemExit(f"the MLflow server does not respond, see {work / 'server.log'}")


def run(args: argparse.Namespace, shards: Path, name: str, uri: str | None) -> dict[str, float]:
    """Run one training; returns seconds of its median step, and from the last step to the end of the process."""
    run_dir = args.work / "runs" / name
    command = [sys.executable, str(REPO / "maestro_scale" / "train.py"), f"--recipe={args.recipe}"]
    command += [f"--run-dir={run_dir}", "--set", f"data.mixture[0].shards={json.dumps(str(shards))}"]
    command += ["data.mixture[0].split=train", f"data.cache_dir={json.dumps(str(args.work / 'cache'))}"]
    command += [
        f"train.steps={args.steps}",
        "train.log_every=1",
        "tracking.pictures_every=0",
        "data.workers=1",
    ]
    command += [f"tracking.enabled={'true' if uri else 'false'}", *args.overrides]
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri or "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    ended = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
    lines = list(JsonLines(run_dir / "metrics.jsonl").read())
    return {"step_s": statistics.median(x["step_s"] for x in lines[WARMUP_STEPS:]), "ending_s": ended}


def missing(run_dir: Path, port: int) -> int:
    """Number of losses in metrics.jsonl that the server does not have exactly once and with the same value."""
    from mlflow.tracking import MlflowClient

    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    stored = MlflowClient(f"http://127.0.0.1:{port}").get_metric_history(run_id, "loss/total")
    found = sorted((m.step, m.value) for m in stored)
    wanted = [(x["step"], x["loss"]) for x in JsonLines(run_dir / "metrics.jsonl").read()]
    return sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, runs and the server")
    parser.add_argument("--recipe", type=Path, default=REPO / "recipes" / "quickstart.yaml")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--delay-s", type=float, default=2.0)
    args = parser.parse_args()
    args.work = args.work.resolve()
    shards = make_shards(args.work)
    shutil.rmtree(args.work / "runs", ignore_errors=True)
    (args.work / "mlflow.db").unlink(missing_ok=True)
    server, port = start_server(args.work)
    slow = f"http://127.0.0.1:{DelayProxy(port, args.delay_s).port}"
    rows, absent = [], 0
    try:
        for i in range(args.rounds):
            pair = {}
            for kind in ("off", "slow")[:: 1 if i % 2 else -1]:
                pair[kind] = run(args, shards, f"{kind}-{i}", slow if kind == "slow" else None)
            absent += missing(args.work / "runs" / f"slow-{i}", port)
            rows.append(pair)
    finally:
        server.terminate()
    lost = statistics.median(1 - r["off"]["step_s"] / r["slow"]["step_s"] for r in rows)
    report(args, rows, lost, absent)
    return 0 if lost <= MAX_LOST and not absent else 1


def report(args: argparse.Namespace, rows: list[dict], lost: float, absent: int) -> None:
    """Print the table and write the results file."""
    table = Table(title=f"an MLflow server that responds after {args.delay_s:g} s, every step logged")
    for column in ("pair", "off, ms/step", "slow, ms/step", "lost, %", "exit off, s", "exit slow, s"):
        table.add_column(column, justify="right")
    for i, r in enumerate(rows):
        off, slow = r["off"]["step_s"], r["slow"]["step_s"]
        numbers = (
            1000 * off,
            1000 * slow,
            100 * (1 - off / slow),
            r["off"]["ending_s"],
            r["slow"]["ending_s"],
        )
        table.add_row(str(i + 1), *(f"{n:.1f}" for n in numbers))
    Console(width=110).print(table)
    print(f"median loss of throughput {100 * lost:.1f} %; {absent} numbers missing on the server")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    found = {"machine": machine, "revision": git_revision(), "delay_s": args.delay_s, "steps": args.steps}
    found |= {"pairs": rows, "lost": lost, "missing": absent}
    path = Path(__file__).parent / "results" / "tracking.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
