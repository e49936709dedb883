"""Deterministic algorithms of torch for a run (``train.deterministic``)."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic

# Workspaces of fixed size (CUDA's documentation, "cuBLAS: Results reproducibility"). cuBLAS reads it when it is first
# used; torch refuses matrix products without it.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def configure_determinism(enabled: bool) -> None:
    """Use deterministic algorithms only, or torch's defaults. Call it before a kernel is chosen or compiled.

    An operation without a deterministic algorithm raises RuntimeError with its name. On CPUs nothing changes: their
    algorithms are deterministic anyway.
    """
    if enabled:
        os.environ.setdefault(*_CUBLAS)
        import torch._inductor.config as inductor

        # Else compiled kernels are chosen by timing them, so that two starts may round differently.
        if hasattr(inductor, "deterministic"):  # earlier versions of torch have no such setting
            inductor.deterministic = True
    # Also makes scaled_dot_product_attention use the deterministic backward passes of flash and memory-efficient
    # attention, and never cuDNN's.
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    # By default every new tensor would be filled with NaN, a launch each. No result depends on what it contains.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
