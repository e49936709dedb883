"""The branches for a GPU of the sections that use torch.cuda, with a torch.cuda that answers, on CPU tensors.

Run as a script: prints the record of each section as JSON. Sizes are those of a rehearsal.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.gpu_sections import kernels, machine, memory, speed, waits
from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.device import Device
from benchmarks.gpu_sections.record import Record, load_record
from maestro_scale.model.maestro import Maestro
from maestro_scale.training.distributed import init_distributed
from maestro_scale.training.engine import Engine

PEAK_BYTES = 3 * 2**30
NAME = "NVIDIA H100 80GB HBM3"


class FakeGpu(Device):
    is_gpu = True


def install() -> list[str]:
    """Answer as an H100 would; returns the modes that the sync debug mode is set to."""
    modes: list[str] = []
    torch.cuda.get_device_name = lambda device: NAME
    torch.cuda.device_count = lambda: 1
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda device: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.max_memory_allocated = lambda device: PEAK_BYTES
    torch.cuda.max_memory_reserved = lambda device: 2 * PEAK_BYTES
    torch.cuda.set_sync_debug_mode = modes.append
    torch.cuda.nccl.version = lambda: (2, 29, 3)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(
        name=NAME, total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0
    )
    zeros = torch.zeros
    torch.zeros = wraps(zeros)(lambda *args, pin_memory=False, **options: zeros(*args, **options))
    return modes


def main() -> None:
    modes = install()
    speed.MODES = ("none",)
    work = Path(tempfile.mkdtemp())
    found = {}
    world = init_distributed(device="cpu")  # once per process
    for section in (waits, memory, kernels, speed, machine):
        name = section.__name__.rpartition(".")[2]
        record = Record(work / f"{name}.json", time.time() + 600)
        bench = Bench(True, work, record, FakeGpu(torch.device("cpu")))
        bench.__dict__["world"] = world
        if section is machine:  # last: with it, torch itself would look for a GPU
            torch.cuda.is_available = lambda: True
        section.run(bench)
        found[name] = load_record(record.path)
    gc.collect()
    # Memory of one case must not count in the next one, and several do not fit. Names of what is alive:
    alive = [type(o).__name__ for o in gc.get_objects() if isinstance(o, (Maestro, Engine))]
    json.dump({"sections": found, "modes": modes, "alive": alive}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
