"""Rank discovery and the choice of a rank's device, as pure functions of a launcher's environment variables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.errors import MaestroError

_TASK_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class DeviceError(MaestroError):
    """The devices of this node cannot be used as the run was started; the message says what to change."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among all that were started together.

    ``launcher``: srun, torchrun, deepspeed, mpirun, environment (RANK was set by something else) or none.
    ``local_rank``: number among the processes of this node, of which there are ``local_size``; None: not known.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Launch:
        """From the variables of the launcher. RANK wins over MPI's variables, and these over SLURM's.

        DeviceError where the variables of a launcher are incomplete.
        """
        if "RANK" in env:
            return _from_rank(env)
        if "OMPI_COMM_WORLD_RANK" in env:  # Open MPI
            return cls(
                "mpirun", *_numbers(env, "OMPI_COMM_WORLD", "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
            )
        # MPICH and Intel MPI. Before SLURM, whose variables are there too: their mpirun starts an srun task per node.
        if "PMI_RANK" in env and "MPI_LOCALRANKID" in env:
            rank, size = _numbers(env, "PMI", "RANK", "SIZE")
            return cls("mpirun", rank, size, *_numbers(env, "MPI", "LOCALRANKID", "LOCALNRANKS"))
        # In a batch script, outside of srun, SLURM describes the whole job with rank 0: such a process is alone.
        if _number(env, _num_tasks(env), "1") > 1 and not _is_batch_step(env):
            return _from_slurm(env)
        return cls("srun" if "SLURM_STEP_ID" in env else "none", 0, 1, 0, 1)


def _from_rank(env: Mapping[str, str]) -> Launch:
    if "WORLD_SIZE" not in env:
        raise DeviceError("RANK is set, but WORLD_SIZE is not: set both, or unset RANK")
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    # cluster/launch.py sets RANK from SLURM's variables. They describe another process where torchrun runs in a task.
    is_task = env.get("SLURM_PROCID") == env["RANK"] and env.get("SLURM_NTASKS") == env["WORLD_SIZE"]
    slurm = _from_slurm(env) if is_task and "SLURM_STEP_ID" in env else None
    local_rank = _number(env, "LOCAL_RANK", str(slurm.local_rank if slurm else 0))
    for launcher, mark, count in (
        ("torchrun", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"),
        ("deepspeed", "CROSS_RANK", "LOCAL_SIZE"),
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        if mark in env:
            return Launch(launcher, rank, size, local_rank, _number(env, count) if count in env else None)
    if slurm is not None:
        return Launch("srun", rank, size, local_rank, slurm.local_size)
    return Launch("environment", rank, size, local_rank, 1 if size == 1 else None)


def _from_slurm(env: Mapping[str, str]) -> Launch:
    counts = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE"))
    local_size = None
    if counts and "SLURM_NODEID" in env:
        node, sizes = _number(env, "SLURM_NODEID"), tasks_per_node(counts)
        if node >= len(sizes):
            raise DeviceError(
                f"SLURM_NODEID {node} is not among the {len(sizes)} nodes of {counts!r}: start with srun"
            )
        local_size = sizes[node]
    count = _num_tasks(env).removeprefix("SLURM_")
    rank, size, local_rank = _numbers(env, "SLURM", "PROCID", count, "LOCALID")
    return Launch("srun", rank, size, local_rank, local_size)


def _num_tasks(env: Mapping[str, str]) -> str:
    """The variable with the number of tasks. In the shell that salloc starts on a node, and with ``srun
    --preserve-env``, SLURM_NTASKS is the job's, not the step's."""
    is_step = "SLURM_STEP_ID" in env and "SLURM_STEP_NUM_TASKS" in env
    return "SLURM_STEP_NUM_TASKS" if is_step else "SLURM_NTASKS"


def _is_batch_step(env: Mapping[str, str]) -> bool:
    return env.get("SLURM_PROCID", "0") == "0" and "SLURM_STEP_ID" not in env


def _numbers(env: Mapping[str, str], prefix: str, *names: str) -> list[int]:
    try:
        return [_number(env, f"{prefix}_{name}") for name in names]
    except KeyError as error:
        raise DeviceError(
            f"{error.args[0]} is not set, although other variables of {prefix} are: start with srun, torchrun or "
            "deepspeed, or set RANK, WORLD_SIZE and LOCAL_RANK"
        ) from None


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env[name] if default is None else env.get(name) or default
    if not text.strip().isdecimal():
        raise DeviceError(
            f"{name}={text!r} is not a number: unset it, or start with srun, torchrun or deepspeed"
        )
    return int(text)


def tasks_per_node(text: str) -> list[int]:
    """The counts in SLURM's notation: ``2(x3),1`` is 2, 2, 2, 1."""
    return [int(n) for n, times in _TASK_COUNT.findall(text) for _ in range(int(times or 1))]


@dataclass(frozen=True)
class Binding:
    """The device of a process, and the environment variables that make DeepSpeed and torch use the same.

    ``index``: of the device among the visible ones; None: the CPU.
    """

    launch: Launch
    index: int | None
    exports: dict[str, str]


def bind(env: Mapping[str, str], num_visible: int) -> Binding:
    """The binding of a process that sees ``num_visible`` GPUs. DeviceError where two ranks would share one.

    A task either sees all GPUs of its node, and takes the one of its local rank, or sees one that is its own, which has
    the index 0 in every task: by ``--gpus-per-task``, ``--gpu-bind``, CUDA_VISIBLE_DEVICES or MIG. Whether the single
    ones of a node differ can only be told by comparing them, see ``check_distinct``.
    """
    launch = Launch.from_env(env)
    index = None
    if num_visible == 1:
        index = 0
    elif num_visible > 1:
        index = launch.local_rank
        num_tasks = max(launch.local_size or 0, launch.local_rank + 1)
        if num_tasks > num_visible:
            visible = env.get("CUDA_VISIBLE_DEVICES")
            raise DeviceError(
                f"{num_tasks} tasks on this node, each of which sees {num_visible} GPUs"
                f"{f' (CUDA_VISIBLE_DEVICES={visible})' if visible else ''}: start at most {num_visible} tasks per "
                "node, or give each task one GPU (--gpus-per-task=1, or its own CUDA_VISIBLE_DEVICES)"
            )
    # DeepSpeed calls set_device(LOCAL_RANK), so LOCAL_RANK is the index of the device from here on. It also asserts
    # that Open MPI's local rank, where there is one, equals it.
    local_rank = str(launch.local_rank if index is None else index)
    exports = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "LOCAL_RANK": local_rank}
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:
        exports["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
    return Binding(launch, index, exports)


def check_distinct(gpus: Sequence[str], hosts: Sequence[str]) -> None:
    """DeviceError where two ranks have the same GPU. ``gpus``: UUID by rank, empty for a rank without."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if not gpu:
            continue
        other = first.setdefault(gpu, rank)
        if other != rank:
            error = DeviceError(
                f"ranks {other} and {rank} on {hosts[rank]} have the same GPU {gpu}: start one task per GPU; with "
                "--gpu-bind, MIG or CUDA_VISIBLE_DEVICES give each task its own (docs/clusters.md, Device binding)"
            )
            error.same_on_all_ranks = True
            raise error


def identify(uuid: str, env: Mapping[str, str]) -> str:
    """The name of a device for ``check_distinct``, from the UUID that CUDA reports.

    For an instance of MIG CUDA may report the UUID of the whole GPU, so the instance's, by which it was selected, wins.
    A process uses only the first instance of CUDA_VISIBLE_DEVICES.
    """
    selected = env.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return selected if selected.startswith("MIG-") else f"GPU-{uuid}"


def refuse_idle_gpus(env: Mapping[str, str], torch_cuda: str | None, root: Path = Path("/")) -> None:
    """DeviceError where this node has GPUs; called when torch sees none. ``torch_cuda``: CUDA version of its build."""
    if (sign := gpu_sign(env, root)) is None:
        return
    if torch_cuda is None:
        reason = "this torch is built without CUDA: install a CUDA build"
    elif "CUDA_VISIBLE_DEVICES" in env:
        reason = (
            f"torch sees none (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']!r}): check it and the driver"
        )
    else:
        reason = "torch sees none: ask the scheduler for GPUs, or check the driver (maestro-scale doctor)"
    raise DeviceError(
        f"this node has GPUs ({sign}), but {reason}; to use the CPU, set train.device=cpu (embed: --device cpu)"
    )


def gpu_sign(env: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """What shows that this node, or its job, has GPUs, even if torch cannot use them; None: nothing does."""
    if env.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={env['SLURM_GPUS_ON_NODE']}"
    if env.get("SLURM_JOB_GPUS"):
        return f"SLURM_JOB_GPUS={env['SLURM_JOB_GPUS']}"
    devices = [*sorted(root.glob("dev/nvidia[0-9]*")), *sorted(root.glob("proc/driver/nvidia/gpus/*"))]
    if devices:
        return f"{devices[0]} exists"
    # A login node may have the program without a GPU; then it fails, or lists none.
    return "nvidia-smi lists one" if _lists_gpu() else None


def _lists_gpu() -> bool:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and "GPU " in done.stdout
