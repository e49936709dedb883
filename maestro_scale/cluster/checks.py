"""What must hold on a node before training: devices, memory, disk, data. Each check returns what is wrong, in words."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

GIB = 2**30


def gpu_problems(asked: int, least_free: float = 0.8) -> list[str]:
    """``asked`` GPUs are there, compute, and at least this share of their memory is free."""
    if not asked:
        return []
    import torch

    found = torch.cuda.device_count()
    if found < asked:
        return [f"{found} GPUs of the {asked} asked for: look at nvidia-smi there, or drain the node"]
    problems = []
    for device in range(found):
        try:
            free, total = torch.cuda.mem_get_info(device)
            ones = torch.ones(256, 256, device=f"cuda:{device}")
            right = float((ones @ ones)[0, 0]) == 256.0
        except RuntimeError as error:
            problems.append(f"GPU {device} does not compute: {str(error).splitlines()[0]}")
            continue
        if not right:
            problems.append(f"GPU {device} computes wrong numbers")
        if free < least_free * total:
            problems.append(
                f"GPU {device}: {free / GIB:.0f} of {total / GIB:.0f} GiB are free: another process holds it"
            )
    return problems


def memory_problems(least_gib: float = 1.0, meminfo: Path = Path("/proc/meminfo")) -> list[str]:
    """At least this much host memory is available."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    if available < least_gib:
        return [f"{available:.1f} GiB of memory available, {least_gib:g} needed: something else runs there"]
    return []


def disk_problems(folder: Path, least_gib: float, what: str) -> list[str]:
    """A file can be written to ``folder`` and read back, and there is room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(block := os.urandom(2**20))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != block:
                return [f"{what} {folder}: what was written is not what is read"]
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return [f"{what} {folder}: {error.strerror}"]
    if free < least_gib:
        return [f"{what} {folder}: {free:.1f} GiB free, {least_gib:g} needed: make room there"]
    return []


def data_problems(urls: Sequence[str], splits: Sequence[Sequence[str]]) -> list[str]:
    """Each manifest can be read from here, and the first shard of its splits is there in full length."""
    from maestro_scale.shards.errors import ShardsError
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.storage import open_storage

    problems = []
    for url, names in zip(urls, splits, strict=True):
        try:
            shard = next(iter(Manifest.load(url).shards_of(names)), None)
            size = open_storage(url).size(shard.path) if shard else None
        except ShardsError as error:
            problems.append(f"data: {error}")
            continue
        if shard and size != shard.bytes:
            problems.append(f"data: {url}/{shard.path} has {size} bytes instead of {shard.bytes}")
    return problems
