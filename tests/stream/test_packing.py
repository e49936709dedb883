"""The layout of a batch in one block of memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_scale.stream.batch import Batch, digest
from maestro_scale.stream.packing import BatchMetadata, Field, arrays_in, check_dtype, num_bytes, unpack

DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64", "bool"]


def test_values_keep_their_dtype():
    fields = (
        *(Field("pixels", d, (3, 5), d) for d in DTYPES),
        Field("ref_date", "", (3,), "int16"),
    )
    block = torch.zeros(num_bytes(fields, 2) + 100, dtype=torch.uint8)
    arrays = arrays_in(block, fields, 2)
    for i, (field, array) in enumerate(arrays.items()):
        assert array.shape == (2, *field.shape)
        array[...] = i % 2
    batch = unpack(block, fields, BatchMetadata("d", ("0/d/1", "0/d/2"), ("a", "b"), 3, 1))
    for i, name in enumerate(DTYPES):
        tensor = batch.pixels[name]
        assert tensor.dtype == torch.from_numpy(np.zeros(1, name)).dtype
        assert tensor.float().tolist() == [[[i % 2] * 5] * 3] * 2
    assert (batch.num_repeated_dates, batch.num_replaced_samples, batch.tiles) == (3, 1, ("a", "b"))
    before = digest(batch)
    arrays[fields[0]][1, 2, 4] += 1
    assert digest(batch) != before


def test_a_dtype_without_a_tensor_is_refused():
    with pytest.raises(ValueError, match="modality x has dtype longdouble"):
        check_dtype("longdouble", "modality x")


def test_every_field_begins_at_a_multiple_of_64_bytes():
    # Two samples: 6 bytes from 0, 16 bytes from 64, 128 bytes from 128, 4 bytes from 256.
    fields = tuple(
        Field("pixels", d, shape, d)
        for d, shape in (("uint8", (3,)), ("float32", (2,)), ("float64", (8,)), ("int16", ()))
    )
    assert num_bytes(fields, 2) == 256 + 4
    block = torch.zeros(260, dtype=torch.uint8)
    starts = [array.ctypes.data - block.data_ptr() for array in arrays_in(block, fields, 2).values()]
    assert starts == [0, 64, 128, 256]


def packed_batch() -> Batch:
    fields = (
        Field("pixels", "s2", (2, 3), "uint16"),
        Field("targets", "kind", (5,), "float32"),
        Field("ref_date", "", (3,), "int16"),
    )
    block = torch.arange(num_bytes(fields, 2), dtype=torch.int64).to(torch.uint8)
    return unpack(block, fields, BatchMetadata("d", ("0/d/1", "0/d/2"), (), 0, 0))


def moved(batch: Batch) -> tuple[Batch, list[int]]:
    """The batch copied as to a device, and the bytes of each copy."""
    sizes: list[int] = []

    class Device(TorchDispatchMode):
        """Says that every copy to ``meta`` is a new tensor of the host, so that values can be compared."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::_to_copy" and (kwargs or {}).get("device") == torch.device("meta"):
                sizes.append(args[0].nbytes)
                return args[0].clone()
            return func(*args, **(kwargs or {}))

    with Device():
        return batch.to("meta"), sizes


def test_a_packed_batch_moves_in_one_copy_with_the_same_bytes():
    batch = packed_batch()
    copy, sizes = moved(batch)
    assert sizes == [128 + 12]  # uint16 (2, 2, 3) from 0, float32 (2, 5) from 64, int16 (2, 3) from 128
    assert digest(copy) == digest(batch)
    assert copy.block is not None
    assert copy.block.data_ptr() != batch.block.data_ptr()
    assert all(t.untyped_storage().data_ptr() == copy.block.data_ptr() for t in copy.tensors)
    assert batch.to("cpu") is batch


def test_a_batch_with_other_tensors_than_its_block_moves_tensor_by_tensor():
    batch = packed_batch()
    other = dataclasses.replace(batch, pixels={"s2": torch.ones(2, 2, 3)})
    cut = dataclasses.replace(batch, pixels={"s2": batch.pixels["s2"][:, :, 1:]})
    for changed in (other, cut, batch.map(torch.clone), batch.first()):
        copy, sizes = moved(changed)
        assert sizes == [t.nbytes for t in changed.tensors]
        assert digest(copy) == digest(changed)
    assert batch.first().block is None
