"""Computes on the batches of a split on a device; copies to and from it overlap with computing, results stay exact.

On a CPU the same code copies nothing and computes in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from maestro_scale.recipe.sections import Precision
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.device_copy import DeviceCopier, HostCopier

RecipePrecision = Precision | Literal["auto"]
"""``train.precision`` of a recipe."""


def eval_precision(device: torch.device, precision: RecipePrecision) -> Literal["bf16", "fp32"]:
    """Precision of the matrix products of an encoder that is evaluated: fp32 on a CPU; on another device bf16, by
    autocast over fp32 weights, unless ``precision`` is fp32."""
    return "fp32" if device.type == "cpu" or precision == "fp32" else "bf16"


@torch.no_grad()
def map_on_device(
    batches: Iterable[Batch],
    compute: Callable[[Batch], Mapping[str, Tensor]],
    device: torch.device,
    precision: RecipePrecision,
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """(batch on the host, arrays that ``compute`` returns for it) of every batch in order.

    A result is handed out when the batch after it is queued: the host handles the one while the device computes the
    other, and waits for the device once per batch. The arrays may be in pinned memory: copy what is kept for long.
    """
    copier, results = DeviceCopier(device), HostCopier(device)
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=eval_precision(device, precision) == "bf16"
    )
    previous = None
    for batch in batches:
        (on_device,) = copier.finish(copier.start([batch]))
        with autocast:
            pending = results.start(compute(on_device))
        del on_device  # at most two batches are on the device
        if previous is not None:
            yield previous[0], previous[1].wait()
        previous = batch, pending
    if previous is not None:
        yield previous[0], previous[1].wait()


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host does not wait for the copy. Shares memory on a CPU."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
