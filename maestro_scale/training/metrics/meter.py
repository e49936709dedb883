"""Throughput, MFU and memory between two log lines, the same on every rank."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from maestro_scale.model.cost import Cost
from maestro_scale.training.device import peak_memory_bytes, reset_peak_memory, synchronize
from maestro_scale.training.distributed import World
from maestro_scale.training.metrics.gpus import find_gpu


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a known accelerator, else None."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.tflops if gpu else None


@dataclass
class Meter:
    """Accumulates the steps of a window between two log lines."""

    world: World
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    wait_s: float = 0.0
    started: float = 0.0

    def restart(self) -> None:
        """Begin a new window now."""
        self.steps, self.samples, self.tokens, self.flops, self.wait_s = 0, 0, 0, 0, 0.0
        self.started = time.perf_counter()
        reset_peak_memory(self.world.device)

    def add(self, global_samples: int, sample: Cost | None, wait_s: float) -> None:
        """Count a step of ``global_samples`` samples; ``sample``: cost of one, None if not known."""
        self.steps += 1
        self.samples += global_samples
        if sample is not None:
            self.tokens += global_samples * sample.visible_tokens
            self.flops += global_samples * sample.model_flops
        self.wait_s += wait_s

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training, such as an evaluation between two steps."""
        self.started += seconds

    def read(self) -> dict[str, float | None]:
        """The window's numbers (all ranks must call it), then a new window. Samples and visible tokens are of all ranks
        together, TFLOP/s (forward and backward, nothing that is recomputed) of one; waits and memory are maxima."""
        synchronize(self.world.device)  # the window ends when the kernels do; once per log line
        elapsed, wait_s, memory = self.world.maxima(
            [
                time.perf_counter() - self.started,
                self.wait_s / self.steps,
                _memory_gib(self.world.device) or 0.0,
            ]
        )
        # None, never 0 or a guess, where the cost of a sample is not known.
        tflops = self.flops / elapsed / self.world.size / 1e12 if self.flops else None
        peak = peak_tflops(self.world.device)
        numbers = {
            "samples_per_s": self.samples / elapsed,
            "tokens_per_s": self.tokens / elapsed if self.tokens else None,
            "data_wait_s": wait_s,
            "step_s": elapsed / self.steps,
            "tflops": tflops,
            "mfu": tflops / peak if peak and tflops else None,
            "peak_memory_gib": memory or None,
        }
        self.restart()
        return numbers


def _memory_gib(device: torch.device) -> float | None:
    if device.type != "cpu":
        peak = peak_memory_bytes(device)
        return None if peak is None else peak / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
