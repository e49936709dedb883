"""One training schedule for a grid of learning rates: a batch is read once and used by the learner of every rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

EPOCHS = 10
MIN_STEPS = 300  # on a small split, epochs are too few updates
WARMUP = 0.2  # of the steps

_ORDER_STREAM = (
    0  # of the random numbers under a seed; stream 1 samples cells for kNN, 2 fractions of the labels
)


def lr_grid_search(
    learners: Sequence[Iterable[Tensor]],
    rates: Sequence[float],
    rows: np.ndarray,
    batch_size: int,
    seed: int,
    backward: Callable[[np.ndarray], None],
) -> None:
    """Train each learner's parameters at its own rate of ``rates`` (AdamW, one-cycle cosine), all on the same batches.

    ``backward``: adds the gradients of every learner's loss on a batch of ``rows``, given in ascending order. The order
    of the batches is drawn from ``seed``.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, _ORDER_STREAM]))
    batches_per_epoch = -(-len(rows) // batch_size)
    num_steps = max(EPOCHS * batches_per_epoch, MIN_STEPS)
    groups = [{"params": list(p), "lr": rate} for p, rate in zip(learners, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(rates), total_steps=num_steps, pct_start=WARMUP, cycle_momentum=False
    )
    step = 0
    while step < num_steps:
        for batch in np.array_split(order.permutation(rows), batches_per_epoch)[: num_steps - step]:
            optimizer.zero_grad()
            with torch.enable_grad():
                backward(
                    np.sort(batch)
                )  # sorted: a memory map is read faster, and the loss is a mean over the batch
            optimizer.step()
            schedule.step()
            step += 1
