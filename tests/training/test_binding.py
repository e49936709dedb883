"""Device binding: the environments of launchers, with the device index and the LOCAL_RANK that each results in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testkit.runs import write_recipe

from maestro_scale.training import device
from maestro_scale.training.binding import (
    DeviceError,
    Launch,
    bind,
    check_distinct,
    gpu_sign,
    identify,
    refuse_idle_gpus,
    tasks_per_node,
)

# As SLURM 22.05 sets them for `srun` within a batch job on a node of 4 GPUs, recorded on a real one.
_TASK = {
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_GPUS": "0,1,2,3",
}


def _srun(task: int, **more: str) -> dict[str, str]:
    return {**_TASK, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), **more}


def _launched(task: int, **more: str) -> dict[str, str]:
    """The same after cluster/launch.py."""
    return {**_srun(task, **more), "RANK": str(task), "WORLD_SIZE": "4", "LOCAL_RANK": str(task)}


_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
_HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
_TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}
_DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
_BATCH = {  # of the batch script itself, outside of srun
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_GPUS": "0,1,2,3",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}

# name: (environment, visible GPUs) -> (launcher, rank, size), device index, exported LOCAL_RANK
TABLE = {
    "srun --gpus-per-node": (
        _srun(2, CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_STEP_GPUS="0,1,2,3", SLURM_GPUS_PER_NODE="4"), 4,
        ("srun", 2, 4), 2, "2",
    ),
    "pretrain_multinode.sh --gpus-per-node": (
        _launched(3, CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_STEP_GPUS="0,1,2,3"), 4,
        ("srun", 3, 4), 3, "3",
    ),
    # Without ConstrainDevices the one device keeps its number in CUDA_VISIBLE_DEVICES …
    "srun --gpus-per-task=1": (
        _srun(2, CUDA_VISIBLE_DEVICES="2", SLURM_STEP_GPUS="2", SLURM_GPUS_PER_TASK="1"), 1,
        ("srun", 2, 4), 0, "0",
    ),
    # … and with it, cgroups hide the others and every task has number 0.
    "srun --gpus-per-task=1, cgroups": (
        _srun(2, CUDA_VISIBLE_DEVICES="0", SLURM_STEP_GPUS="2", SLURM_GPUS_PER_TASK="1"), 1,
        ("srun", 2, 4), 0, "0",
    ),
    "pretrain_multinode.sh --gpus-per-task=1": (
        _launched(3, CUDA_VISIBLE_DEVICES="0", SLURM_STEP_GPUS="3", SLURM_GPUS_PER_TASK="1"), 1,
        ("srun", 3, 4), 0, "0",
    ),
    "srun --gpu-bind=single:1": (
        _srun(1, CUDA_VISIBLE_DEVICES="1", SLURM_STEP_GPUS="1", SLURM_GPUS_PER_NODE="4"), 1,
        ("srun", 1, 4), 0, "0",
    ),
    "srun --gpu-bind=map_gpu:3,2,1,0": (
        _srun(1, CUDA_VISIBLE_DEVICES="2", SLURM_STEP_GPUS="2", SLURM_GPUS_PER_NODE="4"), 1,
        ("srun", 1, 4), 0, "0",
    ),
    "srun --gpus-per-task=1 --gpu-bind=none": (
        _srun(1, SLURM_GPUS_PER_TASK="1"), 4,
        ("srun", 1, 4), 1, "1",
    ),
    "srun on two nodes, second node": (
        _srun(
            1, SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="4(x2)",
            CUDA_VISIBLE_DEVICES="0,1,2,3",
        ), 4,
        ("srun", 5, 8), 1, "1",
    ),
    "srun of one task": (
        {**_srun(0), "SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4,
        ("srun", 0, 1), 0, "0",
    ),
    # SLURM_NTASKS is the job's there, as salloc starts the shell with --preserve-env.
    "python in the shell of salloc on a node": (
        {**_srun(0), "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, 4,
        ("srun", 0, 1), 0, "0",
    ),
    "python in a batch script of 4 tasks": (_BATCH, 4, ("none", 0, 1), 0, "0"),
    "torchrun": (_TORCHRUN, 4, ("torchrun", 5, 8), 1, "1"),
    "torchrun in a batch script": ({**_BATCH, **_TORCHRUN}, 4, ("torchrun", 5, 8), 1, "1"),
    "torchrun in an srun task per node": (
        {**_TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
         "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 4,
        ("torchrun", 5, 8), 1, "1",
    ),
    "torchrun --virtual-local-rank": (
        {**_TORCHRUN, "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "1"}, 1, ("torchrun", 5, 8), 0, "0",
    ),
    "deepspeed": (_DEEPSPEED, 4, ("deepspeed", 5, 8), 1, "1"),
    "deepspeed --include node:2,3": (
        {**_DEEPSPEED, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "2,3"}, 2,
        ("deepspeed", 1, 2), 1, "1",
    ),
    "CUDA_VISIBLE_DEVICES per task, index": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 1,
        ("environment", 3, 4), 0, "0",
    ),
    "CUDA_VISIBLE_DEVICES per task, UUID": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3",
         "CUDA_VISIBLE_DEVICES": "GPU-989d4723-8384-4046-39ce-b8535b6b92da"}, 1,
        ("environment", 3, 4), 0, "0",
    ),
    "MIG instance per task": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
         "CUDA_VISIBLE_DEVICES": "MIG-1f5ff1bc-0d0e-5b5a-9b7c-8f4b0c2f5a3d"}, 1,
        ("environment", 1, 2), 0, "0",
    ),
    "Open MPI": (_OPEN_MPI, 4, ("mpirun", 5, 8), 1, "1"),
    "Open MPI, one GPU per task": (
        {**_OPEN_MPI, "CUDA_VISIBLE_DEVICES": "1"}, 1, ("mpirun", 5, 8), 0, "0",
    ),
    "Open MPI in a batch script": ({**_BATCH, **_OPEN_MPI}, 4, ("mpirun", 5, 8), 1, "1"),
    "MPICH, Intel MPI": ({**_BATCH, **_HYDRA}, 4, ("mpirun", 5, 8), 1, "1"),
    "one process on a node with 8 GPUs": ({}, 8, ("none", 0, 1), 0, "0"),
    "one process on the CPU": ({}, 0, ("none", 0, 1), None, "0"),
    "srun on the CPU": (_srun(2), 0, ("srun", 2, 4), None, "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_environments(name):
    env, num_visible, (launcher, rank, size), index, local_rank = TABLE[name]
    binding = bind(env, num_visible)
    launch = binding.launch
    assert (launch.launcher, launch.rank, launch.size) == (launcher, rank, size)
    assert binding.index == index
    expected = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": local_rank}
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:  # DeepSpeed asserts that both are equal
        expected["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
    assert binding.exports == expected


@pytest.mark.parametrize(
    ("env", "num_visible", "message"),
    [
        # --gpus-per-node=2 with 4 tasks; the tasks 0 and 1 fail too, although they would have a device.
        (_srun(0, CUDA_VISIBLE_DEVICES="0,1"), 2, r"4 tasks on this node, .* sees 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\)"),
        (_srun(3), 2, "4 tasks on this node, each of which sees 2 GPUs: start at most 2 tasks per node, or give"),
        ({**_TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, 4, "8 tasks on this node"),
        # The number of tasks is not known, but it is at least the local rank + 1.
        ({"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "6"}, 4, "7 tasks on this node"),
        ({"RANK": "1"}, 1, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, 1, "RANK='one' is not a number"),
        ({**_srun(1), "SLURM_NODEID": "7"}, 4, "SLURM_NODEID 7 is not among the 1 nodes of"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_work(env, num_visible, message):
    with pytest.raises(DeviceError, match=message):
        bind(env, num_visible)


def test_a_single_visible_gpu_fits_any_number_of_tasks():
    """Each task may have its own; whether they differ is decided by their UUIDs."""
    assert [bind(_srun(task), 1).index for task in range(4)] == [0, 0, 0, 0]


def test_ranks_with_the_same_gpu_are_refused():
    hosts = ["a", "a", "b", "b"]
    check_distinct(["GPU-1", "GPU-2", "GPU-3", "GPU-4"], hosts)
    check_distinct(["", "", "", ""], hosts)
    with pytest.raises(DeviceError, match="ranks 0 and 2 on b have the same GPU GPU-1") as raised:
        check_distinct(["GPU-1", "GPU-2", "GPU-1", "GPU-2"], hosts)
    assert raised.value.same_on_all_ranks


def test_instances_of_one_gpu_are_different_devices():
    uuid = "989d4723-8384-4046-39ce-b8535b6b92da"
    assert identify(uuid, {}) == f"GPU-{uuid}"
    assert identify(uuid, {"CUDA_VISIBLE_DEVICES": "3"}) == f"GPU-{uuid}"
    assert identify(uuid, {"CUDA_VISIBLE_DEVICES": "MIG-aa,MIG-bb"}) == "MIG-aa"


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2)", [4, 4]), ("2(x3),1", [2, 2, 2, 1]), ("8,1(x2)", [8, 1, 1])]
)
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


def test_a_launcher_of_its_own_without_a_local_rank():
    launch = Launch.from_env({"RANK": "2", "WORLD_SIZE": "4"})
    assert (launch.local_rank, launch.local_size) == (0, None)
    # RANK as SLURM's: then SLURM also knows the local rank.
    env = {**_srun(1), "SLURM_PROCID": "3", "RANK": "3", "WORLD_SIZE": "4"}
    assert (Launch.from_env(env).local_rank, Launch.from_env(env).local_size) == (1, 4)


@pytest.mark.parametrize(
    ("env", "files", "sign"),
    [
        ({}, [], None),
        ({"SLURM_GPUS_ON_NODE": "0"}, [], None),
        ({"SLURM_GPUS_ON_NODE": "8"}, [], "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_JOB_GPUS": "0,1"}, [], "SLURM_JOB_GPUS=0,1"),
        ({}, ["dev/nvidia0"], "dev/nvidia0 exists"),
        ({}, ["dev/nvidiactl"], None),  # the driver is loaded, but this container has no device
        ({}, ["proc/driver/nvidia/gpus/0000:3b:00.0"], "proc/driver/nvidia/gpus/0000:3b:00.0 exists"),
    ],
)
def test_signs_of_gpus(env, files, sign, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = gpu_sign(env, tmp_path)
    assert found == sign or (sign is not None and found == f"{tmp_path}/{sign}")


@pytest.mark.parametrize(
    ("script", "sign"),
    [("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "nvidia-smi lists one"), ("echo failed; exit 9", None)],
)
def test_nvidia_smi_counts_only_where_it_lists_a_gpu(script, sign, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_sign({}, tmp_path / "root") == sign


def test_a_node_with_gpus_does_not_train_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    on_gpus = {"SLURM_GPUS_ON_NODE": "4"}
    with pytest.raises(
        DeviceError, match=r"SLURM_GPUS_ON_NODE=4\), but this torch is built without CUDA.*train.device=cpu"
    ):
        refuse_idle_gpus(on_gpus, None, tmp_path)
    with pytest.raises(DeviceError, match=r"torch sees none \(CUDA_VISIBLE_DEVICES=''\)"):
        refuse_idle_gpus({**on_gpus, "CUDA_VISIBLE_DEVICES": ""}, "12.9", tmp_path)
    with pytest.raises(DeviceError, match="ask the scheduler for GPUs"):
        refuse_idle_gpus(on_gpus, "12.9", tmp_path)
    refuse_idle_gpus({}, None, tmp_path)


def test_the_setting_cpu_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert device.bind_process("auto").index == 0
    assert device.bind_process("cpu").index is None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert device.bind_process("cpu").index is None


REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["maestro_scale/train.py", "--recipe", "{recipe}", "--run-dir", "{out}"],
        ["maestro_scale/evaluate.py", "--recipe", "{recipe}", "--baseline", "random", "--out", "{out}"],
        ["-m", "maestro_scale.cli", "embed", "MODEL", "SHARDS", "{out}"],
    ],
    ids=["train", "evaluate", "embed"],
)
def test_commands_stop_with_one_line_where_gpus_would_be_unused(command, tmp_path, synthetic_shards):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    env |= {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    places = {"recipe": write_recipe(tmp_path, synthetic_shards), "out": tmp_path / "out"}
    words = [str(word).format(**places) for word in command]
    done = subprocess.run(
        [sys.executable, *words], cwd=REPO, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "this node has GPUs (SLURM_GPUS_ON_NODE=2)" in line
    assert "Traceback" not in done.stderr
