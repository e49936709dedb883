"""AdamW with decay only where it belongs, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[int], float]


def one_cycle(num_steps: int, warmup: float, start: float, final: float) -> Schedule:
    """Cosine from ``start`` up to 1 over ``warmup`` (a share of the steps), then cosine down to ``final``.

    ``step`` counts finished steps: the factor that step s (the first is 0) is taken with.
    """
    peak = max(warmup * num_steps - 1, 0.0)
    last = max(num_steps - 1, peak + 1)

    def factor(step: int) -> float:
        if step < peak:
            return _cosine(start, 1.0, step / peak)
        return _cosine(1.0, final, min((step - peak) / (last - peak), 1.0))

    return factor


def cosine(num_steps: int, warmup: float, start: float, final: float) -> Schedule:
    """Linear from ``start`` up to 1 over ``warmup`` (a share of the steps), then cosine down to ``final``."""
    top = max(warmup * num_steps, 1e-9)

    def factor(step: int) -> float:
        if step < top:
            return start + (1 - start) * step / top
        return _cosine(1.0, final, min((step - top) / max(num_steps - 1 - top, 1.0), 1.0))

    return factor


SCHEDULES: dict[str, Callable[[int, float, float, float], Schedule]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
}


def build_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    schedule: Schedule,
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its scheduler. Biases, norms, queries and mask tokens (anything but matrices of linear maps) do not
    decay."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        (decayed if p.dim() >= 2 and name.endswith("weight") else plain).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=lr, betas=betas, eps=eps, fused=torch.cuda.is_available() or None)
    return optimizer, LambdaLR(optimizer, schedule)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
