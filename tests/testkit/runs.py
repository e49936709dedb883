"""Real runs for tests: synthetic shards, a tiny recipe, and the trainer behind the real deepspeed launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import yaml

from maestro_scale.training.distributed import free_port
from testkit import preloaded
from testkit.preloaded import ForkedProcess

REPO = Path(__file__).parents[2]
TRAIN = REPO / "maestro_scale" / "train.py"
RECIPE = """
name: tiny
seed: 3
data:
  mixture:
    - dataset: treesatai_ts
      shards: {shards}
      split: train
      sensors:
        aerial: {{image_size: 60, patch: 20}}
        s2: {{num_dates: 4, patch: 3}}
        s1_asc: {{num_dates: 2, patch: 3}}
        s1_des: {{num_dates: 2, patch: 3}}
  lanes: 4
  workers: 1
  cache_dir: {cache}
  shuffle_window: 8
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
optim: {{base_lr: 1.0e-3}}
train: {{steps: 6, global_batch: 8, micro_batch: 4, precision: fp32, log_every: 1, audit: true}}
deepspeed: {{zero_optimization: {{stage: 2}}}}
checkpoint: {{every_steps: 2, keep: 2}}
tracking: {{enabled: false, pictures_every: 0}}
"""


def write_recipe(folder: Path, shards: Path, workers: int = 1) -> Path:
    """The tiny recipe for ``shards``. ``workers`` 0 saves 2 s per rank, where loader processes change nothing."""
    path = folder / "tiny.yaml"
    text = RECIPE.format(shards=json.dumps(str(shards)), cache=json.dumps(str(folder / "cache")))
    path.write_text(text.replace("workers: 1", f"workers: {workers}"))
    return path


SECOND_SENSORS = {
    "aerial": None,
    "s2": {"image_size": 4, "patch": 2, "num_dates": 3},
    "s1_asc": {"patch": 3, "num_dates": 2},
    "s1_des": {"patch": 3, "num_dates": 2, "embed": "s1_des"},
}


def write_mixture_recipe(folder: Path, shards: Path) -> Path:
    """The tiny recipe with two datasets, of weights 2 and 1: train, and val with other sensors and sizes."""
    path = write_recipe(folder, shards)
    recipe = yaml.safe_load(path.read_text())
    (entry,) = recipe["data"]["mixture"]
    entry["weight"] = 2
    recipe["data"]["mixture"].append({**entry, "split": "val", "weight": 1, "sensors": SECOND_SENSORS})
    recipe["data"]["mixture"][0]["sensors"]["s2"] = {"num_dates": 4, "patch": 2}
    path.write_text(yaml.safe_dump(recipe))
    return path


class Job:
    """The processes of one run, each the leader of a session, with one log."""

    def __init__(self, commands: list[tuple[list[str], dict[str, str]]], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as sink:
            self.processes = [_start(command, env, sink) for command, env in commands]

    @property
    def output(self) -> str:
        """The output of all processes."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Exit code: 0 if every process succeeded; the first failure ends the others, as a launcher does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            codes = [p.poll() for p in self.processes]
            bad = [c for c in codes if c]
            if bad or None not in codes:
                self.kill()
                return bad[0] if bad else 0
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"not over after {timeout_s} s:\n{self.output[-4000:]}")

    def kill(self) -> None:
        """SIGKILL every process and its descendants."""
        sessions = {p.pid for p in self.processes}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _session(entry) in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=30)


@dataclass
class Trainer:
    """Runs ``train.py`` on one recipe: ``launcher`` "deepspeed", or "env" for processes with RANK etc. set."""

    recipe: Path
    launcher: str = "env"
    env: dict[str, str] = field(default_factory=dict)
    entry: Path = TRAIN

    def start(self, run_dir: Path | None, ranks: int, *args: str) -> Job:
        where = [f"--run-dir={run_dir}"] if run_dir else []
        script = [str(self.entry), f"--recipe={self.recipe}", *where, *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **self.env}
        port = str(free_port())
        log = (run_dir.parent if run_dir else self.recipe.parent) / f"log-{port}.txt"
        if run_dir is None:
            log = Path(tempfile.gettempdir()) / log.name
        if self.launcher == "deepspeed":
            program = Path(sys.executable).parent / "deepspeed"
            return Job([([str(program), f"--num_gpus={ranks}", f"--master_port={port}", *script], env)], log)
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        commands = [
            ([sys.executable, *script], {**env, **rendezvous, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(ranks)
        ]
        return Job(commands, log)

    def run(
        self, run_dir: Path | None, ranks: int = 1, *args: str, timeout_s: float = 240
    ) -> tuple[int, str]:
        """(exit code, output) of a complete run."""
        job = self.start(run_dir, ranks, *args)
        return job.wait(timeout_s), job.output

    def train(self, run_dir: Path, ranks: int = 1, *args: str) -> list[dict]:
        """Metrics of a run, which must succeed."""
        code, output = self.run(run_dir, ranks, *args)
        assert code == 0, output[-4000:]
        return metrics(run_dir)

    def kill_at(self, run_dir: Path, ranks: int, step: int, *args: str) -> None:
        """Start a run and SIGKILL its processes once ``step`` is logged."""
        job = self.start(run_dir, ranks, *args)
        deadline = time.monotonic() + 240
        while not any(m["step"] >= step for m in metrics(run_dir)):
            assert not any(p.poll() for p in job.processes), job.output[-4000:]
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.01)
        job.kill()


def _start(command: list[str], env: dict[str, str], sink: BinaryIO) -> subprocess.Popen | ForkedProcess:
    server = preloaded.server()
    if server is not None and server.suits(command, env):
        return server.start(command, env, REPO, sink.fileno())
    return subprocess.Popen(
        command, env=env, cwd=REPO, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
    )


def _session(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return -1


def metrics(run_dir: Path) -> list[dict]:
    """Complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def curve(lines: list[dict]) -> list[float]:
    """Loss by step."""
    return [line["loss"] for line in lines]


def audit(run_dir: Path) -> dict[int, set[str]]:
    """Sample keys of each step, over all ranks."""
    steps: dict[int, set[str]] = {}
    for file in sorted((run_dir / "audit").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            keys = steps.setdefault(record["step"], set())
            assert not keys & set(record["keys"]), "two ranks trained on the same sample"
            keys.update(record["keys"])
    return steps
