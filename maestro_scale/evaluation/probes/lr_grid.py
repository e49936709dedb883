"""One course of training for a whole grid of learning rates: what is read for one is read for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

EPOCHS = 10
MIN_STEPS = 300  # on a small split, epochs are too few updates
WARMUP = 0.2


def lr_grid_search(
    learners: Sequence[Iterable[Tensor]],
    rates: Sequence[float],
    rows: np.ndarray,
    batch: int,
    seed: int,
    backward: Callable[[np.ndarray], None],
) -> None:
    """Train each learner's parameters at its own rate of ``rates`` (AdamW, one-cycle cosine), all on the same batches.

    ``backward``: adds the gradients of every learner's loss on some of ``rows``, which come in ascending order. Their
    order over the course is drawn from ``seed``.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 0]))
    per_epoch = -(-len(rows) // batch)
    steps = max(EPOCHS * per_epoch, MIN_STEPS)
    groups = [{"params": list(p), "lr": rate} for p, rate in zip(learners, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(rates), total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    step = 0
    while step < steps:
        for piece in np.array_split(order.permutation(rows), per_epoch)[: steps - step]:
            optimizer.zero_grad()
            with torch.enable_grad():
                backward(np.sort(piece))
            optimizer.step()
            schedule.step()
            step += 1
