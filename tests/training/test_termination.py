"""Two real ranks, of which one ends: what they print, and their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_scale.training.distributed import free_port

PROGRAM = """
import os, sys, time
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from maestro_scale.entry import run_command
from maestro_scale.errors import MaestroError
from maestro_scale.training.binding import Launch
from maestro_scale.training.distributed import World, _exchange, hard_exit
from maestro_scale.training.job_store import join
from maestro_scale.training.watchdog import monitored

kind, rank = sys.argv[1], int(os.environ["RANK"])

def command():
    if kind == "early" and rank == 1:
        raise MaestroError("manifest.json: cannot be read")
    job = join(Launch("environment", rank, 2, rank, 2), 60)
    _exchange(job, "", lambda: None)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World(rank, 2, rank, None)
    with monitored(world, 8, Path(sys.argv[2])) as watchdog:
        watchdog.pause()
        watchdog._send_heartbeat()
        if kind == "common":
            raise MaestroError("shards/a.tar: damaged")
        if rank == 1:
            if kind == "error":
                raise MaestroError("shards/a.tar: damaged")
            if kind == "bug":
                raise ValueError("a bug")
            os.kill(os.getpid(), 9)
        dist.barrier()

hard_exit(run_command(command, rank))
"""
LOST = "error: lost rank 1 on {host}, which ended with {how}; the same command resumes"
OWN = "its own error message (exit code 2)"


@pytest.mark.parametrize(
    ("kind", "codes", "first", "second"),
    [
        (
            "early",
            [2, 2],
            ["error: lost rank 1 on {host}, which ended with " + OWN],
            ["error (rank 1 on {host}): manifest.json: cannot be read"],
        ),
        ("error", [2, 2], [LOST.replace("{how}", OWN)], ["error (rank 1 on {host}): shards/a.tar: damaged"]),
        ("common", [2, 2], ["error: shards/a.tar: damaged"], []),
        (
            "killed",
            [3, -9],
            [
                "error: lost a rank: no heartbeat from rank 1 on {host}, last at step 0, evaluating (frozen, dead or "
                "disconnected); the same command resumes"
            ],
            [],
        ),
    ],
)
def test_one_line_of_each_rank(tmp_path, kind, codes, first, second):
    host = os.uname().nodename
    found = outputs(tmp_path, kind)
    assert [code for code, _ in found] == codes, found
    expected = ["\n".join(lines).format(host=host) for lines in (first, second)]
    assert [errors.strip() for _, errors in found] == expected


def test_a_bug_prints_its_traceback_once(tmp_path):
    (code, survivor), (bug_code, failed) = outputs(tmp_path, "bug")
    assert (code, bug_code) == (1, 1)
    assert failed.count("Traceback") == 1
    assert failed.endswith("ValueError: a bug\n")
    assert survivor.splitlines() == [
        f"error: lost rank 1 on {os.uname().nodename}, which ended with an unexpected error and its traceback "
        "(exit code 1); the same command resumes"
    ]


def outputs(folder: Path, kind: str) -> list[tuple[int, str]]:
    """(exit code, standard error) of both ranks."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind, str(folder)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [
            (process.returncode, errors)
            for process in ranks
            for _, errors in [process.communicate(timeout=120)]
        ]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
