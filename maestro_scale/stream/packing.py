"""A batch as one block of memory: workers write samples straight into it, and it crosses to the training
process as one shared file instead of one per tensor.

Dtypes stay native. torch has no arithmetic for unsigned integers beyond uint8, but stores, copies, pins and
casts them, which is all that a batch needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maestro_scale.stream.batch import Batch

_ALIGN = 64  # bytes


@dataclass(frozen=True)
class Field:
    """One tensor of a batch, without the batch axis. ``part`` is an attribute of Batch; ``name`` its key, if
    a dict.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Label:
    """What a batch holds besides tensors; see :class:`~maestro_scale.stream.batch.Batch`."""

    dataset: str
    keys: tuple[str, ...]
    tiles: tuple[str, ...]
    filled: int
    replaced: int


@dataclass(frozen=True)
class Packed:
    """A batch on its way between processes."""

    block: Tensor  # (bytes,) uint8
    fields: tuple[Field, ...]
    label: Label

    def pin_memory(self) -> Packed:
        """The same in page-locked memory; called by torch's DataLoader."""
        return replace(self, block=self.block.pin_memory())

    def unpack(self) -> Batch:
        """The batch, its tensors being views of the block."""
        parts: dict[str, dict[str, Tensor]] = {p: {} for p in ("pixels", "dates", "noise", "targets")}
        single: dict[str, Tensor] = {}
        for field, start, stop, shape in _places(self.fields, len(self.label.keys)):
            tensor = self.block[start:stop].view(_torch_dtype(field.dtype)).view(shape)
            if field.part in parts:
                parts[field.part][field.name] = tensor
            else:
                single[field.part] = tensor
        return Batch(**parts, **single, **vars(self.label))


def allocate(fields: tuple[Field, ...], size: int, shared: bool) -> tuple[Tensor, dict[Field, np.ndarray]]:
    """A zeroed block for ``size`` samples, and {field: (size, *shape) array that writes into it}.

    ``shared``: in shared memory, as a worker needs it to hand it on without a copy.
    """
    places = list(_places(fields, size))
    num_bytes = places[-1][2] if places else 0
    if shared:
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))
    else:
        block = torch.zeros(num_bytes, dtype=torch.uint8)
    memory = block.numpy()
    arrays = {f: memory[start:stop].view(f.dtype).reshape(shape) for f, start, stop, shape in places}
    return block, arrays


def check_dtype(dtype: str, what: str) -> None:
    """ValueError if torch has no such dtype."""
    try:
        _torch_dtype(dtype)
    except TypeError:
        raise ValueError(f"{what} has dtype {dtype}, which torch does not know; store another") from None


def _places(fields: Iterable[Field], size: int) -> Iterable[tuple[Field, int, int, tuple[int, ...]]]:
    start = 0
    for field in fields:
        shape = (size, *field.shape)
        stop = start + math.prod(shape) * np.dtype(field.dtype).itemsize
        yield field, start, stop, shape
        start = -(-stop // _ALIGN) * _ALIGN


def _torch_dtype(name: str) -> torch.dtype:
    return torch.from_numpy(np.empty(0, name)).dtype
