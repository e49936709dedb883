"""A batch as one block of memory, which samples are written straight into.

Dtypes stay native. torch has no arithmetic for unsigned integers beyond uint8, but stores, copies, pins and
casts them, which is all that a batch needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maestro_scale.stream.batch import Batch

_ALIGN = 64  # bytes


@dataclass(frozen=True)
class Field:
    """One tensor of a batch, without the batch axis: ``part`` of a Batch and, if that is a dict, ``name``."""

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class BatchMetadata:
    """What a batch holds besides tensors; see :class:`~maestro_scale.stream.batch.Batch`."""

    dataset: str
    keys: tuple[str, ...]
    tiles: tuple[str, ...]
    num_repeated_dates: int
    num_replaced_samples: int


def num_bytes(fields: tuple[Field, ...], size: int) -> int:
    """Bytes that ``size`` samples take."""
    *_, (_, _, stop, _) = _offsets(fields, size)
    return stop


def arrays_in(block: Tensor, fields: tuple[Field, ...], size: int) -> dict[Field, np.ndarray]:
    """{field: (size, *shape) array} that read and write a block (bytes,) uint8."""
    memory = block.numpy()
    return {
        f: memory[start:stop].view(f.dtype).reshape(shape) for f, start, stop, shape in _offsets(fields, size)
    }


def unpack(block: Tensor, fields: tuple[Field, ...], metadata: BatchMetadata) -> Batch:
    """The batch whose tensors are views of a block (bytes,) uint8."""
    parts: dict[str, dict[str, Tensor]] = {p: {} for p in ("pixels", "dates", "noise", "targets")}
    single: dict[str, Tensor] = {}
    for field, start, stop, shape in _offsets(fields, len(metadata.keys)):
        tensor = block[start:stop].view(_torch_dtype(field.dtype)).view(shape)
        if field.part in parts:
            parts[field.part][field.name] = tensor
        else:
            single[field.part] = tensor
    return Batch(**parts, **single, **vars(metadata))


def check_dtype(dtype: str, what: str) -> None:
    """ValueError if torch has no such dtype."""
    try:
        _torch_dtype(dtype)
    except TypeError:
        raise ValueError(f"{what} has dtype {dtype}, which torch does not know; store another") from None


def _offsets(fields: Iterable[Field], size: int) -> Iterable[tuple[Field, int, int, tuple[int, ...]]]:
    start = 0
    for field in fields:
        shape = (size, *field.shape)
        stop = start + math.prod(shape) * np.dtype(field.dtype).itemsize
        yield field, start, stop, shape
        start = -(-stop // _ALIGN) * _ALIGN


def _torch_dtype(name: str) -> torch.dtype:
    return torch.from_numpy(np.empty(0, name)).dtype
