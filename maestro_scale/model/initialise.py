"""Initial weights, a pure function of (seed, parameter name)."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter from a generator keyed by (seed, parameter name).

    So weights do not depend on rank, world size, ZeRO stage, or the other parameters of the model: adding a head or a
    sensor does not change the rest. Drawn on the CPU, because CUDA's generator gives other numbers.
    """
    for name, p in module.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if "norm" in name:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            p.zero_()
        elif p.dim() == 2 and name.endswith("weight"):
            bound = math.sqrt(6.0 / (p.shape[0] + p.shape[1]))  # Xavier, as MAE does for linear layers
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        else:
            p.copy_(torch.empty(p.shape).normal_(0.0, 0.02, generator=generator))
