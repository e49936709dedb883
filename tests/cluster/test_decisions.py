"""What is decided around the trainer on a cluster, without one: bad nodes, restarts, permanent checkpoints, network."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_scale.cluster import checks
from maestro_scale.cluster.attempts import FINISHED, GAVE_UP, REQUEUE, Attempt, decide
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


def test_good_nodes_are_not_blamed():
    assert find_bad_nodes(NODES, reports()) == {}


def test_a_silent_node_is_bad():
    silent = reports()
    del silent["b"]
    assert list(find_bad_nodes(NODES, silent)) == ["b"]


def test_a_node_with_a_problem_is_bad_whatever_the_network_says():
    bad = find_bad_nodes(
        NODES, reports(a={"problems": ["3 GPUs of the 4 asked for"]}, b={"unreachable": ["c"]})
    )
    assert bad == {"a": "3 GPUs of the 4 asked for"}


def test_a_node_that_is_cut_off_is_told_from_those_that_miss_it():
    cut = reports(a={"unreachable": ["c"]}, b={"unreachable": ["c"]}, c={"unreachable": ["a", "b"]})
    assert list(find_bad_nodes(NODES, cut)) == ["c"]


def test_a_failing_collective_is_said():
    bad = find_bad_nodes(NODES, reports(a={"collective": "timed out"}))
    assert "all-reduce failed (timed out)" in bad["a"]


def outcome(run_dir: Path, **content: object) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "outcome.json").write_text(json.dumps(content))


def test_what_follows_the_end_of_the_tasks(tmp_path):
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
    further = dataclasses.replace(failed, step=20)  # a newer checkpoint: counting begins again
    codes = [decide(run, logs, further, 3) for _ in range(3)]
    assert [c for c, _ in codes] == [REQUEUE, REQUEUE, GAVE_UP]
    assert "rank-0001.log: error: s3://x: no such bucket" in codes[-1][1]
    other = dataclasses.replace(further, job="8")  # submitted again: a new start
    assert decide(run, logs, other, 3)[0] == REQUEUE


def test_permanent_checkpoints(tmp_path):
    for step in (10, 20, 40):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        if step != 40:
            (folder / "COMMIT.json").touch()
    assert [p.name for p in permanent_checkpoints(tmp_path, 20)] == ["step_00000020"]
    assert [p.name for p in permanent_checkpoints(tmp_path, 5)] == ["step_00000010", "step_00000020"]


def test_ranks_come_from_slurm_and_interfaces_too_unless_they_are_named():
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "b"}
    env |= {"MAESTRO_NODES": "a b"}
    made = task_environment(env, lambda host: f"to-{host}")
    assert made["RANK"] == "3"
    assert made["GLOO_SOCKET_IFNAME"] == made["NCCL_SOCKET_IFNAME"] == "to-a"
    submitted_from_a_task = {**env, "RANK": "0", "WORLD_SIZE": "1", "NCCL_SOCKET_IFNAME": "ib0"}
    made = task_environment(submitted_from_a_task, lambda host: "eth0")
    assert (made["RANK"], made["WORLD_SIZE"]) == ("3", "4")
    assert "NCCL_SOCKET_IFNAME" not in made
    assert task_environment({**env, "MAESTRO_IFNAME": "ib0"})["NCCL_SOCKET_IFNAME"] == "ib0"


def test_disks_and_memory(tmp_path):
    assert checks.disk_problems(tmp_path, 0.0, "cache") == []
    assert "make room" in checks.disk_problems(tmp_path, 1e9, "cache")[0]
    (tmp_path / "file").touch()
    assert checks.disk_problems(tmp_path / "file" / "below", 0.0, "cache")[0].startswith("cache ")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 1000 kB\n")
    assert "of memory available" in checks.memory_problems(1.0, meminfo)[0]


def test_the_doctor_finds_and_advises(tmp_path, monkeypatch, synthetic_shards):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:planted-secret@127.0.0.1:9")
    found = list(run_checks([str(synthetic_shards), str(tmp_path / "none")], [tmp_path]))
    by_name: dict[str, list[Finding]] = {}
    for f in found:
        by_name.setdefault(f.what, []).append(f)
    assert {"python", "torch", "attention", "collectives", "SLURM", "disk"} <= set(by_name)
    assert "maestro-scale sync" in by_name["MLflow"][0].advice
    assert [bool(f.advice) for f in by_name["data"]] == [False, True]
    lines: list[str] = []
    assert print_findings(iter(found), lines.append) == sum(bool(f.advice) for f in found)
    assert "planted-secret" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain_multinode.sh", "r.yaml"], "no SLURM job here"),
        (["shard_dataset.sh", "a", "b", "c"], "no SLURM job here"),
        (["evaluate.sh", "--out", "x"], "which model?"),
        (["evaluate.sh", "--checkpoint", "x"], "where to?"),
        (
            ["evaluate.sh", "--checkpoint", "x", "--out", "y", "--recipes", "/none.yaml"],
            "no recipe /none.yaml",
        ),
        (["follow.sh", "/none"], "which run?"),
    ],
)
def test_scripts_without_slurm_say_what_is_missing(tmp_path, words, said):
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
    assert said in done.stderr.splitlines()[-1]


def test_following_a_run_that_keeps_nothing_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata: {mixture: [{dataset: treesatai_ts, shards: /none}]}\n"
    )
    command = [sys.executable, "-m", "maestro_scale.cluster.permanent", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "checkpoint.keep_every" in done.stderr
