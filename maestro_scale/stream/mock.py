"""A random batch with the shapes and dtypes of a dataset, without reading a sample."""

from __future__ import annotations

import numpy as np
import torch

from maestro_scale.stream.batch import Batch
from maestro_scale.stream.packing import BatchMetadata, arrays_in, num_bytes, unpack
from maestro_scale.stream.source import Source
from maestro_scale.stream.transform import Transform


def mock_batch(source: Source, name: str, size: int, pin: bool = False) -> Batch:
    """``size`` samples with the layout of ``source``, called ``name`` in the run; from a generator of its own.

    ``pin``: in page-locked memory, from which copies to a GPU are asynchronous.
    """
    fields = Transform(source.spec, absent=source.absent).fields
    block = torch.zeros(num_bytes(fields, size), dtype=torch.uint8, pin_memory=pin)
    rng = np.random.default_rng(0)
    for field, array in arrays_in(block, fields, size).items():
        if field.part == "noise":
            array[:] = rng.random(array.shape, dtype=np.float32)
        elif field.part == "pixels":
            array[:] = rng.integers(0, 100, array.shape)  # within the range of every stored dtype
        elif field.part == "dates":
            array[:] = (2020, 180, 12)
    keys = tuple(f"mock/{name}/{i}" for i in range(size))
    return unpack(block, fields, BatchMetadata(name, keys, keys, 0, 0))
