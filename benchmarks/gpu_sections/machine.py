"""Section: the machine, versions, and the speeds that bound everything else."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.record import NOT_HERE
from maestro_scale.training import nvml
from maestro_scale.training.metrics.gpus import find_gpu
from maestro_scale.training.run_dir import environment


def run(bench: Bench) -> None:
    """Describe the machine; measure matrix product, copy and launch."""
    if bench.device.is_gpu and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: check nvidia-smi and the torch build, or use --rehearse")
    found = environment()
    bench.record.put(
        versions={**found["versions"], "python": found["python"], "cuda": torch.version.cuda},
        revision=found["git_revision"],
        host={"platform": platform.platform(), "cores": os.cpu_count(), "memory_gib": _host_gib()},
        device=bench.device.name,
        num_gpus=bench.device.num_gpus(),
        threads=torch.get_num_threads(),
    )
    bench.record.put(gpu=_gpu(bench) if bench.device.is_gpu else NOT_HERE, speed=_speed(bench))
    if bench.device.is_gpu:
        known = find_gpu(bench.device.name) is not None
        bench.record.expect("peak FLOP/s of this GPU is known", known, bench.device.name)
    else:
        bench.record.unavailable("peak FLOP/s of this GPU is known")


def _gpu(bench: Bench) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(bench.device.torch)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": nvml.driver_version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }


def _speed(bench: Bench) -> dict[str, float]:
    """bf16 matrix product (TFLOP/s), copy within the memory (TB/s, read and written), small operation (µs)."""
    device, side = bench.device, bench.pick(8192, 128)
    a = torch.randn(side, side, device=device.torch, dtype=torch.bfloat16)
    product_s = device.seconds(lambda: a @ a, 5)
    num_bytes = bench.pick(2**30, 2**20)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    copy_s = device.seconds(lambda: target.copy_(source), 5)
    small, times = torch.zeros(8, device=device.torch), bench.pick(5000, 100)
    device.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        small.add_(1)
    launch_s = (time.perf_counter() - started) / times
    return {
        "matmul_tflops": 2 * side**3 / product_s / 1e12,
        "copy_tb_per_s": 2 * num_bytes / copy_s / 1e12,
        "launch_us": launch_s * 1e6,
    }


def _host_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
