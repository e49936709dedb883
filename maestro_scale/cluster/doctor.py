"""The ``doctor`` command: checks of this machine for training, with advice for each problem."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from maestro_scale.cluster import checks
from maestro_scale.training import nvml
from maestro_scale.training.binding import gpu_sign

_PACKAGES = (
    "maestro-scale",
    "torch",
    "deepspeed",
    "webdataset",
    "s3fs",
    "mlflow",
    "safetensors",
    "rasterio",
    "h5py",
)
# File systems that are usually mounted on several nodes.
_SHARED_TYPES = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.sshfs",
    "wekafs",
    "pvfs2",
    "smb3",
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``advice``: what to do; empty if there is no problem."""

    check: str
    result: str
    advice: str = ""


def run_checks(urls: Sequence[str] = (), folders: Sequence[Path] = ()) -> Iterator[Finding]:
    """Run all checks. ``urls``: sharded datasets that must be readable; ``folders``: of runs and caches."""
    for check in (
        _python,
        _packages,
        _processors,
        _accelerators,
        _rdma,
        _kernels,
        _compiler,
        _slurm,
        _mlflow,
    ):
        yield from check()
    for url in urls:
        yield from _data(url)
    for folder in folders or (Path.cwd(),):
        yield from _disk(folder)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    is_supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        "python",
        f"{version} on {platform.platform()}",
        "" if is_supported else "use Python 3.10 to 3.13",
    )


def _packages() -> Iterator[Finding]:
    optional = ("rasterio", "h5py")
    for name in _PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            extra = "pip install 'maestro-scale[datasets]', to read raw datasets" if name in optional else ""
            yield Finding(name, "not installed", extra or "pip install maestro-scale")


def _processors() -> Iterator[Finding]:
    usable = len(
        os.sched_getaffinity(0)
    )  # SLURM and containers restrict it; cpu_count() is the whole machine
    available = psutil.virtual_memory().available / checks.GIB
    result = f"{usable} of {os.cpu_count()} cores usable, {available:.0f} GiB of memory free"
    yield Finding("processor", result, "; ".join(checks.memory_problems(4.0)))


def _accelerators() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    backends = [n for n in ("nccl", "gloo", "mpi") if getattr(dist, f"is_{n}_available")()]
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        sign = gpu_sign(os.environ)  # with which a run stops
        advice = (
            f"this node has GPUs ({sign}): install a CUDA build of torch, or check the driver and "
            "CUDA_VISIBLE_DEVICES"
        )
        yield Finding("accelerator", f"none (torch built for {built})", advice if sign else "")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        has_bf16 = p.major >= 8  # since Ampere
        result = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"
        yield Finding(f"GPU {i}", result, "" if has_bf16 else "no bf16 in hardware: set train.precision=fp32")
    if torch.cuda.is_available():
        driver = nvml.driver_version()
        advice = "" if driver else "metrics of GPUs need NVML: pip install 'maestro-scale[gpu]'"
        yield Finding("NVML", f"driver {driver}" if driver else "not available", advice)
        for problem in checks.gpu_problems(torch.cuda.device_count()):
            yield Finding("accelerator", "not usable", problem)
    yield Finding(
        "collectives",
        ", ".join(backends),
        "" if "gloo" in backends else "use a torch build with gloo: the ranks exchange control flags with it",
    )


def _rdma(cards: Path = Path("/sys/class/infiniband"), library: str = "libibverbs.so.1") -> Iterator[Finding]:
    names = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    if not names:
        yield Finding("RDMA", "no card (NCCL uses TCP between nodes)")
        return
    try:
        ctypes.CDLL(library)
    except OSError:
        advice = "NCCL would use TCP: install libibverbs1 and ibverbs-providers"
        yield Finding("RDMA", f"{', '.join(names)}, but no {library}", advice)
    else:
        yield Finding("RDMA", ", ".join(names))


def _kernels() -> Iterator[Finding]:
    import torch

    from maestro_scale.model.attention import available_backends, resolve_backend

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    backend = resolve_backend("auto", device, dtype, 64)
    advice = "" if not cuda or backend != "math" else "no fused attention kernel: update torch or the driver"
    yield Finding(
        "attention", f"{backend} (available: {', '.join(available_backends(device, dtype, 64))})", advice
    )


def _compiler() -> Iterator[Finding]:
    compilers = [c for c in ("g++", "clang++", "nvcc") if shutil.which(c)]
    advice = "" if compilers else "model.compile and ZeRO offload build kernels: install g++ (or set CXX)"
    yield Finding("compiler", ", ".join(compilers) or "none", advice)


def _slurm() -> Iterator[Finding]:
    if job := os.environ.get("SLURM_JOB_ID"):
        yield Finding("SLURM", f"in job {job}, task {os.environ.get('SLURM_PROCID', '0')}")
    elif shutil.which("sbatch"):
        yield Finding("SLURM", "sbatch found")
    else:
        yield Finding("SLURM", "not available (deepspeed and torchrun launch without it)")


def _mlflow() -> Iterator[Finding]:
    from maestro_scale.secrets_filter import scrub

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        yield Finding("MLflow", scrub(uri) or "a file next to the runs (MLFLOW_TRACKING_URI is not set)")
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as response:
            yield Finding("MLflow", f"{scrub(uri)} responds with status {response.status}")
    except (urllib.error.URLError, OSError, ValueError) as error:
        advice = "training works without it; later run, where it is reachable: maestro-scale sync RUN_DIR"
        yield Finding("MLflow", f"{scrub(uri)} is not reachable ({scrub(str(error))})", advice)


def _data(url: str) -> Iterator[Finding]:
    from maestro_scale.secrets_filter import scrub
    from maestro_scale.shards.errors import ShardsError
    from maestro_scale.shards.format.manifest import Manifest

    try:
        manifest = Manifest.load(url)
    except ShardsError as error:
        advice = (
            "check the address and, for S3, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        yield Finding("data", scrub(str(error)), advice)
        return
    total = sum(s.bytes for s in manifest.shards) / 1e9
    names = ", ".join(sorted(manifest.splits))
    problems = "; ".join(checks.data_problems([url], [sorted(manifest.splits)]))
    yield Finding("data", f"{scrub(url)}: {manifest.spec.name}, {total:.1f} GB, splits {names}", problems)


def _disk(folder: Path) -> Iterator[Finding]:
    kind = _file_system(folder)
    try:
        free = shutil.disk_usage(folder).free / 2**30
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            problem = "" if _supports_locks(Path(inside)) else "no file locks: use another disk for --run-dir"
    except OSError as error:
        yield Finding("disk", f"{folder}: {error.strerror}", "choose a writable folder")
        return
    sharing = (
        "shared"
        if kind in _SHARED_TYPES
        else "local, judging by its type: runs on several nodes need a shared --run-dir"
    )
    if not problem and free < 10:
        problem = "less than 10 GiB free: checkpoints and cached shards need more"
    yield Finding("disk", f"{folder}: {kind}, {sharing}, {free:.0f} GiB free", problem)


def _supports_locks(folder: Path) -> bool:
    """Some NFS and Lustre mounts do not; a run directory needs a lock against a second trainer."""
    from filelock import FileLock

    try:
        with FileLock(folder / "lock", timeout=5):
            return True
    except OSError:
        return False


def _file_system(folder: Path) -> str:
    """Type of the file system, from the longest mount point that contains ``folder``."""
    path = folder.resolve()
    # All of them: psutil counts the file systems of a network as devices that are none.
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    # Of several at one point the last one hides the others.
    return max(reversed(mounts), key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def print_findings(findings: Iterator[Finding], write: Callable[[str], None] = print) -> int:
    """Print each finding as soon as its check ends; returns the number of problems."""
    num_problems = 0
    write(f"host {socket.gethostname()}")
    for f in findings:
        write(f"{'!' if f.advice else ' '} {f.check}: {f.result}")
        if f.advice:
            write(f"    -> {f.advice}")
            num_problems += 1
    return num_problems
