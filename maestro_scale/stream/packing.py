"""Layout of a batch in one block of memory: samples are written straight into it, tensors are views of it.

One block means one copy to the device (``Batch.to``) instead of one per tensor.

Dtypes stay native. torch has no arithmetic for unsigned integers beyond uint8, but it stores, copies, pins and casts
them, which is all that a batch needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maestro_scale.stream.batch import Batch

_ALIGN = 64  # bytes: a cache line, and more than any dtype needs


@dataclass(frozen=True, eq=False)
class Field:
    """One tensor of a batch, without the batch axis: ``part`` of a Batch and, if that is a dict, ``name``.

    Compared by identity: it is looked up several times per sample.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: str


Arrays = dict[Field, np.ndarray]


@dataclass(frozen=True)
class BatchMetadata:
    """The fields of a :class:`~maestro_scale.stream.batch.Batch` that are not tensors."""

    dataset: str
    keys: tuple[str, ...]
    tiles: tuple[str, ...]
    num_repeated_dates: int
    num_replaced_samples: int
    places: tuple[str | None, ...] = ()


def num_bytes(fields: tuple[Field, ...], size: int) -> int:
    """Bytes of a batch of ``size`` samples."""
    *_, (_, _, stop, _) = _offsets(fields, size)
    return stop


def arrays_in(block: Tensor, fields: tuple[Field, ...], size: int) -> Arrays:
    """{field: (size, *shape) array}, views of a block (bytes,) uint8."""
    memory = block.numpy()
    return {
        f: memory[start:stop].view(f.dtype).reshape(shape) for f, start, stop, shape in _offsets(fields, size)
    }


def unpack(block: Tensor, fields: tuple[Field, ...], metadata: BatchMetadata) -> Batch:
    """The batch whose tensors are views of a block (bytes,) uint8."""
    pixels: dict[str, Tensor] = {}
    dates: dict[str, Tensor] = {}
    noise: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    nodata: dict[str, Tensor] = {}
    parts = {"pixels": pixels, "dates": dates, "noise": noise, "targets": targets, "nodata": nodata}
    ref_date: Tensor | None = None
    for field, start, stop, shape in _offsets(fields, len(metadata.keys)):
        tensor = block[start:stop].view(_torch_dtype(field.dtype)).view(shape)
        if field.part == "ref_date":
            ref_date = tensor
        else:
            parts[field.part][field.name] = tensor
    if ref_date is None:
        raise ValueError("the fields of a batch lack ref_date")
    return Batch(
        dataset=metadata.dataset,
        pixels=pixels,
        dates=dates,
        ref_date=ref_date,
        noise=noise,
        targets=targets,
        keys=metadata.keys,
        tiles=metadata.tiles,
        num_repeated_dates=metadata.num_repeated_dates,
        num_replaced_samples=metadata.num_replaced_samples,
        places=metadata.places,
        nodata=nodata,
        block=block,
    )


def check_dtype(dtype: str, what: str) -> None:
    """ValueError if torch has no such dtype."""
    try:
        _torch_dtype(dtype)
    except TypeError:
        raise ValueError(f"{what} has dtype {dtype}, which torch does not support; store another") from None


def _offsets(fields: Iterable[Field], size: int) -> Iterable[tuple[Field, int, int, tuple[int, ...]]]:
    """(field, first byte, end, shape with batch axis) of every tensor in the block."""
    start = 0
    for field in fields:
        shape = (size, *field.shape)
        stop = start + math.prod(shape) * np.dtype(field.dtype).itemsize
        yield field, start, stop, shape
        start = -(-stop // _ALIGN) * _ALIGN


def _torch_dtype(name: str) -> torch.dtype:
    return torch.from_numpy(np.empty(0, name)).dtype
