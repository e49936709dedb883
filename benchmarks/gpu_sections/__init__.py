"""The sections of ``python -m benchmarks.gpu``, in the order that they run in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """``entry``: ``module:function``, called with a Bench (bench.py). ``limit_s``: its time limit. ``required``: the
    command fails if it fails. ``background``: starts early and ends before the first ``timed`` section, which needs
    the machine for itself.
    """

    name: str
    title: str
    entry: str
    limit_s: float
    required: bool = True
    background: bool = False
    timed: bool = False


# First what must hold; those that need the machine for themselves come last. `speed` takes what time is left.
SECTIONS = (
    Section("machine", "Machine and versions", f"{__name__}.machine:run", 40),
    Section(
        "precompile",
        "Compile, in the background",
        f"{__name__}.speed:precompile",
        300,
        required=False,
        background=True,
    ),
    Section("parity", "fp32: CPU = device", f"{__name__}.parity:run", 60),
    Section("waits", "Host synchronisations of a step", f"{__name__}.waits:run", 60),
    Section("curves", "Loss curves by precision", f"{__name__}.precision:run_curves", 90),
    Section("zero", "ZeRO 0 to 3 agree", f"{__name__}.precision:run_zero", 60),
    Section("resume", "Resume", f"{__name__}.resume:run", 60),
    Section("evaluation", "Evaluation: CPU = device", f"{__name__}.evaluation:run", 60),
    Section("memory", "Peak memory = plan", f"{__name__}.memory:run", 60, timed=True),
    Section("multi_gpu", "ZeRO 2 over all GPUs", f"{__name__}.multi_gpu:run", 90, timed=True),
    Section("kernels", "Kernels of a step", f"{__name__}.kernels:run", 45, required=False, timed=True),
    Section("speed", "Samples/s and MFU", f"{__name__}.speed:run", 180, required=False, timed=True),
    Section("loader", "With the loader", f"{__name__}.speed:run_loader", 45, required=False, timed=True),
    Section(
        "reference",
        "The authors' formulation, fp16",
        f"{__name__}.reference:run",
        45,
        required=False,
        timed=True,
    ),
)
