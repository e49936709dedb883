"""``maestro-scale predict`` by three ranks, killed by SIGKILL and started again: the bytes of one rank undisturbed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from testkit import slow_prediction
from testkit.runs import Job

from maestro_scale.inference import run
from maestro_scale.inference.command import Options, predict
from maestro_scale.training.distributed import free_port

pytestmark = pytest.mark.slow
CLASSES: dict[str, Any] = {"probabilities": True}
KINDS: dict[str, dict[str, Any]] = {
    "embeddings": {"embeddings": "cog"},
    "vectors": {"embeddings": "parquet", "overlap": 0.5},
}


@pytest.fixture
def as_killed(monkeypatch):
    """What the command does, as one thread in this process: predict into a folder as these ranks, one after another."""
    slow_prediction.use_small_parts(monkeypatch.setattr)
    monkeypatch.setitem(run.MEMORY_BYTES, "cpu", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def predict_as(model, valley, out: Path, options: dict[str, Any], ranks: Sequence[int] = (0,)) -> None:
        how = run.Run(torch.device("cpu"), world=len(ranks))
        for rank in ranks:
            files = Options(files=str(valley.scene), **options)
            predict(model, str(valley.description), out, files, replace(how, rank=rank))

    yield predict_as
    torch.set_num_threads(threads)


def start(valley, out: Path, options: dict[str, Any], launcher: str, pause_s: float = 0.0) -> Job:
    """The command on the scene of the valley, by three ranks."""
    words = [slow_prediction.__file__, "predict", str(valley.model), str(valley.description), str(out)]
    words += ["--files", str(valley.scene), "--device", "cpu"]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    port = str(free_port())
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PAUSE_S": str(pause_s)}
    log = out.with_name(f"{port}.log")
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
        return Job([([*command, f"--master-port={port}", *words], env)], log)
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    ranks = [{**env, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(3)]
    return Job([([sys.executable, *words], of_rank) for of_rank in ranks], log)


def kill_in_the_middle(valley, out: Path, options: dict[str, Any], launcher: str, delay_s: float) -> None:
    """Start three ranks; ``delay_s`` after their first part, kill them and their launcher."""
    job = start(valley, out, options, launcher, pause_s=0.1)
    deadline = time.monotonic() + 200
    while not list((out / ".parts").glob("*.bin")):
        assert not any(p.poll() for p in job.processes), job.output[-3000:]
        assert time.monotonic() < deadline, job.output[-3000:]
        time.sleep(0.01)
    time.sleep(delay_s)
    started = [psutil.Process(p.pid) for p in job.processes if p.poll() is None]
    started += [child for p in started for child in p.children(recursive=True)]
    for process in started:
        process.send_signal(signal.SIGKILL)
    job.kill()
    psutil.wait_procs(started, timeout=20)


def contents(folder: Path) -> dict[str, bytes]:
    """{path: content} of everything, but for the record."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "_predict.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def check_partial(folder: Path, expected: dict[str, bytes], when: str) -> None:
    """Maps are missing, and those that are there are complete."""
    left = contents(folder)
    assert set(left) != set(expected), f"not killed in the middle, but {when}"
    assert all(expected[name] == left[name] for name in left.keys() & expected.keys()), when


def test_ranks_of_torchrun_killed_and_started_again_write_the_bytes_of_one(
    model, valley, tmp_path, as_killed
):
    as_killed(model, valley, tmp_path / "alone", CLASSES)
    expected = contents(tmp_path / "alone")
    delay_s = random.SystemRandom().uniform(0, 1)
    kill_in_the_middle(valley, tmp_path / "killed", CLASSES, "torchrun", delay_s)
    check_partial(tmp_path / "killed", expected, f"{delay_s} s after the first part")
    job = start(valley, tmp_path / "killed", CLASSES, "env")
    assert job.wait(200) == 0, job.output[-3000:]
    assert contents(tmp_path / "killed") == expected, f"killed {delay_s} s after the first part"


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_ranks_that_were_killed(model, valley, tmp_path, as_killed, kind):
    as_killed(model, valley, tmp_path / "alone", KINDS[kind])
    expected = contents(tmp_path / "alone")
    delay_s = random.SystemRandom().uniform(0, 1)
    kill_in_the_middle(valley, tmp_path / "killed", KINDS[kind], "env", delay_s)
    check_partial(tmp_path / "killed", expected, f"{delay_s} s after the first part")
    as_killed(model, valley, tmp_path / "killed", KINDS[kind], ranks=(1, 2, 0))
    assert contents(tmp_path / "killed") == expected, f"killed {delay_s} s after the first part"
