"""Decisions around the trainer on a cluster, tested without one: bad nodes, requeue, checkpoints, network."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from maestro_scale.cluster import attempts, checks, doctor
from maestro_scale.cluster.attempts import FINISHED, GAVE_UP, REQUEUE, Attempt, decide, find_errors
from maestro_scale.cluster.doctor import Finding, print_findings, run_checks
from maestro_scale.cluster.health import NodeReport
from maestro_scale.cluster.launch import task_environment
from maestro_scale.cluster.permanent import permanent_checkpoints
from maestro_scale.cluster.verdict import find_bad_nodes

NODES = ["a", "b", "c"]
REPO = Path(__file__).parents[2]


def reports(**changes: dict) -> dict[str, NodeReport]:
    good = {n: NodeReport(n, 1, finished=True) for n in NODES}
    return {n: dataclasses.replace(r, **changes.get(n, {})) for n, r in good.items()}


def test_good_nodes_are_not_reported():
    assert find_bad_nodes(NODES, reports()) == {}


def test_a_node_without_a_report_is_bad():
    incomplete = reports()
    del incomplete["b"]
    assert list(find_bad_nodes(NODES, incomplete)) == ["b"]


def test_local_problems_take_precedence_over_the_network():
    bad = find_bad_nodes(
        NODES, reports(a={"problems": ["3 of 4 requested GPUs found"]}, b={"unreachable": ["c"]})
    )
    assert bad == {"a": "3 of 4 requested GPUs found"}


def test_a_disconnected_node_is_identified_by_the_majority():
    disconnected = reports(a={"unreachable": ["c"]}, b={"unreachable": ["c"]}, c={"unreachable": ["a", "b"]})
    assert list(find_bad_nodes(NODES, disconnected)) == ["c"]


def test_a_failing_collective_is_reported():
    bad = find_bad_nodes(NODES, reports(a={"collective": "timed out"}))
    assert "all-reduce failed (timed out)" in bad["a"]


def outcome(run_dir: Path, **content: object) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "outcome.json").write_text(json.dumps(content))


def test_requeue_decisions(tmp_path):
    run, logs = tmp_path / "run", tmp_path / "logs"
    logs.mkdir()
    failed = Attempt("7", 0, step=10, status=1, asked=False)
    outcome(run, reason="done", why="", step=30)
    assert decide(run, logs, failed, 3)[0] == FINISHED
    outcome(run, reason="stopped", why="the file STOP", step=20)
    assert decide(run, logs, failed, 3)[0] == FINISHED
    (run / "outcome.json").unlink()
    assert decide(run, logs, dataclasses.replace(failed, asked=True), 3)[0] == REQUEUE
    (logs / "rank-0001.log").write_text("fine\nerror: s3://x: no such bucket\n")
    assert [decide(run, logs, failed, 3)[0] for _ in range(2)] == [REQUEUE, REQUEUE]
    later = dataclasses.replace(failed, step=20)  # a newer checkpoint resets the count
    codes = [decide(run, logs, later, 3) for _ in range(3)]
    assert [c for c, _ in codes] == [REQUEUE, REQUEUE, GAVE_UP]
    assert "rank-0001.log: error: s3://x: no such bucket" in codes[-1][1]
    other = dataclasses.replace(later, job="8")  # another job: a new count
    assert decide(run, logs, other, 3)[0] == REQUEUE


def test_permanent_checkpoints(tmp_path):
    for step in (10, 20, 40):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        if step != 40:
            (folder / "COMMIT.json").touch()
    assert [p.name for p in permanent_checkpoints(tmp_path, 20)] == ["step_00000020"]
    assert [p.name for p in permanent_checkpoints(tmp_path, 5)] == ["step_00000010", "step_00000020"]


def test_task_environment_from_slurm():
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "b"}
    env |= {"MAESTRO_NODES": "a b"}
    added = task_environment(env, lambda host: f"to-{host}")
    assert added["RANK"] == "3"
    assert added["GLOO_SOCKET_IFNAME"] == added["NCCL_SOCKET_IFNAME"] == "to-a"
    submitted_from_a_task = {**env, "RANK": "0", "WORLD_SIZE": "1", "NCCL_SOCKET_IFNAME": "ib0"}
    added = task_environment(submitted_from_a_task, lambda host: "eth0")
    assert (added["RANK"], added["WORLD_SIZE"]) == ("3", "4")
    assert "NCCL_SOCKET_IFNAME" not in added
    assert task_environment({**env, "MAESTRO_IFNAME": "ib0"})["NCCL_SOCKET_IFNAME"] == "ib0"


def test_disk_and_memory_checks(tmp_path, monkeypatch):
    assert checks.disk_problems(tmp_path, 0.0, "cache") == []
    assert "free some space" in checks.disk_problems(tmp_path, 1e9, "cache")[0]
    (tmp_path / "file").touch()
    assert checks.disk_problems(tmp_path / "file" / "below", 0.0, "cache")[0].startswith("cache ")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**29))
    assert checks.memory_problems(0.4) == []
    assert checks.memory_problems(1.0)[0].startswith("0.5 GiB of memory available, 1 required")


def test_the_type_of_a_file_system_is_that_of_the_last_mount_at_the_longest_path(tmp_path, monkeypatch):
    inner = tmp_path / "a disk"
    (inner / "runs").mkdir(parents=True)
    mounts = [
        ("/", "rootfs"),
        ("/", "overlay"),
        (tmp_path, "ext4"),
        (inner, "ext4"),
        (inner, "lustre"),
        (f"{inner}2", "nfs"),
    ]
    listed = [SimpleNamespace(mountpoint=str(point), fstype=kind) for point, kind in mounts]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: listed if all else [])
    assert doctor._file_system(inner / "runs") == "lustre"
    assert doctor._file_system(inner) == "lustre"
    assert doctor._file_system(tmp_path) == "ext4"
    assert doctor._file_system(Path("/")) == "overlay"


@pytest.mark.parametrize(
    ("reason", "words", "code"),
    [
        ({"reason": "done", "step": 7}, ["--status=0", "--asked=0"], FINISHED),
        ({}, ["--status=1", "--asked=1"], REQUEUE),
        ({}, ["--status=1", "--asked=0"], GAVE_UP),
    ],
)
def test_the_exit_code_tells_the_batch_script_what_to_do(tmp_path, reason, words, code):
    if reason:
        (tmp_path / "outcome.json").write_text(json.dumps(reason))
    places = [f"--run_dir={tmp_path}", f"--logs={tmp_path}", "--max_failures=1"]
    assert CliRunner().invoke(attempts.app, ["decide", *places, *words]).exit_code == code


def test_doctor(tmp_path, monkeypatch, synthetic_shards):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:planted-secret@127.0.0.1:9")
    findings = list(run_checks([str(synthetic_shards), str(tmp_path / "none")], [tmp_path]))
    by_name: dict[str, list[Finding]] = {}
    for f in findings:
        by_name.setdefault(f.check, []).append(f)
    assert {"python", "torch", "attention", "collectives", "SLURM", "disk"} <= set(by_name)
    assert "maestro-scale sync" in by_name["MLflow"][0].advice
    assert [bool(f.advice) for f in by_name["data"]] == [False, True]
    lines: list[str] = []
    assert print_findings(iter(findings), lines.append) == sum(bool(f.advice) for f in findings)
    assert "planted-secret" not in "\n".join(lines)


def test_doctor_reports_gpus_that_a_run_would_refuse_to_leave_unused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for sign in ("SLURM_GPUS_ON_NODE=8", None):
        monkeypatch.setattr(doctor, "gpu_sign", lambda env, sign=sign: sign)
        (finding,) = [f for f in doctor._accelerators() if f.check == "accelerator"]
        assert ("this node has GPUs (SLURM_GPUS_ON_NODE=8)" in finding.advice) == (sign is not None)


def test_doctor_on_rdma(tmp_path):
    (finding,) = doctor._rdma(tmp_path / "none")
    assert (finding.result, finding.advice) == ("no card (NCCL uses TCP between nodes)", "")
    (tmp_path / "cards" / "mlx5_0").mkdir(parents=True)
    (finding,) = doctor._rdma(tmp_path / "cards", "libc.so.6")
    assert (finding.result, finding.advice) == ("mlx5_0", "")
    (finding,) = doctor._rdma(tmp_path / "cards", "libnone.so.1")
    assert finding.result == "mlx5_0, but no libnone.so.1"
    assert "install libibverbs1" in finding.advice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain_multinode.sh", "r.yaml"], "no SLURM job here"),
        (["shard_dataset.sh", "a", "b", "c"], "no SLURM job here"),
        (["evaluate.sh", "--out", "x"], "no model: use --checkpoint"),
        (["evaluate.sh", "--checkpoint", "x"], "no output folder"),
        (
            ["evaluate.sh", "--checkpoint", "x", "--out", "y", "--recipes", "/none.yaml"],
            "recipe /none.yaml does not exist",
        ),
        (["predict.sh", "model", "shards"], "usage: sbatch slurm/predict.sh"),
        (["predict.sh", "model", "shards", "out"], "no SLURM job here"),
        (["follow.sh", "/none"], "no run directory"),
    ],
)
def test_scripts_report_missing_slurm_or_arguments(tmp_path, words, message):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    script = REPO / "slurm" / words[0]
    done = subprocess.run(
        ["bash", script, *words[1:]],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_following_a_run_without_permanent_checkpoints_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata: {mixture: [{dataset: treesatai_ts, shards: /none}]}\n"
    )
    command = [sys.executable, "-m", "maestro_scale.cluster.permanent", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "checkpoint.keep_every" in done.stderr


def test_the_rank_that_knows_the_cause_is_reported_before_those_that_lost_it(tmp_path):
    for rank in range(8):
        (tmp_path / f"rank-{rank:04d}.log").write_text(
            "Traceback\n"
            f"error (rank {rank} on a): lost rank 8 on b, which ended with its own error message (exit code 2)\n"
        )
    (tmp_path / "rank-0008.log").write_text("error (rank 8 on b): shards/a.tar: damaged\n")
    lines = find_errors(tmp_path)
    assert lines[0] == "rank-0008.log: error (rank 8 on b): shards/a.tar: damaged"
    assert len(lines) == 6
