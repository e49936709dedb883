"""AdamW with its groups of parameters, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW

Schedule = Callable[[int], float]


def one_cycle(num_steps: int, warmup: float, start: float, final: float) -> Schedule:
    """Cosine from ``start`` up to 1 over ``warmup`` (a share of the steps), then cosine down to ``final``.

    ``step`` counts finished steps: ``factor(s)`` is that of the step after s finished ones.
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
    layer_decay: float = 1.0,
    decay: Literal["matrices", "all"] = "matrices",
) -> AdamW:
    """AdamW. ``decay``: which parameters decay: ``matrices`` of linear maps (not biases, norms, queries and mask
    tokens), or ``all``, as in the reference.

    ``layer_decay``: below 1, the learning rate of each encoder block is this factor times that of the block above it
    (BEiT, arXiv 2106.08254, for finetuning); ``lr`` is that of the topmost layers.
    """
    depths = depths_below_top(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        below = depths.get(name, 0) if layer_decay != 1.0 else 0
        decays = decay == "all" or (p.dim() >= 2 and name.endswith("weight"))
        group = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "peak_lr": lr * layer_decay**below,
        }
        groups.setdefault((below, not decays), group)["params"].append(p)
    ordered = [groups[key] for key in sorted(groups)]
    return AdamW(ordered, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to ``factor`` of its peak; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def depths_below_top(model: nn.Module) -> dict[str, int]:
    """{parameter: number of encoder layers above it}; 0 for decoder and heads, which are above all of them.

    From the top: blocks of ``inter``, blocks of ``encoders`` (or of the ``backbone`` or ``encoder`` of a
    baseline), then the patch embedding. Other parameters of an encoder (norms) count as its topmost block.
    """
    names = [name for name, _ in model.named_parameters()]
    stacks = {part: _num_blocks(names, part) for part in _STACKS}
    depths = dict.fromkeys(names, 0)
    for name in names:
        part = next((p for p in _STACKS if re.match(p, name)), None)
        if part is not None:
            above = sum(n for p, n in stacks.items() if _STACKS.index(p) < _STACKS.index(part))
            block = _BLOCK.match(name)
            depths[name] = above + (stacks[part] - int(block[1]) if block else 1)
        if _EMBEDDING.match(name):
            depths[name] = sum(stacks.values()) + 1
    return depths


# From the top.
_STACKS = (r"inter\.", r"encoders\.", r"encoder\.backbone\.", r"encoder\.encoder\.")
_BLOCK = re.compile(r".*?\.(?:blocks|layers?)\.(\d+)\.")
# Of an external encoder: whatever is called an embedding and is not within a block.
_EMBEDDING = re.compile(
    r"patch_embed\.|encoder\.backbone\.embeddings\.|encoder\.encoder\.(?!.*(?:blocks|layers?)\.\d).*embed"
)


def _num_blocks(names: Iterable[str], part: str) -> int:
    blocks = (_BLOCK.match(n) for n in names if re.match(part, n))
    return max((int(b[1]) + 1 for b in blocks if b), default=0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
