"""How SLURM binds GPUs to tasks, on a node with two fake GPUs, and what the scripts do with them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.slurm.cluster import REPO, Cluster, command, wait_until

from maestro_scale.training.binding import bind

SCRIPT = REPO / "slurm" / "pretrain_multinode.sh"
RECORD = """#!/bin/sh
{python} - "$@" <<'END'
import json, os, sys
line = json.dumps({{"args": sys.argv[1:], "env": dict(os.environ)}})
with open({log!r}, "a") as file:
    file.write(line + "\\n")
END
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def gpu_cluster(cluster: Cluster, tmp_path_factory) -> Iterator[Cluster]:
    """The cluster, after a restart with ``--gpus`` on node1."""
    devices = tmp_path_factory.mktemp("devices")
    for i in range(2):
        os.mknod(devices / f"gpu{i}", 0o20666, os.makedev(1, 3))
    config, gres = Path("/etc/slurm/slurm.conf"), Path("/etc/slurm/gres.conf")
    text = config.read_text().replace("NodeName=node1 ", "NodeName=node1 Gres=gpu:2 ")
    config.write_text(f"GresTypes=gpu\n{text}")
    gres.write_text(f"NodeName=node1 Name=gpu File={devices}/gpu[0-1]\n")
    try:
        for pid in command("pgrep", "-x", "slurmctld").split():
            os.kill(int(pid), signal.SIGTERM)
        for node in ("node1", "node2", "node3"):
            for pid in cluster.pids(node):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not command("pgrep", "-x", "slurmctld", check=False), 30)
        command("slurmctld", "-c")
        for node in ("node1", "node2", "node3"):
            cluster.revive(node)
        yield cluster
    finally:
        gres.unlink()


def _recorded(tmp_path: Path) -> tuple[Path, Path]:
    """A Python that records its arguments and environment, and the file with a line per start."""
    log, program = tmp_path / "starts.jsonl", tmp_path / "python"
    program.write_text(RECORD.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    return program, log


def _starts(log: Path, word: str) -> list[dict[str, str]]:
    starts = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        s["env"]
        for s in starts
        if any(word in arg for arg in s["args"]) and "maestro_scale.cluster.launch" in s["args"]
    ]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "visible"),
    [
        (("--gpus-per-node=2",), ["0,1", "0,1"]),
        (("--gpus-per-task=1", "--ntasks-per-node=2"), ["0", "1"]),
    ],
)
def test_tasks_are_bound_and_refuse_the_cpu(gpu_cluster, recipe, tmp_path, options, visible):
    """torch here has no CUDA, so that the tasks must stop instead of training on the CPU."""
    python, log = _recorded(tmp_path)
    words = [recipe, "--run-dir", tmp_path / "run"]
    job = gpu_cluster.submit(
        SCRIPT, *words, options=("--nodes=1", *options), MAESTRO_PYTHON=str(python), MAESTRO_HEALTH="0",
        MAESTRO_MAX_FAILURES="1",
    )  # fmt: skip
    assert job.end() == "FAILED", job.text
    assert "this node has GPUs (SLURM_GPUS_ON_NODE=2), but this torch is built without CUDA" in job.text
    tasks = sorted(_starts(log, "train.py"), key=lambda env: env["SLURM_PROCID"])
    assert [env["CUDA_VISIBLE_DEVICES"] for env in tasks] == visible
    bindings = [bind(env, len(env["CUDA_VISIBLE_DEVICES"].split(","))) for env in tasks]
    assert [b.launch.local_size for b in bindings] == [2, 2]
    devices = [
        env["CUDA_VISIBLE_DEVICES"].split(",")[b.index] for env, b in zip(tasks, bindings, strict=True)
    ]
    assert devices == ["0", "1"]


@pytest.mark.root
@pytest.mark.slow
def test_the_node_check_sees_all_gpus_of_a_job_with_one_per_task(gpu_cluster, recipe, tmp_path):
    python, log = _recorded(tmp_path)
    job = gpu_cluster.submit(
        SCRIPT, recipe, "--run-dir", tmp_path / "run",
        options=("--nodes=1", "--gpus-per-task=1", "--ntasks-per-node=2"), MAESTRO_PYTHON=str(python),
    )  # fmt: skip
    try:
        job.until(lambda: "requested GPUs found" in job.text)  # this torch finds none
    finally:
        command("scancel", job.id)
    (task,) = _starts(log, "maestro_scale.cluster.health")[:1]
    assert task["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert task["MAESTRO_GPUS_PER_NODE"] == "2"


@pytest.mark.root
@pytest.mark.slow
def test_the_check_of_a_job_shows_its_node_and_gpus(gpu_cluster, recipe):
    """An exclusive job of this SLURM has all GPUs of its nodes, whether or not it asks for them."""
    options = ("--nodes=1", "--nodelist=node1")
    checked = gpu_cluster.submit(SCRIPT, recipe, options=options, MAESTRO_CHECK="1")
    assert checked.end() == "COMPLETED", checked.text
    assert "1: node1" in checked.text
    assert "2 GPUs of a node" in checked.text
    assert "nothing was started" in checked.text
