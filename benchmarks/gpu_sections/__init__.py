"""The sections of ``python -m benchmarks.gpu``, in the order that they run in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """``entry``: ``module:function``. ``limit_s``: its time limit. ``required``: the command fails if it fails.

    ``background``: starts early and ends before the first ``timed`` section, which needs the machine for itself.
    """

    name: str
    title: str
    entry: str
    limit_s: float
    required: bool = True
    background: bool = False
    timed: bool = False


# First what must hold; the sections that measure time come last, when nothing else runs.
SECTIONS = (
    Section("machine", "Machine and versions", "machine:run", 40),
    Section(
        "precompile", "Compile, in the background", "speed:precompile", 300, required=False, background=True
    ),
    Section("parity", "fp32: CPU = device", "parity:run", 60),
    Section("waits", "Host synchronisations of a step", "waits:run", 60),
    Section("curves", "Loss curves by precision", "precision:run_curves", 75),
    Section("zero", "ZeRO 0 to 3 agree", "precision:run_zero", 60),
    Section("resume", "Resume", "resume:run", 60),
    Section("evaluation", "Evaluation: CPU = device", "evaluation:run", 60),
    Section("memory", "Peak memory = plan", "memory:run", 60, timed=True),
    Section("kernels", "Kernels of a step", "kernels:run", 45, required=False, timed=True),
    Section("speed", "Samples/s and MFU", "speed:run", 180, required=False, timed=True),
    Section("loader", "With the loader", "speed:run_loader", 45, required=False, timed=True),
    Section("reference", "The authors' formulation, fp16", "reference:run", 45, required=False, timed=True),
    Section("multi_gpu", "ZeRO 2 over all GPUs", "multi_gpu:run", 90, timed=True),
)
