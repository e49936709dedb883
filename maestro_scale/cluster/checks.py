"""Checks of a node: GPUs, memory, disks, data. Each returns a list of problems, empty if there are none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

GIB = 2**30


def gpu_problems(num_required: int, min_free: float = 0.8) -> list[str]:
    """Check that the node has ``num_required`` working GPUs, each with at least this fraction of its memory free."""
    if not num_required:
        return []
    import torch

    num_found = torch.cuda.device_count()
    if num_found < num_required:
        return [
            f"{num_found} of {num_required} requested GPUs found: check nvidia-smi on this node, or drain the node"
        ]
    problems = []
    for device in range(num_found):
        try:
            free, total = torch.cuda.mem_get_info(device)
            # Each element of the product is exactly 256, in any precision of the multiplication.
            ones = torch.ones(256, 256, device=f"cuda:{device}")
            is_correct = float((ones @ ones)[0, 0]) == 256.0
        except RuntimeError as error:
            problems.append(f"GPU {device} does not compute: {str(error).splitlines()[0]}")
            continue
        if not is_correct:
            problems.append(f"GPU {device} computes wrong results: drain the node")
        if free < min_free * total:
            problems.append(
                f"GPU {device}: {free / GIB:.0f} of {total / GIB:.0f} GiB free: another process uses this GPU"
            )
    return problems


def memory_problems(min_gib: float = 1.0) -> list[str]:
    """Check that this much host memory is available."""
    available = psutil.virtual_memory().available / GIB
    if available < min_gib:
        return [f"{available:.1f} GiB of memory available, {min_gib:g} required: another process uses it"]
    return []


def disk_problems(folder: Path, min_gib: float, what: str) -> list[str]:
    """Check that a file can be written to ``folder`` and read back, and that this much space is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(block := os.urandom(2**20))
            file.flush()
            os.fsync(file.fileno())  # a full or read-only disk may fail only here
            file.seek(0)
            if file.read() != block:
                return [f"{what} {folder}: data read back differs from the data written: replace the disk"]
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return [f"{what} {folder}: {error.strerror}"]
    if free < min_gib:
        return [f"{what} {folder}: {free:.1f} GiB free, {min_gib:g} required: free some space"]
    return []


def data_problems(urls: Sequence[str], splits: Sequence[Sequence[str]]) -> list[str]:
    """Check that each manifest can be read, and that the first shard of its splits exists with the right size.

    A node without access to the store is detected this way; the content of shards is verified when it is used.
    """
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
